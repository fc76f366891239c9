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
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from esolm_megatron.config import ModelConfig


class KVCache:
    """The `attend` argument of the network in sampling: call `begin_step`, then the network. No gradients.

    keys, values: (layers, rows, groups, slots, D). Who calls knows which slots hold what; the cache does not.
    """

    def __init__(self, config: ModelConfig, num_rows: int, num_slots: int, dtype: torch.dtype, device: torch.device):
        shape = (config.num_layers, num_rows, config.kv_heads, num_slots, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # zeros, because 0 * NaN of unwritten memory is NaN
        self.values = torch.zeros_like(self.keys)
        self.num_rows, self.num_fed, self.horizon, self.ragged = 0, 0, 0, False
        self.rows = self.slots = self.padded = torch.empty(0, dtype=torch.int64)
        self.bias: Tensor | None = None

    def begin_step(self, rows: Tensor, slots: Tensor, groups: tuple[Tensor, Tensor] | None = None) -> None:
        """Say what is fed next: tokens of rows 0, 1, ... of the cache, each row's together, in the order of slots.

        rows, slots: (T,) int64 on the CPU; every row from 0 to the last has a token. groups: (T,) number of tokens
        and (T,) first slot: a fed token sees the slots below the number, and those from the first to its own.
        """
        device = self.keys.device
        counts = torch.bincount(rows)
        self.num_rows, self.num_fed, self.horizon = len(counts), int(counts.max()), int(slots.max()) + 1
        self.ragged = len(rows) != self.num_rows * self.num_fed
        starts = counts.cumsum(0) - counts
        self.padded = (rows * self.num_fed + torch.arange(len(rows)) - starts[rows]).to(device)
        self.rows, self.slots, self.bias = rows.to(device), slots.to(device), None
        if self.num_fed == 1 and groups is None and int(slots.min()) + 1 == self.horizon:
            return  # every row sees every key
        key = torch.arange(self.horizon, device=device)
        hidden = key > self.slots[:, None]
        if groups is not None:
            limit, first = (x.to(device)[:, None] for x in groups)
            hidden |= (key >= limit) & (key < first)
        bias = torch.zeros(hidden.shape, dtype=self.keys.dtype, device=device).masked_fill_(hidden, float("-inf"))
        if self.ragged:  # padding may see anything: nobody looks at it
            bias = bias.new_zeros(self.num_rows * self.num_fed, self.horizon).index_copy_(0, self.padded, bias)
        self.bias = bias.view(self.num_rows, 1, self.num_fed, self.horizon)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` slots of one row over those of another."""
        self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, N, D), k and v (T, G, D) -> (T, N, D)."""
        keys, values = self.keys[layer, : self.num_rows], self.values[layer, : self.num_rows]
        keys[self.rows, :, self.slots] = k
        values[self.rows, :, self.slots] = v
        heads, groups, width = q.shape[1], k.shape[1], q.shape[2]
        if self.ragged:
            q = q.new_zeros(self.num_rows * self.num_fed, heads, width).index_copy_(0, self.padded, q)
        queries = heads // groups  # those that share a key are laid side by side, so that no key is repeated
        q = q.view(self.num_rows, self.num_fed, groups, queries, width).permute(0, 2, 3, 1, 4)
        bias = self.bias if self.bias is None or queries == 1 else self.bias.repeat(1, 1, queries, 1)
        out = F.scaled_dot_product_attention(
            q.reshape(self.num_rows, groups, queries * self.num_fed, width),
            keys[:, :, : self.horizon],
            values[:, :, : self.horizon],
            attn_mask=bias,
        )
        out = out.view(self.num_rows, groups, queries, self.num_fed, width).permute(0, 3, 1, 2, 4)
        out = out.reshape(self.num_rows * self.num_fed, heads, width)
        return out.index_select(0, self.padded) if self.ragged else out
