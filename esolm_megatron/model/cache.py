"""The KV cache of sampling: keys and values of generated tokens, in memory that is allocated once.

A step feeds, in each row, the tokens generated in the step before and the masks to fill now, in the generation order.
A token's slot is its place in that order, so what a fed token sees is one inequality, `key slot <= own slot`:

    slot         0  1  2  3  4  5
    row 0        x  x | x  z  z  .     2 cached; feeds 1 token, 2 masks, 1 padding
    row 1        x | x  z  .  .        1 cached; feeds 1 token, 1 mask, 2 padding

Tokens see all that was cached, and causally what is fed with them. The next step starts at the first mask's slot, where
its tokens overwrite the keys of the masks: these are never seen again. Padding stands to the right, where nobody looks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from esolm_megatron.config import ModelConfig


class KVCache:
    """The `attend` argument of the network in sampling. Call `begin_step`, the network, then `end_step`.

    lengths: (B,) int64 on the CPU, tokens whose keys and values are kept, for each row. No gradients.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, num_places: int, dtype: torch.dtype, device: torch.device | str
    ):
        """Room for `num_places` tokens in each row, and one slot more that takes the padding past the last of them."""
        shape = (config.num_layers, batch_size, num_places + 1, config.kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # zeros, because 0 * NaN of unwritten memory is NaN
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64)
        self.num_fed, self.horizon = 0, 0
        self.slots = self.bias = torch.empty(0)

    def begin_step(self, num_fed: int) -> Tensor:
        """Slots of the next `num_fed` tokens of each row, padding included: (B, num_fed) int64 on the CPU.

        A slot is the token's place in the order; all padding past the last place has the slot after it.
        """
        batch, num_slots = self.keys.shape[1:3]
        slots = (self.lengths[:, None] + torch.arange(num_fed)).clamp(max=num_slots - 1)
        self.num_fed, self.horizon = num_fed, int(slots.max()) + 1
        self.slots = (slots + torch.arange(batch)[:, None] * num_slots).flatten().to(self.keys.device)
        hidden = (torch.arange(self.horizon) > slots[..., None]).to(self.keys.device)
        self.bias = torch.zeros(hidden.shape, dtype=self.keys.dtype, device=self.keys.device)
        self.bias = self.bias.masked_fill_(hidden, float("-inf"))[:, None]
        return slots

    def end_step(self, num_tokens: Tensor) -> None:
        """Keep the first `num_tokens` (B,) of what each row was fed: its tokens, not its masks."""
        self.lengths = self.lengths + num_tokens

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B * num_fed, N, D), k and v (B * num_fed, G, D) -> (B * num_fed, N, D)."""
        keys, values = self.keys[layer], self.values[layer]
        keys.flatten(0, 1).index_copy_(0, self.slots, k)
        values.flatten(0, 1).index_copy_(0, self.slots, v)
        batch, heads, groups, width = keys.shape[0], q.shape[1], k.shape[1], q.shape[2]
        queries = heads // groups  # those that share a key are laid side by side, so that no key is repeated
        q = q.view(batch, self.num_fed, groups, queries, width).permute(0, 2, 3, 1, 4)
        bias = self.bias if queries == 1 else self.bias.repeat(1, 1, queries, 1)
        out = F.scaled_dot_product_attention(
            q.reshape(batch, groups, queries * self.num_fed, width),
            keys[:, : self.horizon].transpose(1, 2),
            values[:, : self.horizon].transpose(1, 2),
            attn_mask=bias,
        )
        out = out.view(batch, groups, queries, self.num_fed, width).permute(0, 3, 1, 2, 4)
        return out.reshape(batch * self.num_fed, heads, width)
