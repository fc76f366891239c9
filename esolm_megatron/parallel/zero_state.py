"""What ZeRO holds on a rank - fp32 weights, AdamW's moments, their moving average - and where it lies in the whole network.

DeepSpeed cuts flattened parameters over data ranks: stages 0 to 2 cut each group's concatenation, stage 3 each parameter.
Either way a rank owns flat ranges of parameters, `fragments` describes them as boxes of whole tensors, and so what one
layout and stage saves, any other loads.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

from esolm_megatron.checkpoint import Piece
from esolm_megatron.model.layers import Box, boxes, split_of, whole_shape
from esolm_megatron.parallel.main_grad import fp32_gradients, missing_gradients
from esolm_megatron.parallel.muon import MOMENTUM, Held
from esolm_megatron.parallel.zero import Owned
from esolm_megatron.topology import Topology

ADAM, MUON = ("exp_avg", "exp_avg_sq"), (MOMENTUM,)


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + count) of a flattened parameter, which lie at `at` in the flat tensor `flat`."""

    start: int
    count: int
    flat: int
    at: int


class Partitions(Protocol):
    """Where DeepSpeed keeps a rank's master weights."""

    flats: list[Tensor]

    def fragment(self, parameter: nn.Parameter) -> Fragment | None:
        """What this rank owns of a parameter."""

    def weights(self, parameter: nn.Parameter, fragment: Fragment) -> Tensor:
        """The network's own copy of a fragment, flat."""

    def publish(self) -> None:
        """Let the network compute with the master weights as they are now, on all ranks together."""


class GroupPartitions:
    """Stages 0, 1 and 2: each parameter group is one flat tensor, cut over the data ranks."""

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer
        self.flats = [group["params"][0] for group in optimizer.param_groups]

    def fragment(self, parameter: nn.Parameter) -> Fragment | None:
        """From DeepSpeed's own link between the two."""
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Fragment(low.start, low.numel, mapping.param_group_index, high.start)

    def weights(self, parameter: nn.Parameter, fragment: Fragment) -> Tensor:
        """Every rank has them whole."""
        return parameter.detach().view(-1)[fragment.start : fragment.start + fragment.count]

    def publish(self) -> None:
        """Round to the network's dtype and gather."""
        self.optimizer.update_lp_params()


class ParameterPartitions:
    """Stage 3: each parameter is cut over the data ranks, and the pieces of a sub-group lie in one flat tensor."""

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer
        self.flats = list(optimizer.fp32_partitioned_groups_flat)

    def fragment(self, parameter: Any) -> Fragment | None:
        """All ranks' pieces are equally long, so the last ones may be padded, or nothing but padding."""
        size = parameter.ds_tensor.ds_numel
        start = torch.distributed.get_rank(parameter.ds_process_group) * size
        count = min(size, parameter.ds_numel - start)
        if count <= 0:
            return None
        flat, at, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        return Fragment(start, count, flat, at)

    def weights(self, parameter: Any, fragment: Fragment) -> Tensor:
        """The piece from which forward gathers."""
        return parameter.ds_tensor.detach().view(-1)[: fragment.count]

    def publish(self) -> None:
        """Round to the network's dtype; forward gathers."""
        self.optimizer._partition_all_parameters()
        for index, flat in enumerate(self.flats):
            self.optimizer.fp16_partitioned_groups_flat[index].data.copy_(flat.data)
            self.optimizer._unflatten_partitioned_parameters(index)


class ZeroState:
    """What DeepSpeed's optimizer holds on this rank: flat fp32 weights, moments and their moving average."""

    def __init__(self, engine: Any, owned: Sequence[Owned], topology: Topology, ema_decay: float):
        self.engine, self.owned, self.topology = engine, list(owned), topology
        self.ema_decay, self.num_steps = ema_decay, 0
        stage3 = hasattr(engine.optimizer, "fp32_partitioned_groups_flat")
        self.partitions: Partitions = (ParameterPartitions if stage3 else GroupPartitions)(engine.optimizer)
        self.flats = self.partitions.flats
        self.ema = [flat.detach().clone() for flat in self.flats] if ema_decay else []
        self.moments = [MUON if not stage3 and x["muon"] else ADAM for x in engine.optimizer.param_groups]
        """Of each flat tensor: kinds of moments."""
        if stage3:
            self.moments = [ADAM] * len(self.flats)

    def share_matrices(self, group: Any) -> None:
        """Let the ranks of `group` share Muon's work, if there is any."""
        if MUON not in self.moments:
            return
        found = [
            Held(flat, owned.name, box.whole, box.shape, where.start)
            for owned, box, flat, where in self.fragments(primary_only=False)
            if self.moments[flat] is MUON
        ]
        size = self.topology.tensor_size
        shapes = {o.name: whole_shape(o.shape, split_of(o.parameter), size) for o in self.owned}
        self.engine.optimizer.optimizer.share(found, shapes, group, self.owned[0].parameter.dtype)

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """This rank's summed gradients, which may be changed in place before the step: fp32, shaped as parameters.

        Only ZeRO 0 and 1 have them: 2 and 3 cut them as backward makes them.

        Raises:
            RuntimeError: a parameter got none: its update would be lost in silence.
        """
        optimizer = self.engine.optimizer
        if isinstance(optimizer, BF16_Optimizer):
            found = fp32_gradients(optimizer)
            missing = missing_gradients(optimizer)
        else:  # bf16 with an offloaded optimizer adds up in an attribute of its own
            where = "grad_accum" if getattr(optimizer, "use_grad_accum_attribute", False) else "grad"
            found = {o.parameter: getattr(o.parameter, where, None) for o in self.owned}
            missing = [parameter for parameter, gradient in found.items() if gradient is None]
        if missing:
            names = {id(o.parameter): o.name for o in self.owned}
            raise RuntimeError(f"no gradient for {', '.join(names[id(parameter)] for parameter in missing)}")
        return found

    def strayed(self) -> Iterator[str]:
        """Names of this rank's weights that are not their master weights, rounded."""
        for owned in self.owned:
            fragment = self.partitions.fragment(owned.parameter)
            if fragment is None:
                continue
            weights = self.partitions.weights(owned.parameter, fragment)
            masters = self.flats[fragment.flat].detach()[fragment.at : fragment.at + fragment.count]
            if not torch.equal(weights, masters.to(weights)):  # offloaded ones are on another device
                yield owned.name

    def step(self, lr: float) -> float:
        """Reduce over data ranks, clip, update; returns the global gradient norm before clipping, nan if it is not finite."""
        optimizer = self.engine.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.engine.step()
        if not self.engine.was_step_applied():  # refused (gate.py): nothing was changed
            return math.nan
        self.num_steps += 1
        if self.ema:
            # weights of a true exponential average, with no bias towards the start: 0 at the first step, then towards decay
            decay = self.ema_decay * (1 - self.ema_decay ** (self.num_steps - 1)) / (1 - self.ema_decay**self.num_steps)
            with torch.no_grad():
                for average, flat in zip(self.ema, self.flats, strict=True):
                    average.lerp_(flat, 1 - decay)
        norm = float(self.engine.get_global_grad_norm())
        return norm if 0 <= norm < math.inf else math.nan  # DeepSpeed says -1 or inf

    def fragments(self, *, primary_only: bool) -> Iterator[tuple[Owned, Box, int, slice]]:
        """(parameter, box, group, range of the group's flat tensor) of everything that this data rank owns."""
        size, rank = self.topology.tensor_size, self.topology.tensor_rank
        for owned in self.owned:
            fragment = self.partitions.fragment(owned.parameter)
            if fragment is None or (primary_only and not owned.primary):
                continue
            for local in flat_boxes(owned.shape, fragment.start, fragment.count):
                count = torch.Size(local.shape).numel()
                at = fragment.at + local.whole[0] - fragment.start
                for box in boxes(owned.shape, split_of(owned.parameter), rank, size):
                    common = intersection(local, box)
                    if common is not None:
                        yield owned, common, fragment.flat, _range(local, common, at, count)

    def pieces(self) -> Iterator[Piece]:
        """Everything this rank has to save: fp32 weights, moments, moving average."""
        optimizer = self.engine.optimizer
        size = self.topology.tensor_size
        for owned, box, group, flat_range in self.fragments(primary_only=True):
            flat = self.flats[group]
            shape = whole_shape(owned.shape, split_of(owned.parameter), size)
            state = optimizer.state[flat]
            kinds = {"weight": flat.detach(), **{k: state[k] for k in self.moments[group] if k in state}}
            if self.ema:
                kinds["ema"] = self.ema[group]
            for kind, tensor in kinds.items():
                yield Piece(kind, owned.name, shape, box.whole, _cut(tensor, flat_range, box))

    def restore(self, read_box: Any, names: Mapping[str, Collection[str]], num_steps: int) -> None:
        """Fill this rank's part from `read_box(kind, name, offset, shape)`, whatever layout wrote it.

        names: kind -> the tensors that have it. A moment that a tensor has not, of another optimizer, begins with zeros.
        """
        optimizer = self.engine.optimizer
        self.num_steps = num_steps
        step = torch.tensor(float(num_steps))
        for flat, moments in zip(self.flats, self.moments, strict=True):
            state = optimizer.state[flat]
            if moments is ADAM:
                state["step"] = step.to(flat.device, copy=True)
            for kind in moments:
                state[kind] = torch.zeros_like(flat.data)
        with torch.no_grad():
            for owned, box, group, flat_range in self.fragments(primary_only=False):
                flat = self.flats[group]
                state = optimizer.state[flat]
                targets = {"weight": flat.data, **{k: state[k] for k in self.moments[group]}}
                if self.ema:
                    targets["ema"] = self.ema[group]
                for kind, tensor in targets.items():
                    if owned.name in names.get(kind, ()):
                        value = read_box(kind, owned.name, box.whole, box.shape)
                    elif kind == "ema":
                        value = read_box("weight", owned.name, box.whole, box.shape)
                    else:
                        continue
                    _cut(tensor, flat_range, box).copy_(value)
        self.partitions.publish()

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The network computes with the moving average inside; does nothing where there is none."""
        if not self.ema:
            yield
            return
        kept = [flat.data for flat in self.flats]
        for flat, average in zip(self.flats, self.ema, strict=True):
            flat.data = average  # DeepSpeed looks at .data when it publishes: nothing is copied
        try:
            self.partitions.publish()
            yield
        finally:
            for flat, old in zip(self.flats, kept, strict=True):
                flat.data = old
            self.partitions.publish()


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
