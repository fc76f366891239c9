"""Muon for the matrices of blocks: momentum, made orthogonal by Newton-Schulz iterations, one whole matrix at a time.

ZeRO and tensor parallelism leave each rank pieces of matrices. Before an update the ranks that share a stage's weights
exchange them, so that each owns some whole matrices, and makes those orthogonal; the results go back the same way. Each
matrix is worked on once, whatever the layout. Queries, keys and values are matrices of their own, and so are a gate and what
it gates. Embeddings, head and vectors have AdamW.

K. Jordan et al., https://kellerjordan.github.io/posts/muon; size of an update after Liu et al. 2025, arXiv 2502.16982: as
large as AdamW's, so that both share a learning rate and a weight decay.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from esolm_megatron.config import ModelConfig

COEFFICIENTS, STEPS, EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7
"""Of Newton-Schulz: chosen for a steep start, so that singular values end between 0.7 and 1.2."""
MOMENTUM = "momentum_buffer"


def orthogonal(matrix: Tensor) -> Tensor:
    """(m, n) -> U V^T of its singular value decomposition, about; same dtype, in which it is worked out."""
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def parts(config: ModelConfig, name: str, rows: int) -> list[Tensor]:
    """Indices of the rows of each matrix that lies in the parameter `name`."""
    index = torch.arange(rows)
    if name.endswith("attention.qkv.weight"):  # grouped by key-value head: its queries, its key, its value
        heads = index.view(config.kv_heads, -1, config.head_dim)
        return [heads[:, :-2].flatten(), heads[:, -2].flatten(), heads[:, -1].flatten()]
    if name.endswith("mlp.fc1.weight") and config.activation == "swiglu":
        return list(index.chunk(2))
    return [index]


@dataclass(frozen=True)
class Held:
    """A box of the parameter `name`, at `at` in the whole, which lies in the flat tensor of `group` from `start` on."""

    group: int
    name: str
    at: tuple[int, ...]
    shape: tuple[int, ...]
    start: int

    @property
    def count(self) -> int:
        """Its elements."""
        return math.prod(self.shape)


class Muon(torch.optim.AdamW):
    """AdamW, and Muon for parameter groups that say `muon`, each of one flat tensor once `share` was called."""

    param_groups: list[dict[str, Any]]

    def __init__(self, groups: Sequence[dict[str, Any]], *, momentum: float, model: ModelConfig, **adamw: Any):
        super().__init__(groups, **adamw)
        self.momentum, self.model = momentum, model
        self.ranks: list[list[Held]] = []
        self.shapes: dict[str, tuple[int, ...]] = {}

    def share(self, held: Sequence[Held], shapes: dict[str, tuple[int, ...]], group: Any, dtype: torch.dtype) -> None:
        """Tell what this rank holds of the muon groups, and whole shapes by name. Collective over `group`.

        dtype: of the orthogonal matrices, and of what is exchanged.
        """
        self.process_group, self.shapes, self.dtype = group, shapes, dtype
        self.rank, self.ranks = dist.get_rank(group), [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(self.ranks, list(held), group=group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the groups that are there: DeepSpeed may pass one at a time."""
        groups = self.param_groups
        muon = [group for group in groups if group["muon"]]
        if muon and self.ranks:  # DeepSpeed's first step, with gradients of zero, makes moments
            self._update(muon)
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _update(self, groups: Sequence[dict[str, Any]]) -> None:
        wanted = {group["index"]: group for group in groups}
        flats = {index: group["params"][0] for index, group in wanted.items()}
        directions = {}
        for index, flat in flats.items():
            momentum = self.state[flat].setdefault(MOMENTUM, torch.zeros_like(flat))
            momentum.lerp_(flat.grad, 1 - self.momentum)
            directions[index] = flat.grad.lerp(momentum, self.momentum)  # Nesterov's
        held = [[x for x in boxes if x.group in wanted] for boxes in self.ranks]
        owners = self._owners(sorted({x.name for boxes in held for x in boxes}))
        out = [[x for x in held[self.rank] if owners[x.name] == rank] for rank in range(len(held))]
        into = [[x for x in boxes if owners[x.name] == self.rank] for boxes in held]
        whole = {x.name: flats[x.group].new_empty(self.shapes[x.name], dtype=self.dtype) for xs in into for x in xs}

        def of_flat(x: Held) -> Tensor:
            return directions[x.group][x.start : x.start + x.count]

        def of_whole(x: Held) -> Tensor:
            (row, column), (rows, columns) = x.at, x.shape
            return whole[x.name][row : row + rows, column : column + columns]

        self._exchange(out, of_flat, into, of_whole)
        for name, matrix in whole.items():
            for rows in parts(self.model, name, len(matrix)):
                part = matrix[rows]
                matrix[rows] = orthogonal(part) * (0.2 * math.sqrt(max(part.shape)))
        self._exchange(into, of_whole, out, of_flat)
        for index, flat in flats.items():
            lr = wanted[index]["lr"]
            flat.mul_(1 - lr * wanted[index]["weight_decay"]).add_(directions[index], alpha=-lr)

    def _owners(self, names: Sequence[str]) -> dict[str, int]:
        """Name -> the rank that works on it: the largest first, each to whom has least."""
        cost = {name: math.prod(self.shapes[name]) * min(self.shapes[name]) for name in names}
        least = [(0, rank) for rank in range(len(self.ranks))]
        owners = {}
        for name in sorted(names, key=lambda n: (-cost[n], n)):
            load, owners[name] = heapq.heappop(least)
            heapq.heappush(least, (load + cost[name], owners[name]))
        return owners

    def _exchange(
        self,
        out: Sequence[Sequence[Held]],
        read: Callable[[Held], Tensor],
        into: Sequence[Sequence[Held]],
        place: Callable[[Held], Tensor],
    ) -> None:
        """Boxes for each rank, and from each rank, in one all-to-all."""
        sent = _joined([read(x).reshape(-1).to(self.dtype) for boxes in out for x in boxes], self.dtype, self._device)
        sizes = [[sum(x.count for x in boxes) for boxes in side] for side in (into, out)]
        got = sent.new_empty(sum(sizes[0]))
        dist.all_to_all_single(got, sent, *sizes, group=self.process_group)
        boxes = [x for source in into for x in source]
        for x, piece in zip(boxes, got.split([x.count for x in boxes]), strict=True):
            target = place(x)
            target.copy_(piece.view(target.shape))

    @property
    def _device(self) -> torch.device:
        return self.param_groups[0]["params"][0].device


def _joined(pieces: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=dtype, device=device)
