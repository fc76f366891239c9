"""Whether replicas of a parameter are equal to the last bit, and which rank's is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK = 1 << 22


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


def disagreements(parameters: Sequence[tuple[str, Tensor]], group: Any) -> list[str]:
    """A line for each parameter that is not equal on all ranks of `group`, the same on each of them."""
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
