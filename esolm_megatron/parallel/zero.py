"""DeepSpeed ZeRO under megatron-core's schedules: it owns fp32 master weights and AdamW's moments, cut over data ranks.

Stages 0 and 1: megatron drives forward and backward on the bare chunks, gradients gather in the parameters, and
`finish_gradients` completes them. Stages 2 and 3 (no pipeline): DeepSpeed's engine is called in forward, and cuts each
gradient as backward makes it, so what is partial over tensor ranks is summed by a hook before that. In all of them
`engine.step()` ends a global batch. Stage 0 is stage 1 whose data-parallel group is one process: gradients are averaged
here, and every process updates everything (DeepSpeed's own stage 0 counts copies of tied weights when it clips).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import megatron.core.parallel_state as ps
import torch
import torch.distributed as dist
from deepspeed.runtime import bf16_optimizer
from torch import Tensor, nn

from esolm_megatron.config import Config
from esolm_megatron.model.layers import split_of
from esolm_megatron.model.transformer import Block, EsoLM, parameters_with_names
from esolm_megatron.parallel.groups import LoneUnit, ModelParallelUnit
from esolm_megatron.parallel.muon import Muon
from esolm_megatron.parallel.overlap import Overlap, matrices, neighbours
from esolm_megatron.topology import Topology


def deepspeed_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's settings for a run."""
    p, bucket = config.parallel, config.parallel.reduce_bucket_elements
    on_gpu = torch.cuda.is_available() and config.train.device != "cpu"
    zero: dict[str, Any] = {
        "stage": max(p.zero_stage, 1),
        "overlap_comm": p.zero_stage >= 2 and on_gpu,  # ZeRO 1: overlap.py
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "round_robin_gradients": False,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if p.zero_stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": bucket}
    pinned = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if p.offload_optimizer:
        zero["offload_optimizer"] = pinned
    if p.offload_parameters:
        zero["offload_param"] = pinned
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": 1,  # megatron's schedule divides the loss
        "managed_gradient_accumulation": False,  # every engine.step() ends a global batch
        "gradient_clipping": config.optim.clip_grad,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "zero_optimization": zero,
    }
    if config.train.precision == "bf16":
        # fp32 in both accumulation and communication: with either one missing, master weights drift by 1e-2 in 5 steps
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


@dataclass(frozen=True)
class Owned:
    """A parameter of this rank: its whole name, its shape here, and whether this copy is the one to save."""

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    primary: bool


def owned_parameters(config: Config, chunks: Sequence[EsoLM], topology: Topology) -> list[Owned]:
    """This rank's parameters, marked for DeepSpeed's gradient norm.

    A parameter counts once: cut ones on every tensor rank, whole ones on tensor rank 0, the tied head's copy nowhere.
    """
    out = []
    saves = config.parallel.zero_stage > 0 or (topology.data_rank, topology.context_rank) == (0, 0)
    for chunk in chunks:
        for local, (name, parameter) in zip(
            (n for n, _ in chunk.named_parameters()), parameters_with_names(chunk), strict=True
        ):
            cut, copy = split_of(parameter).dim is not None, local != name
            parameter.tensor_model_parallel = cut  # type: ignore[attr-defined]
            if copy:
                parameter.ds_pipe_replicated = True  # type: ignore[attr-defined]
            primary = saves and (cut or topology.tensor_rank == 0) and not copy
            out.append(Owned(name, parameter, tuple(parameter.shape), primary))
    return out


def build(config: Config, chunks: Sequence[EsoLM], owned: Sequence[Owned]) -> Any:
    """A DeepSpeed engine over the chunks, with AdamW: matrices decayed, vectors not."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None  # it prints at every step
    o, buckets = config.optim, _buckets(config, chunks)
    optimizer = Muon(
        _groups(config, owned, [[p for block in bucket for p in matrices(block)] for bucket in buckets]),
        momentum=o.momentum, model=config.model, lr=o.lr, betas=o.betas, eps=o.eps, fused=True,
    )  # fmt: skip
    stage = config.parallel.zero_stage
    engine, *_ = deepspeed.initialize(
        model=nn.ModuleList(chunks) if stage < 2 else chunks[0],
        optimizer=optimizer,
        config=deepspeed_config(config),
        mpu=ModelParallelUnit() if stage else LoneUnit(),
        dist_init_required=False,
    )
    if isinstance(engine.optimizer, bf16_optimizer.BF16_Optimizer):
        _take_few_passes(engine.optimizer)
        if buckets:
            engine.overlap = Overlap(engine.optimizer, buckets)
    if stage >= 2 and config.parallel.tensor_size > 1:
        for owned_parameter in owned:
            if split_of(owned_parameter.parameter).partial_grad:
                owned_parameter.parameter.register_hook(_summed_over_tensor_ranks)
    return engine


def _groups(config: Config, owned: Sequence[Owned], bucketed: Sequence[Sequence[nn.Parameter]]) -> list[dict[str, Any]]:
    """DeepSpeed's parameter groups: what is updated alike, matrices first, and a group for each bucket at the end."""
    apart = {id(p): number for number, bucket in enumerate(bucketed, 1) for p in bucket}
    found: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for x in sorted(owned, key=lambda x: (apart.get(id(x.parameter), 0), x.parameter.dim() <= 1)):
        found.setdefault((apart.get(id(x.parameter), 0), *_treatment(config, x)), []).append(x.parameter)
    return [
        {"params": parameters, "index": index, "muon": muon, "lr_scale": scale, "weight_decay": decay}
        for index, ((_, muon, scale, decay), parameters) in enumerate(found.items())
    ]


def _treatment(config: Config, x: Owned) -> tuple[bool, float, float]:
    """Whether Muon updates a parameter, what its learning rate is multiplied by, its weight decay.

    With `optim.base_width`, AdamW's rate of matrices with a width on the side of their input falls as the width grows (Yang et
    al. 2022, arXiv 2203.03466, table 3), and Muon's by the root of it. Decay times rate stays.
    """
    o, matrix = config.optim, x.parameter.dim() > 1
    muon = o.name == "muon" and matrix and x.name.startswith("layers.")
    narrower = o.width_ratio(config.model.hidden_size) if matrix and x.name != "embedding.weight" else 1.0
    scale = math.sqrt(narrower) if muon else narrower
    return muon, scale, o.weight_decay / scale if matrix else 0.0


def _buckets(config: Config, chunks: Sequence[EsoLM]) -> list[list[Block]]:
    """What is reduced and gathered beside arithmetic, if anything."""
    p, several = config.parallel, ps.get_data_parallel_world_size(with_context_parallel=True) > 1
    if not (several and p.overlap and p.zero_stage == 1 and config.train.precision == "bf16") or p.offload_optimizer:
        return []
    return neighbours(chunks, p.reduce_bucket_elements)


def _take_few_passes(optimizer: bf16_optimizer.BF16_Optimizer) -> None:
    """Norm and clipping without a launch for each parameter; DeepSpeed also clips what only other ranks update."""
    all_gradients = optimizer.get_grads_for_norm
    own = optimizer.fp32_groups_gradient_flat_partition
    optimizer.get_grads_for_norm = lambda for_clipping=False: own if for_clipping else all_gradients()
    bf16_optimizer.get_global_norm_of_tensors = _global_norm


def _global_norm(input_tensors: Sequence[Tensor], mpu: Any, norm_type: float = 2.0) -> Tensor:
    """What DeepSpeed's function of this name gives, -1 for a norm that is not finite included."""
    squares = torch.stack(torch._foreach_norm(list(input_tensors))).square().sum()
    dist.all_reduce(squares, group=mpu.get_model_parallel_group())
    return torch.where(squares.isfinite(), squares.sqrt(), -1.0)


def _summed_over_tensor_ranks(gradient: Tensor) -> Tensor:
    whole = gradient.contiguous().clone()
    dist.all_reduce(whole, group=ps.get_tensor_model_parallel_group())
    return whole


def finish_gradients(
    config: Config, chunks: Sequence[EsoLM], gradients: dict[nn.Parameter, Tensor], topology: Topology
) -> None:
    """Sums that backward leaves open: norms and biases that saw only some tokens or heads, tied embeddings, ZeRO 0."""
    bucket = config.parallel.reduce_bucket_elements
    if topology.tensor_size > 1:
        partial = [g for p, g in gradients.items() if split_of(p).partial_grad]
        _all_reduce_together(partial, ps.get_tensor_model_parallel_group(), bucket)
    tied = [
        gradients[parameter]
        for chunk in chunks
        if chunk.shape.tied_embeddings and topology.pipeline_size > 1
        for name, parameter in parameters_with_names(chunk)
        if name == "embedding.weight"
    ]
    for gradient in tied:
        dist.all_reduce(gradient, group=ps.get_embedding_group())
    if config.parallel.zero_stage == 0:
        replicas = ps.get_data_parallel_group(with_context_parallel=True)
        _all_reduce_together(list(gradients.values()), replicas, bucket, divide=dist.get_world_size(replicas))


def _all_reduce_together(tensors: list[Tensor], group: Any, bucket: int, *, divide: int = 1) -> None:
    for part in _split(tensors, bucket):
        together = torch.cat([t.reshape(-1) for t in part])
        dist.all_reduce(together, group=group)
        for tensor, piece in zip(part, together.split([t.numel() for t in part]), strict=True):
            tensor.copy_(piece.view_as(tensor) / divide)


def _split(tensors: list[Tensor], size: int) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > size:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
