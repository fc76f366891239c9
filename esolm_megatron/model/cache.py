"""The KV cache of sampling: keys and values of generated tokens, in memory that is allocated once.

A step feeds, for each row, the tokens generated in the step before and the masks to fill now, in the generation order.
Rows are packed one behind the other; padding exists only in the attention call. A token's slot is its place in the
order, so what a fed token sees is one inequality, `key slot <= own slot`:

    slot         0  1  2  3  4  5
    row 0        x  x | x  z  z        2 cached; feeds 1 token, 2 masks
    row 1        x | x  z              1 cached; feeds 1 token, 1 mask

Tokens see all that was cached, and causally what is fed with them. The next step starts at the first mask's slot, where
its tokens overwrite the keys of the masks: these are never seen again. Verified decoding also feeds masks that stand
for one another's places; each group of them has slots of its own, past the tokens, and a limit to the tokens it sees.

Memory may be taken in pages of `PAGE` slots: a row then has as many as its text needs, and gives them back when it has ended.

Keys and values may be kept in 8 bits: each vector as whole numbers from -127 to 127 and one scale, its largest absolute
value / 127. What is fed sees itself so, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from esolm_megatron.config import ModelConfig
from esolm_megatron.model.kernels import cached_attention, sampling_kernels

PAGE = 128
"""Slots of a page; a multiple of the keys that an attention kernel reads at once."""


@dataclass(frozen=True)
class Queries:
    """Fed tokens that look something up together, laid out as a rectangle of (rows, width) for one attention call.

    padded: (T,) where in the rectangle each is; None where they fill it as they come. bias: (rows, 1, width, horizon),
    minus infinity where a key is not seen; None where all keys below the horizon are. seen: (rows * width, 3) int32, what
    each sees, as a GPU's kernel wants it (model/attention_triton.py); None elsewhere. stored: (rows,) int64, rows of the
    cache, or (rows, pages) its pages; None for the first ones.
    """

    num_rows: int
    width: int
    horizon: int
    padded: Tensor | None
    bias: Tensor | None
    seen: Tensor | None = None
    stored: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor, slots: Tensor, horizon: int, like: Tensor) -> Queries:
        """Of tokens as `KVCache.begin_step` has them; `like` has the queries' dtype and device."""
        counts = torch.bincount(rows)
        num_rows, width, padded = len(counts), int(counts.max()), None
        if len(rows) != num_rows * width:
            starts = counts.cumsum(0) - counts
            padded = (rows * width + torch.arange(len(rows)) - starts[rows]).to(like.device)
        if cached_attention(like) is not None:
            seen = F.pad(slots[:, None], (0, 2)).to(like.device, torch.int32)
            if padded is not None:
                seen = seen.new_full((num_rows * width, 3), -1).index_copy_(0, padded, seen)
            stored = torch.arange(num_rows, device=like.device)
            return cls(num_rows, width, horizon, padded, None, seen, stored)
        if int(slots.min()) + 1 == horizon:
            return cls(num_rows, width, horizon, padded, None)
        key = torch.arange(horizon, device=like.device)
        hidden = key > slots.to(like.device)[:, None]
        bias = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))
        if padded is not None:  # padding may see anything: nobody looks at it
            bias = bias.new_zeros(num_rows * width, horizon).index_copy_(0, padded, bias)
        return cls(num_rows, width, horizon, padded, bias.view(num_rows, 1, width, horizon))

    @classmethod
    def fixed(
        cls, stored: Tensor, slots: Tensor, horizon: int, like: Tensor, groups: tuple[Tensor, Tensor] | None = None
    ) -> Queries:
        """Of rows `stored`, see above, of the cache and slots (rows, width), -1 for padding; nothing is asked of a GPU.

        groups: limit and first, (rows, width) each: a token sees the slots below `limit`, and those from `first` to its own.
        """
        num_rows, width = slots.shape
        if cached_attention(like) is not None:
            limit, first = (slots * 0, slots * 0) if groups is None else groups
            seen = torch.stack([slots, limit, first], -1).view(-1, 3).int()
            return cls(num_rows, width, horizon, None, None, seen, stored)
        key = torch.arange(horizon, device=like.device)
        hidden = key > slots.clamp(min=0)[:, None, :, None]
        if groups is not None:
            limit, first = (x[:, None, :, None] for x in groups)
            hidden |= (key >= limit) & (key < first)
        bias = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))
        here = stored.device.type == "cpu"  # there it costs nothing to ask
        first_ones = here and torch.equal(stored, torch.arange(num_rows))  # whose keys need no copy
        return cls(num_rows, width, horizon, None, bias, None, None if first_ones else stored)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, scales: Tensor | None = None) -> Tensor:
        """q (T, N, D), keys and values (rows, G, slots, D), of 8 bits with scales (2, rows, G, slots) -> (T, N, D)."""
        heads, groups, head_dim = q.shape[1], keys.shape[1], q.shape[2]
        if self.padded is not None:
            q = q.new_zeros(self.num_rows * self.width, heads, head_dim).index_copy_(0, self.padded, q)
        kernel = None if self.seen is None else cached_attention(q)
        if kernel is not None:
            out = kernel(q.contiguous(), keys, values, self.stored, self.seen, scales)
            return out if self.padded is None else out.index_select(0, self.padded)
        keys, values = self._of_rows(keys), self._of_rows(values)
        if scales is not None:
            keys, values = (
                x * self._of_rows(y)[..., None].to(q.dtype) for x, y in zip((keys, values), scales, strict=True)
            )
        queries = heads // groups  # those that share a key are laid side by side, so that no key is repeated
        q = q.view(self.num_rows, self.width, groups, queries, head_dim).permute(0, 2, 3, 1, 4)
        bias = self.bias if self.bias is None or queries == 1 else self.bias.repeat(1, 1, queries, 1)
        out = F.scaled_dot_product_attention(
            q.reshape(self.num_rows, groups, queries * self.width, head_dim),
            keys,
            values,
            attn_mask=bias,
        )
        out = out.view(self.num_rows, groups, queries, self.width, head_dim).permute(0, 3, 1, 2, 4)
        out = out.reshape(self.num_rows * self.width, heads, head_dim)
        return out if self.padded is None else out.index_select(0, self.padded)

    def _of_rows(self, x: Tensor) -> Tensor:
        """What the rows see of keys, values or scales (rows or pages, G, slots, ...)."""
        found = x[slice(self.num_rows) if self.stored is None else self.stored]
        if self.stored is not None and self.stored.dim() == 2:
            found = found.transpose(1, 2).flatten(2, 3)
        return found[:, :, : self.horizon]


class KVCache:
    """The `attend` argument of the network in sampling: call `begin_step`, then the network. No gradients.

    keys, values: (layers, rows, groups, slots, D), or pages in place of rows, the last one for what nobody wants. scales: (2,
    layers, rows, groups, slots) fp32 of keys and values, if those are of 8 bits. table: (rows, pages), where a row's are; None
    without. free: pages that no row has. Who calls knows which slots hold what; the cache does not. `last` is the network's
    argument of that name: the last block mixes and goes on with what the head looks at, and no more.
    """

    queries: Queries
    looked_at: tuple[Tensor, Queries]

    def __init__(
        self,
        config: ModelConfig,
        num_rows: int,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        tensor_size: int = 1,
        int8: bool = False,
        places: int | None = None,
    ):
        """dtype: of the queries, and of keys and values unless `int8`. tensor_size: processes that share the heads.

        places: slots of all rows together, in pages that they `take`; without it each row has its own.
        """
        self.num_slots, self.page, lying = num_slots, num_slots, num_rows
        self.table, self.free, self.held = None, list[int](), dict[int, list[int]]()
        if places is not None:
            self.page, self.free = PAGE, list(range(places // PAGE))[::-1]
            lying = len(self.free) + 1
            self.table = torch.full((num_rows, -(-num_slots // PAGE)), lying - 1, device=device)
        shape = (config.num_layers, lying, config.kv_heads // tensor_size, self.page, config.head_dim)
        kept = torch.int8 if int8 else dtype
        self.keys = torch.zeros(shape, dtype=kept, device=device)  # zeros, because 0 * NaN of unwritten memory is NaN
        self.values = torch.zeros_like(self.keys)
        self.scales = torch.zeros(2, *shape[:-1], device=device) if int8 else None
        self.like = torch.empty(0, dtype=dtype, device=device)
        self.rows = self.slots = torch.empty(0, dtype=torch.int64)

    def begin_step(self, rows: Tensor, slots: Tensor, places: Tensor) -> None:
        """Say what is fed next: tokens of rows 0, 1, ... of the cache, each row's together, in the order of slots.

        rows, slots: (T,) int64 on the CPU; every row from 0 to the last has a token. places: (M,) on the CPU, which of
        these the head looks at, some of each row.
        """
        device, horizon = self.keys.device, int(slots.max()) + 1
        self.rows, self.slots = rows.to(device), slots.to(device)
        self.queries = Queries.of(rows, slots, horizon, self.like)
        self.looked_at = places.to(device), Queries.of(rows[places], slots[places], horizon, self.like)

    def begin_fixed(
        self,
        rows: Tensor,
        slots: Tensor,
        inside: Tensor,
        looked_at: Tensor,
        groups: tuple[Tensor, Tensor] | None = None,
        horizon: int | None = None,
    ) -> None:
        """As `begin_step`, at a fixed shape and of tensors on the device alone.

        rows: (R,) of the cache. slots: (R, W) of what is fed; padding, where `inside` is false, has a spare one. looked_at:
        (R, M) indices among these tokens. groups: (R, W) each, see `Queries.fixed`. horizon: more than any slot that is seen, where
        the host knows it.
        """
        own, lying = torch.where(inside, slots, -1), rows[:, None].expand_as(slots)
        if self.table is not None:
            lying, slots, rows = self.table[lying, slots // self.page], slots % self.page, self.table[rows]
        self.rows, self.slots = lying.reshape(-1).contiguous(), slots.reshape(-1)  # one row's is expanded
        at, horizon = looked_at.reshape(-1), self.num_slots if horizon is None else horizon
        self.queries = Queries.fixed(rows, own, horizon, self.like, groups)
        own, *seen = (x.view(-1)[at].view(looked_at.shape) for x in (own, *(groups or ())))
        some = (seen[0], seen[1]) if seen else None
        self.looked_at = at, Queries.fixed(rows, own, horizon, self.like, some)

    @property
    def last(self) -> LastQueries:
        """The network's argument for this pass; not kept here, as it holds the cache, whose memory must go with its owner."""
        return LastQueries(self, *self.looked_at)

    def pages_for(self, num_slots: int) -> int:
        """Pages that a row of so many slots needs."""
        return 0 if self.table is None else -(-num_slots // PAGE)

    def take(self, row: int, num_slots: int) -> None:
        """Give a row its memory, of which `free` has enough; without pages it has it."""
        if self.table is not None:
            self.held[row] = [self.free.pop() for _ in range(self.pages_for(num_slots))]
            self._tell(row)

    def give(self, row: int) -> None:
        """Let others have a row's memory."""
        if self.table is not None:
            self.free += self.held.pop(row)[::-1]
            self._tell(row)  # what fills up a pass may still name the row

    def _tell(self, row: int) -> None:
        assert self.table is not None
        held = self.held.get(row, [])
        spare = [self.keys.shape[1] - 1] * (self.table.shape[1] - len(held))
        self.table[row] = torch.tensor(held + spare).to(self.table)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` slots of one row over those of another."""
        for x in (self.keys, self.values, *(() if self.scales is None else self.scales)):
            if self.table is None:
                x[:, target, :, :length] = x[:, source, :, :length]
            else:
                count = self.pages_for(length)
                x[:, self.held[target][:count]] = x[:, self.held[source][:count]]

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keep k and v (T, G, D) of what is fed; keys, values (rows, G, slots, D) and scales of all rows."""
        keys, values, scales = self.keys[layer], self.values[layer], None
        if self.scales is not None:
            scales = self.scales[:, layer]
        kernels = sampling_kernels(k)
        if kernels is not None:
            kernels.store(k, v, keys, values, scales, self.rows, self.slots)
            return keys, values, scales
        if scales is not None:
            own = (torch.stack([x.abs().amax(-1) for x in (k, v)]).float() / 127).clamp(
                min=torch.finfo(torch.float32).tiny
            )
            k, v = ((x / scale[..., None]).round().to(torch.int8) for x, scale in zip((k, v), own, strict=True))
            for i in range(2):
                scales[i][self.rows, :, self.slots] = own[i]
        keys[self.rows, :, self.slots] = k
        values[self.rows, :, self.slots] = v
        return keys, values, scales

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, N, D), k and v (T, G, D) -> (T, N, D)."""
        return self.queries.attend(q, *self.store(layer, k, v))


@dataclass(frozen=True)
class LastQueries:
    """What the last block is to compute in a pass: see `model/transformer.py:Wanted`."""

    cache: KVCache
    fed: Tensor
    queries: Queries
    within: None = None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (M, N, D) of what the head looks at, k and v (T, G, D) of all -> (M, N, D)."""
        return self.queries.attend(q, *self.cache.store(layer, k, v))
