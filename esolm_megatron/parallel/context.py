"""Context parallelism: the tokens of a micro-batch dealt over ranks, and gathered by heads inside attention.

Everywhere but in attention, rank r of C holds the packed tokens r, r + C, r + 2C, ...: dealt one by one, because tokens
with loss lie together at the end of a packed row, and the head's work with them. Inside attention it holds all tokens, in
their order, for 1/C of the heads; so the same PackedAttention runs there, and its visibility needs no second definition.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from esolm_megatron.model.transformer import Attend
from esolm_megatron.objective.esolm import PackedBatch


def own_share(batch: PackedBatch, rank: int, size: int) -> PackedBatch:
    """What a context rank feeds of a micro-batch: its tokens, and those of them that carry loss; maybe none.

    The layout stays that of the whole. Raises ValueError where the tokens do not divide.
    """
    if size == 1:
        return batch
    if batch.layout.num_tokens % size:
        raise ValueError(f"{batch.layout.num_tokens} packed tokens do not divide over {size} context ranks")
    mine = batch.places % size == rank
    return replace(
        batch,
        tokens=batch.tokens[rank::size],
        positions=batch.positions[rank::size],
        dropout_ids=batch.dropout_ids[rank::size],
        places=batch.places[mine] // size,
        targets=batch.targets[mine],
        weights=batch.weights[mine],
        parts=batch.parts[mine],
        sources=batch.sources[mine],
    )


class ContextAttention:
    """`attend` over all tokens from ranks that hold 1/C of them each."""

    def __init__(self, attend: Attend, group: Any):
        self.attend, self.group, self.size = attend, group, dist.get_world_size(group)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (t, N, D), k and v (t, G, D) of this rank's t = T/C tokens -> (t, N, D). C divides N and G."""
        t, c = q.shape[0], self.size
        together = torch.cat([x.reshape(t, c, x.shape[1] // c, x.shape[2]) for x in (q, k, v)], dim=2)
        whole = _Exchange.apply(together, self.group).flatten(0, 1)  # (T, (N + 2G) / C, D)
        queries, keys = q.shape[1] // c, k.shape[1] // c
        mixed = self.attend(layer, *whole.split([queries, keys, keys], dim=1))
        return _Exchange.apply(mixed.view(t, c, queries, -1), self.group).flatten(1, 2)


class _Exchange(torch.autograd.Function):
    """(t, C, n, D): what rank a has at [:, b] goes to rank b's [:, a].

    Before, C counts heads: token i of rank a, heads of rank b. After, it counts tokens: token i C + a of the packed row,
    heads of rank b. The exchange is its own inverse, and so its own backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        send = x.transpose(0, 1).contiguous()
        received = torch.empty_like(send)
        dist.all_to_all_single(received, send, group=group)
        return received.transpose(0, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grad, ctx.group), None
