"""The last block, of which only the tokens that carry loss are wanted.

All tokens give it keys and values. But queries attend, and go on to the output projection, the MLP, the final norm and the
head, only where there is loss. In each run of tokens (a row, a mask stream, or a document's part of one) these are the
places from the first one with loss to the last one. Such a query sees the true keys strictly before its place, in two
calls (those before the first query; the causal rest), and its own key: what a mask does in `model/attention.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esolm_megatron.model.attention import PackedLayout, Part, mask_parts, mask_stream_of_parts

Sizes = Sequence[NDArray[np.int64]]
"""(rows, runs) tokens in each run of each stream; 0 is allowed."""


@dataclass(frozen=True)
class LastBlock:
    """The tokens that the last block is fed, and what they see.

    tokens: (Q,) int64, packed tokens from the first to the last one with loss of each run, ascending. parts: calls of
    the flash kernel for them; causal: how many packed tokens come before the mask streams.
    A rank feeds `fed` (P,), its own tokens among these and, at the end, repetitions of any to have as many as other ranks;
    `within` (M,): which of them carry loss. slots: (Q,) where in the P x ranks tokens that are fed together each is.
    """

    tokens: Tensor
    parts: tuple[Part, ...]
    causal: int
    fed: Tensor
    within: Tensor
    slots: Tensor

    @classmethod
    def of(cls, layout: PackedLayout, places: NDArray[np.int64], causal: Sizes, masks: Sizes) -> LastBlock:
        """For one rank; see `share` for several.

        places: (M,) packed tokens that carry loss, ascending. causal: sizes of the runs of the plain rows, if any, and of
        each group's clean streams. masks: of each group's mask streams, run for run beside those of its clean streams.
        """
        length, key, before = _runs(causal, masks)
        start = np.cumsum(length) - length
        runs, first = np.unique(np.searchsorted(start, places, "right") - 1, return_index=True)
        ends = np.append(first[1:], len(places))[: len(first)] - 1  # no place at all is no run
        low, count = places[first], places[ends] - places[first] + 1
        tokens = torch.from_numpy(np.repeat(low - (np.cumsum(count) - count), count) + np.arange(count.sum()))
        seen = before[runs] + low - start[runs]  # keys that all queries of the run see
        parts = mask_parts(np.cumsum(count) - count, count, key[runs], seen + count)
        empty = torch.empty(0, dtype=torch.int64)
        whole = cls(tokens, parts, layout.num_causal_rows * layout.seq_length, empty, empty, empty)
        return whole.share(torch.from_numpy(places), 0, 1, 1)

    def share(self, places: Tensor, rank: int, size: int, multiple: int) -> LastBlock:
        """What one of `size` ranks feeds that hold every size-th token: as many tokens as the others, a multiple of this.

        places: (M,) packed tokens of all ranks that carry loss.
        """
        tokens, owner = self.tokens, self.tokens % size
        slots, most = torch.empty_like(tokens), 1
        for other in range(size):
            mine = owner == other
            count = int(mine.sum())
            slots[mine] = torch.arange(count) * size + other
            most = max(most, count)
        own = tokens[owner == rank]
        fed = torch.zeros(-(-most // multiple) * multiple, dtype=torch.int64)
        fed[: len(own)] = own // size
        within = torch.searchsorted(own, places[places % size == rank])
        return replace(self, fed=fed, within=within, slots=slots)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (F, N, D) of all that is fed together, k and v (T, G, D) of all tokens -> (F, N, D), 0 at repetitions."""
        own = [x.index_select(0, index) for x, index in ((q, self.slots), (k, self.tokens), (v, self.tokens))]
        rows = [x.transpose(0, 1)[None] for x in (*own, k[: self.causal], v[: self.causal])]
        out = mask_stream_of_parts(*rows, parts=self.parts)[0].transpose(0, 1)
        return torch.zeros_like(q).index_copy(0, self.slots, out)


def _runs(causal: Sizes, masks: Sizes) -> tuple[NDArray[np.int64], ...]:
    """Length of each run in the order of the tokens, the first of its keys, and how many keys precede its first token."""
    n = np.concatenate([x.ravel() for x in causal])
    key = np.cumsum(n) - n
    length, before = n, np.zeros_like(n)
    if masks:
        m = np.concatenate([x.ravel() for x in masks])
        clean = slice(len(n) - len(m), None)
        length = np.concatenate([n, m])
        before = np.concatenate([before, n[clean] - m])
        key = np.concatenate([key, key[clean]])
    some = length > 0
    return length[some], key[some], before[some]
