"""Context parallelism: the tokens of a micro-batch dealt over ranks, and gathered by heads inside attention.

Everywhere but in attention, rank r of C holds the packed tokens r, r + C, r + 2C, ...: dealt one by one, because tokens
with loss lie together at the end of a packed row, and the head's work with them. Inside attention it holds all tokens, in
their order, for 1/C of the query heads; so the same PackedAttention runs there, and its visibility needs no second
definition. Where there are fewer key-value heads than ranks, each goes to all the ranks whose query heads use it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from esolm_megatron.model.last_block import LastBlock
from esolm_megatron.model.transformer import Attend
from esolm_megatron.objective.esolm import PackedBatch


def own_share(batch: PackedBatch, rank: int, size: int, multiple: int = 1) -> PackedBatch:
    """What a context rank feeds of a micro-batch: its tokens, and those of them that carry loss; maybe none.

    The layout stays that of the whole. multiple: of the tokens that its last block is fed, for sequence parallelism.
    Raises ValueError where the tokens do not divide.
    """
    batch = replace(batch, last=batch.last.share(batch.places, rank, size, multiple))
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
        """q (p, N, D), k and v (t, G, D) of this rank's t = T/C tokens -> (p, N, D). C divides N; C divides G, or G divides C.

        p = t but in the last block, where each rank feeds the queries of p tokens.
        """
        if len(q) == len(k):
            whole = self._all_tokens(q, k, v)
        else:
            whole = [*self._all_tokens(q), *self._all_tokens(k, v)]
        mixed = self.attend(layer, *whole)
        return _Exchange.apply(mixed.view(len(q), self.size, *mixed.shape[1:]), self.group).flatten(1, 2)

    def _all_tokens(self, *tensors: Tensor) -> list[Tensor]:
        """(t, N, D) of this rank's tokens -> (T, N / C, D), or (T, 1, D) where N < C, in one exchange."""
        shared = [_for_ranks(x, self.size) for x in tensors]
        heads = [x.shape[1] // self.size for x in shared]
        split = [x.reshape(len(x), self.size, n, x.shape[2]) for x, n in zip(shared, heads, strict=True)]
        whole = _Exchange.apply(torch.cat(split, dim=2), self.group).flatten(0, 1)
        return list(whole.split(heads, dim=1))


def _for_ranks(x: Tensor, ranks: int) -> Tensor:
    """(t, G, D) with G < C heads -> (t, C, D): each as often as ranks have queries for it, which lie side by side.

    So in backward a token's own rank sums what these ranks found for its key. It does so along a dimension, which gives the
    same bits each time; the backward pass of an indexed copy may add in any order on a GPU.
    """
    times = ranks // x.shape[1]
    return x if times <= 1 else x[:, :, None].expand(-1, -1, times, -1).flatten(1, 2)


class ContextLastBlock(ContextAttention):
    """The same for the last block: what this rank feeds it, and what that sees."""

    def __init__(self, last: LastBlock, group: Any):
        super().__init__(last, group)
        self.fed, self.within = last.fed, last.within


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
