"""Small passes at fixed shapes, which a GPU records once as CUDA graphs and replays without the host's launches.

A pass over a few rows takes a GPU less time than the host needs to launch its kernels. So the tokens of all rows are
laid out as a rectangle, of which each side is rounded up to one of a few sizes. All that changes between passes of
one size is a block of integers; where they are filled up, tokens write to a slot that nobody sees:

    rows x width     fed tokens      row 0   x z z .        . writes to a spare slot; what it sees does not matter
                                     row 1   x z . .
                                     row 2   . . . .        no row is at work there
    rows x masks     of these the head looks at
    horizon          slots that can be seen

Passes of more tokens than `MOST_TOKENS` have work enough to hide launches, and are not padded.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esolm_megatron.model.cache import KVCache, Queries
from esolm_megatron.model.transformer import EsoLM

MOST_TOKENS = 2048
RECORD_AT = 8
"""The pass of its size that is recorded: those before it warm the libraries up, and recording costs more than some passes."""
MOST_GRAPHS = 256
"""Sizes that are recorded; a server may meet more, and each keeps some memory."""


@dataclass(frozen=True)
class Size:
    """Rows, tokens and masks of each, and the slots that are seen."""

    rows: int
    width: int
    masks: int
    horizon: int

    @classmethod
    def around(cls, rows: int, width: int, masks: int, horizon: int, most_rows: int, most_slots: int) -> Size:
        """The next larger size: rows, width and masks as powers of two, the horizon in eighths of one, at least 64."""
        step = max(64, _power_of_two(horizon) // 8)
        slots = -(-horizon // step) * step
        return cls(
            min(_power_of_two(rows), most_rows), _power_of_two(width), _power_of_two(masks), min(slots, most_slots)
        )


def sent(array: NDArray[np.int64], device: torch.device) -> Tensor:
    """`array` on the device, without waiting for what that has yet to do."""
    values = torch.from_numpy(array)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def _power_of_two(number: int) -> int:
    return 1 << (int(number) - 1).bit_length()


@dataclass
class RecordedPasses:
    """Logits of small passes over a cache that has one slot more than `fed` has places.

    record: make CUDA graphs; otherwise each pass runs as it is, at the same shapes. mask_id: what is fed where the head
    looks; None for what `fed` holds there, as in autoregressive decoding. counts: passes of each size.
    """

    model: EsoLM
    cache: KVCache
    fed: Tensor
    order: Tensor
    record: bool
    mask_id: int | None
    counts: Counter[Size] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._inputs: dict[Size, Tensor] = {}
        self._graphs: dict[Size, torch.cuda.CUDAGraph] = {}
        self._logits: dict[int, Tensor] = {}  # by their number, for all sizes that have as many
        self._pool = torch.cuda.graph_pool_handle() if self.record else None

    def __call__(
        self, inside: NDArray[np.int64], slots: NDArray[np.int64], at: NDArray[np.int64], stored: NDArray[np.int64]
    ) -> Tensor | None:
        """Logits (M, V) of a pass, or None where it is too large.

        inside: (T,) row of the cache of each fed token, in order. slots: (T,) its place. at: (M,) which are masks, some
        of each row. stored: (R,) rows of `fed` that are at work.
        """
        counts, masks = np.bincount(inside), np.bincount(inside[at])
        most_rows, most_slots = self.cache.keys.shape[1], self.cache.keys.shape[3] - 1
        size = Size.around(len(counts), counts.max(), masks.max(), slots.max() + 1, most_rows, most_slots)
        if size.rows * size.width > MOST_TOKENS:
            return None
        cell = inside * size.width + np.arange(len(inside)) - (np.cumsum(counts) - counts)[inside]
        head = inside[at] * size.masks + np.arange(len(at)) - (np.cumsum(masks) - masks)[inside[at]]
        rows, spare = size.rows, most_slots
        block = np.zeros((4, rows, size.width), np.int64)
        store, place, slot, is_mask = block.reshape(4, -1)
        block[0, : len(stored)] = stored[:, None]
        slot[:] = spare
        place[cell], slot[cell], is_mask[cell[at]] = slots, slots, 1
        looked_at = np.repeat(np.arange(rows), size.masks) * size.width
        looked_at[head] = cell[at]
        logits = self._run(size, sent(np.concatenate([store, place, slot, is_mask, looked_at]), self.fed.device))
        return logits.index_select(
            0, sent(head, self.fed.device)
        )  # a copy: the next pass of this size writes over them

    def _run(self, size: Size, values: Tensor) -> Tensor:
        self.counts[size] += 1
        if size not in self._inputs:
            self._inputs[size] = torch.empty_like(values)
        inputs, number = self._inputs[size], size.rows * size.masks
        inputs.copy_(values)
        if size not in self._graphs:
            if not self.record or self.counts[size] < RECORD_AT or len(self._graphs) == MOST_GRAPHS:
                return self._forward(size, inputs)
            if number not in self._logits:
                self._logits[number] = torch.empty_like(self._forward(size, inputs))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                self._logits[number].copy_(self._forward(size, inputs))
            self._graphs[size] = graph
        self._graphs[size].replay()
        return self._logits[number]

    def _forward(self, size: Size, inputs: Tensor) -> Tensor:
        """Logits (rows x masks, V): a function of integers on the device, without a look at them."""
        cache, tokens = self.cache, size.rows * size.width
        stored, place, slot, is_mask, looked_at = inputs.split([tokens] * 4 + [size.rows * size.masks])
        cache.rows = torch.arange(size.rows, device=inputs.device).repeat_interleave(size.width, output_size=tokens)
        cache.slots = slot
        hidden = torch.arange(size.horizon, device=inputs.device) > slot[:, None]
        bias = cache.keys.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        cache.queries = Queries(size.rows, size.width, size.horizon, None, bias.view(size.rows, 1, size.width, -1))
        looking = bias.index_select(0, looked_at).view(size.rows, 1, size.masks, -1)
        cache.looked_at = looked_at, Queries(size.rows, size.masks, size.horizon, None, looking)
        ids = self.fed[stored, place]
        if self.mask_id is not None:
            ids = ids.masked_fill(is_mask.bool(), self.mask_id)
        return self.model(ids, self.order[stored, place], cache, last=cache.last)
