"""DeepSpeed ZeRO under megatron-core's schedules: it owns fp32 master weights and AdamW's moments, cut over data ranks.

Megatron drives forward and backward on the bare chunks; `engine.step()` is the only boundary DeepSpeed sees. What a data
rank owns is a flat range of each parameter; `fragments` describes it as boxes of whole tensors.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import megatron.core.parallel_state as ps
import torch
import torch.distributed as dist
from deepspeed.runtime import bf16_optimizer
from torch import Tensor, nn

from esolm_megatron.checkpoint import Piece
from esolm_megatron.config import Config
from esolm_megatron.model.layers import Box, boxes, split_of, whole_shape
from esolm_megatron.model.transformer import EsoLM, parameters_with_names
from esolm_megatron.parallel.groups import ModelParallelUnit
from esolm_megatron.topology import Topology

MOMENTS = ("exp_avg", "exp_avg_sq")


def deepspeed_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's settings for a run."""
    bucket = config.parallel.reduce_bucket_elements
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": 1,  # megatron's schedule divides the loss
        "managed_gradient_accumulation": False,  # every engine.step() ends a global batch
        "gradient_clipping": config.optim.clip_grad,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "round_robin_gradients": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
    }
    if config.train.precision == "bf16":
        # fp32 in both accumulation and communication: with either one missing, master weights drift by 1e-2 in 5 steps
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


@dataclass(frozen=True)
class Owned:
    """A parameter of this rank: its whole name, its boxes in the whole, and whether this copy is the one to save."""

    name: str
    parameter: nn.Parameter
    primary: bool


def owned_parameters(chunks: Sequence[EsoLM], topology: Topology) -> list[Owned]:
    """This rank's parameters, marked for DeepSpeed's gradient norm.

    A parameter counts once: cut ones on every tensor rank, whole ones on tensor rank 0, the tied head's copy nowhere.
    """
    out = []
    for chunk in chunks:
        for local, (name, parameter) in zip(
            (n for n, _ in chunk.named_parameters()), parameters_with_names(chunk), strict=True
        ):
            cut, copy = split_of(parameter).dim is not None, local != name
            parameter.tensor_model_parallel = cut  # type: ignore[attr-defined]
            if copy:
                parameter.ds_pipe_replicated = True  # type: ignore[attr-defined]
            out.append(Owned(name, parameter, primary=(cut or topology.tensor_rank == 0) and not copy))
    return out


def build(config: Config, chunks: Sequence[EsoLM], owned: Sequence[Owned]) -> Any:
    """A DeepSpeed engine over the chunks, with AdamW: matrices decayed, vectors not."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None  # it prints at every step
    matrices = [o.parameter for o in owned if o.parameter.dim() > 1]
    vectors = [o.parameter for o in owned if o.parameter.dim() <= 1]
    o = config.optim
    groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True)
    engine, *_ = deepspeed.initialize(
        model=nn.ModuleList(chunks),
        optimizer=optimizer,
        config=deepspeed_config(config),
        mpu=ModelParallelUnit(),
        dist_init_required=False,
    )
    return engine


class ZeroState:
    """What DeepSpeed's optimizer holds on this rank: flat fp32 weights, moments and their moving average."""

    def __init__(self, engine: Any, owned: Sequence[Owned], topology: Topology, ema_decay: float):
        self.engine, self.owned, self.topology = engine, list(owned), topology
        self.ema_decay, self.num_steps = ema_decay, 0
        self.flats: list[Tensor] = [group["params"][0] for group in engine.optimizer.param_groups]
        self.ema = [flat.detach().clone() for flat in self.flats] if ema_decay else []

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """This replica's summed gradients, which may be changed in place before the step: fp32, shaped as parameters.

        Raises:
            RuntimeError: a parameter got none: its update would be lost in silence.
        """
        optimizer = self.engine.optimizer
        if isinstance(optimizer, bf16_optimizer.BF16_Optimizer):
            return {
                parameter: gradient.view(parameter.shape)
                for group, gradients in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
                for parameter, gradient in zip(group, gradients, strict=True)
            }
        missing = [o.name for o in self.owned if o.parameter.grad is None]
        if missing:
            raise RuntimeError(f"no gradient for {', '.join(missing)}")
        return {o.parameter: o.parameter.grad for o in self.owned if o.parameter.grad is not None}

    def step(self, lr: float) -> float:
        """Reduce over data ranks, clip, update; returns the global gradient norm before clipping."""
        optimizer = self.engine.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        if not self.engine.was_step_applied():  # refused (gate.py): nothing was changed
            return float("inf")
        self.num_steps += 1
        if self.ema:
            # weights of a true exponential average, with no bias towards the start: 0 at the first step, then towards decay
            decay = self.ema_decay * (1 - self.ema_decay ** (self.num_steps - 1)) / (1 - self.ema_decay**self.num_steps)
            with torch.no_grad():
                for average, flat in zip(self.ema, self.flats, strict=True):
                    average.lerp_(flat, 1 - decay)
        return float(self.engine.get_global_grad_norm())

    def fragments(self, *, primary_only: bool) -> Iterator[tuple[Owned, Box, int, slice]]:
        """(parameter, box, group, range of the group's flat tensor) of everything that this data rank owns."""
        size, rank = self.topology.tensor_size, self.topology.tensor_rank
        for owned in self.owned:
            mapping = owned.parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None or (primary_only and not owned.primary):
                continue
            shape, start = tuple(owned.parameter.shape), mapping.lp_fragment_address.start
            flat = mapping.hp_fragment_address.start
            for local in flat_boxes(shape, start, mapping.lp_fragment_address.numel):
                count = torch.Size(local.shape).numel()
                at = flat + local.whole[0] - start
                for box in boxes(shape, split_of(owned.parameter), rank, size):
                    common = intersection(local, box)
                    if common is not None:
                        yield owned, common, mapping.param_group_index, _range(local, common, at, count)

    def pieces(self) -> Iterator[Piece]:
        """Everything this rank has to save: fp32 weights, moments, moving average."""
        optimizer = self.engine.optimizer
        size = self.topology.tensor_size
        for owned, box, group, flat_range in self.fragments(primary_only=True):
            flat = self.flats[group]
            shape = whole_shape(tuple(owned.parameter.shape), split_of(owned.parameter), size)
            state = optimizer.state[flat]
            kinds = {"weight": flat.detach(), **{k: state[k] for k in MOMENTS if k in state}}
            if self.ema:
                kinds["ema"] = self.ema[group]
            for kind, tensor in kinds.items():
                yield Piece(kind, owned.name, shape, box.whole, _cut(tensor, flat_range, box))

    def restore(self, read_box: Any, kinds: Sequence[str], num_steps: int) -> None:
        """Fill this rank's part from `read_box(kind, name, offset, shape)`, whatever layout wrote it."""
        optimizer = self.engine.optimizer
        self.num_steps = num_steps
        step = torch.tensor(float(num_steps))
        for flat in self.flats:
            state = optimizer.state[flat]
            state["step"] = step.clone()
            for kind in MOMENTS:
                state[kind] = torch.zeros_like(flat.data)
        with torch.no_grad():
            for owned, box, group, flat_range in self.fragments(primary_only=False):
                flat = self.flats[group]
                state = optimizer.state[flat]
                targets = {"weight": flat.data, **{k: state[k] for k in MOMENTS}}
                if self.ema:
                    targets["ema"] = self.ema[group]
                for kind, tensor in targets.items():
                    if kind in kinds:
                        value = read_box(kind, owned.name, box.whole, box.shape)
                    elif kind == "ema":
                        value = read_box("weight", owned.name, box.whole, box.shape)
                    else:
                        continue
                    _cut(tensor, flat_range, box).copy_(value)
        optimizer.update_lp_params()

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The network computes with the moving average inside; does nothing where there is none."""
        if not self.ema:
            yield
            return
        optimizer = self.engine.optimizer
        kept = [flat.detach().clone() for flat in self.flats]
        with torch.no_grad():
            for flat, average in zip(self.flats, self.ema, strict=True):
                flat.data.copy_(average)
            optimizer.update_lp_params()
            try:
                yield
            finally:
                for flat, old in zip(self.flats, kept, strict=True):
                    flat.data.copy_(old)
                optimizer.update_lp_params()


def _range(local: Box, common: Box, at: int, count: int) -> slice:
    """The flat range of a contiguous `local` box at `at`, narrowed to the rows that `common` touches."""
    if len(local.shape) == 1:
        skip = common.local[0] - local.local[0]
        return slice(at + skip, at + skip + common.shape[0])
    columns = local.shape[1]
    skip = (common.local[0] - local.local[0]) * columns + common.local[1] - local.local[1]
    if common.shape[1] != columns and common.shape[0] > 1:
        raise AssertionError("a rank's own columns are never cut")
    return slice(at + skip, at + skip + common.shape[0] * common.shape[1])


def _cut(flat: Tensor, where: slice, box: Box) -> Tensor:
    return flat[where].view(box.shape)


def flat_boxes(shape: tuple[int, ...], start: int, count: int) -> Iterator[Box]:
    """A flat range of a 1-D or 2-D tensor as at most three boxes, each contiguous; `whole` holds the flat offset."""
    if len(shape) == 1:
        yield Box((start,), (start,), (count,))
        return
    columns, position, end = shape[1], start, start + count
    while position < end:
        row, column = divmod(position, columns)
        if column or end - position < columns:
            size = min(columns - column, end - position)
            yield Box((row, column), (position,), (1, size))
        else:
            rows = (end - position) // columns
            size = rows * columns
            yield Box((row, 0), (position,), (rows, columns))
        position += size


def intersection(local: Box, box: Box) -> Box | None:
    """What two boxes of a rank's piece share, placed in the whole by the second."""
    start = tuple(max(a, b) for a, b in zip(local.local, box.local, strict=True))
    stop = tuple(min(a + n, b + m) for a, n, b, m in zip(local.local, local.shape, box.local, box.shape, strict=True))
    if any(a >= b for a, b in zip(start, stop, strict=True)):
        return None
    whole = tuple(w + a - b for w, a, b in zip(box.whole, start, box.local, strict=True))
    return Box(start, whole, tuple(b - a for a, b in zip(start, stop, strict=True)))


def finish_gradients(chunks: Sequence[EsoLM], gradients: dict[nn.Parameter, Tensor], topology: Topology) -> None:
    """Sums that backward leaves open: norms and biases that saw only some tokens or heads, and tied embeddings."""
    if topology.tensor_size > 1:
        partial = [g for p, g in gradients.items() if split_of(p).partial_grad]
        _all_reduce_together(partial, ps.get_tensor_model_parallel_group())
    tied = [
        gradients[parameter]
        for chunk in chunks
        if chunk.shape.tied_embeddings and topology.pipeline_size > 1
        for name, parameter in parameters_with_names(chunk)
        if name == "embedding.weight"
    ]
    for gradient in tied:
        dist.all_reduce(gradient, group=ps.get_embedding_group())


def _all_reduce_together(tensors: list[Tensor], group: Any) -> None:
    if not tensors:
        return
    together = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(together, group=group)
    for tensor, part in zip(tensors, together.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
