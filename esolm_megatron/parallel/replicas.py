"""Whether what several ranks hold or compute alike is equal, and which rank's is not.

At every step, beside numbers that are gathered anyway: norms and biases, which each tensor, context and data rank holds
whole, and the loss as each tensor rank arrived at it. What a tensor rank computes wrongly reaches others through sums that
leave all of them equal, loss and gradient norm included; but its own norms then get other gradients than those of its
neighbours, and differ from the next update on. Every `guard.checksum_every_steps` steps: all weights, by `disagreements`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from esolm_megatron.topology import Topology

_CHUNK = 1 << 22
_EXACT = (1 << 53) - 1  # whole numbers up to it pass through fp64, and no bit of a 32-bit element falls out of it
_LOSS_TOLERANCE = 1e-4  # GPUs add up token losses in any order


def checksum(tensor: Tensor) -> Tensor:
    """() int64 of a floating tensor's bits and their places: any one flipped bit changes it, on any device alike.

    The sum of element bits times odd numbers, modulo 2**64.
    """
    flat = tensor.detach().reshape(-1)
    bits = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK].long()
        total += (part * (2 * torch.arange(start, start + len(part), device=part.device) + 1)).sum()
    return total


def fingerprint(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """() fp64 whole number that changes with any one bit of `tensors`, on `device`; equal ones give equal numbers."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    return (checksum(torch.cat([t.detach().reshape(-1) for t in tensors])) & _EXACT).to(device, torch.float64)


def accusations(losses: np.ndarray, fingerprints: np.ndarray, topology: Topology, *, zero_stage: int) -> list[str]:
    """A line for each group of ranks that should agree and do not; the same on all ranks.

    losses, fingerprints: (world_size,) what each rank found itself, both 0 where it has none. Tensor ranks see the same
    tokens. Norms and biases are equal over a whole stage; ZeRO 3 cuts them over data and context ranks.
    """
    world, tensor = topology.world_size, topology.tensor_size
    found = []
    for start in range(0, world, tensor):
        ranks = range(start, start + tensor)
        found += _odd("loss", ranks, _near(losses[start : start + tensor]))
    size = tensor if zero_stage == 3 else world // topology.pipeline_size
    for start in range(0, world, size):
        found += _odd("norms and biases", range(start, start + size), fingerprints[start : start + size])
    return found


def _odd(name: str, ranks: Sequence[int], values: np.ndarray) -> list[str]:
    sums = values.astype(np.float64).view(np.int64).tolist()
    return [verdict(name, ranks, sums)] if len(set(sums)) > 1 else []


def _near(values: np.ndarray) -> np.ndarray:
    """`values`, those near the lower median replaced by it, and nan by one pattern of bits."""
    middle = np.sort(values)[(len(values) - 1) // 2]  # nan is sorted last
    with np.errstate(invalid="ignore"):  # of two infinities
        near = np.abs(values - middle) <= _LOSS_TOLERANCE * np.abs(middle)
    return np.where(np.isnan(values), np.nan, np.where(near, middle, values))


def compared(topology: Topology, zero_stage: int, every: int) -> str:
    """What a run compares between its ranks, in words for its log."""
    copies = topology.tensor_size if zero_stage == 3 else topology.world_size // topology.pipeline_size
    said = []
    if copies > 1:
        said.append(f"norms and biases of {copies} ranks each step")
    if topology.tensor_size > 1:
        said.append("the loss of tensor ranks each step")
    if every and zero_stage < 3 and (replicas := topology.data_size * topology.context_size) > 1:
        said.append(f"all weights of {replicas} replicas each {every} steps")
    if every:
        said.append(f"weights with their master weights each {every} steps")
    return ", ".join(said) or "nothing"


def disagreements(parameters: Sequence[tuple[str, Tensor]], group: Any) -> list[str]:
    """A line for each parameter that is not equal on all ranks of `group`, the same on each of them.

    Parameters that ZeRO 3 has cut, so that there is no second copy, have no elements here and are not compared.
    """
    parameters = [(name, parameter) for name, parameter in parameters if parameter.numel()]
    if not parameters or dist.get_world_size(group) == 1:
        return []
    mine = torch.stack([checksum(parameter) for _, parameter in parameters])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    ranks = dist.get_process_group_ranks(group)
    table = torch.stack(everyone).T.tolist()
    return [verdict(name, ranks, sums) for (name, _), sums in zip(parameters, table, strict=True) if len(set(sums)) > 1]


def verdict(name: str, ranks: Sequence[int], sums: Sequence[int]) -> str:
    """Who differs: the minority, where there is one.

    >>> verdict("head.weight", [1, 3, 5], [7, 7, 8])
    'head.weight: rank 5 differs from ranks 1, 3'
    """
    (common, count), *_ = Counter(sums).most_common(1)
    if 2 * count <= len(sums):
        return f"{name}: ranks {_listed(ranks)} differ, and no majority says which is right"
    odd = [rank for rank, value in zip(ranks, sums, strict=True) if value != common]
    rest = [rank for rank, value in zip(ranks, sums, strict=True) if value == common]
    plural = "s" if len(odd) > 1 else ""
    return f"{name}: rank{plural} {_listed(odd)} differ{'' if plural else 's'} from ranks {_listed(rest)}"


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
