"""Passes whose every number lies on the device, at a few fixed shapes, which a GPU records once as CUDA graphs and replays.

A pass over a few rows takes a GPU less time than the host needs to launch its kernels, so the host must do nothing but say
"again". All that a pass has to know is known before the first one: where each row stands in each of its passes. That lies on
the device, with the number of the pass that each row is at. A pass looks up what to feed, runs the network, draws, writes the
tokens back, and counts itself. The tokens of all rows are a rectangle, of which each side is rounded up to one of a few sizes:

    rows x width     fed tokens      row 0   x z z .        . writes to a spare slot, and sees nothing
                                     row 1   x z . .
                                     spare   . . . .        no row is at work there
    rows x masks     of these the head looks at; what is drawn for nothing goes to a spare place, or row

How long rows are, which they are, and how each is drawn, is data. A row that has no pass left feeds and fills nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esolm_megatron.model.cache import KVCache
from esolm_megatron.model.transformer import EsoLM

Choose = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits (M, V), rows (M,), places (M,)) -> (M,) int64 tokens to put there; the spare row and place may be among them."""
LOGITS_AT_ONCE = 2**28
RECORD_AT = 2
"""The pass of its size that is recorded; the one before it makes kernels and libraries ready."""
MOST_GRAPHS = 256
"""Sizes that are recorded; a server may meet more, and each keeps some memory."""


@dataclass(frozen=True)
class Size:
    """Rows, tokens and masks of each."""

    rows: int
    width: int
    masks: int

    @classmethod
    def around(cls, rows: int, width: int, masks: int, most_rows: int) -> Size:
        """The next larger size: rows a power of two, others too up to 8, halves of it between up to 32, then quarters."""
        return cls(min(_power_of_two(rows), most_rows), _rounded(width), _rounded(masks))


def sent(array: NDArray[np.int64], device: torch.device) -> Tensor:
    """`array` on the device, without waiting for what that has yet to do."""
    values = torch.from_numpy(array)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def _power_of_two(number: int) -> int:
    return 1 << (int(number) - 1).bit_length()


def _rounded(number: int) -> int:
    power = _power_of_two(number)
    step = power if number <= 8 else power // 4 if number <= 32 else power // 8
    return -(-int(number) // step) * step


def chosen(model: EsoLM, hidden: Tensor, rows: Tensor, places: Tensor, choose: Choose) -> Tensor:
    """Tokens (M,) for hidden states (M, H), some at a time: logits have a bound that knows nothing of batch and steps."""
    tokens, count = [], max(1, LOGITS_AT_ONCE // model.shape.vocab)
    for first in range(0, len(hidden), count):
        part = slice(first, first + count)
        tokens.append(choose(model.logits(hidden[part]), rows[part], places[part]))
    return torch.cat(tokens)  # nothing is written before all are chosen: they must not see one another


@dataclass
class Recorder:
    """Functions of what lies on the device: each is run until all is ready, then recorded as a CUDA graph, and replayed.

    record: make graphs; otherwise they run as they are. seconds: what recording took.
    """

    record: bool
    seconds: float = 0.0
    graphs: dict[object, torch.cuda.CUDAGraph] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._ready: Counter[object] = Counter()
        self._pool = torch.cuda.graph_pool_handle() if self.record else None

    def __call__(self, key: object, run: Callable[[], None]) -> None:
        """Run it; key: equal where the same operators work at the same places."""
        self._ready[key] += 1
        if key in self.graphs:
            self.graphs[key].replay()
        elif not self.record or self._ready[key] < RECORD_AT or len(self.graphs) == MOST_GRAPHS:
            run()
        else:
            begun = time.monotonic()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                run()
            self.graphs[key] = graph
            self.seconds += time.monotonic() - begun
            graph.replay()


@dataclass
class RecordedPasses:
    """Passes over rows that keep their own pace, filled in place.

    cache: one slot more than places. fed, order: (R + 1, L + 1) int64, see `Decoder`. ahead: 0 fills masks; 1 the place after
    each last token, as in autoregressive decoding. counts: passes of each size.
    """

    model: EsoLM
    cache: KVCache
    fed: Tensor
    order: Tensor
    recorder: Recorder
    ahead: int = 0
    counts: Counter[Size] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        rows, places = self.fed.shape
        self.bounds = self.fed.new_zeros(rows, places + 2)  # of each pass: places cached, known, and known after it
        self.pass_of = self.fed.new_zeros(rows)
        self.stored = self.fed.new_full((rows,), rows - 1)

    def plan(self, rows: NDArray[np.int64], bounds: NDArray[np.int64]) -> None:
        """Let rows (n,) start anew with these bounds (n, up to L + 3): a pass's three are those from its number on."""
        where = sent(rows, self.fed.device)
        last = np.repeat(bounds[:, -1:], self.bounds.shape[1] - bounds.shape[1], 1)
        self.bounds[where] = sent(np.concatenate([bounds, last], 1), self.fed.device)
        self.pass_of[where] = 0

    def at_work(self, rows: NDArray[np.int64]) -> None:
        """Say which rows (n,) take part from now on."""
        spare = np.full(len(self.stored) - len(rows), len(self.stored) - 1)
        self.stored.copy_(sent(np.concatenate([rows, spare]), self.fed.device))

    def __call__(self, size: Size, choose: Choose, kind: object = None) -> None:
        """One pass. kind: names what decides the operators of `choose`, whose work is recorded with the pass."""
        self.counts[size] += 1
        self.recorder((size, kind), lambda: self.run(size, choose))

    def run(self, size: Size, choose: Choose) -> None:
        """The pass itself: a function of integers on the device, without a look at them."""
        row = self.stored[: size.rows]
        number = self.pass_of[row]
        begin, known, end = (self.bounds[row, number + i][:, None] for i in range(3))
        if self.ahead:
            known, end = known - 1, known
        self.feed(size, row, begin, known, end, choose)
        self.pass_of[row] = (number + 1).clamp_(max=self.bounds.shape[1] - 3)

    def feed(self, size: Size, row: Tensor, begin: Tensor, known: Tensor, end: Tensor, choose: Choose | None) -> None:
        """Feed the places from `begin` on and fill those from `known` to `end`, (rows, 1) each, of rows (rows,)."""
        spare, device = self.fed.shape[1] - 1, self.fed.device
        slot = begin + torch.arange(size.width, device=device)
        inside = slot < end
        place = torch.where(inside, slot, spare)
        mask = known + torch.arange(size.masks, device=device)
        corner = torch.arange(0, size.rows * size.width, size.width, device=device)[:, None]
        looked_at = corner + (mask - begin).clamp_(0, size.width - 1)
        self.cache.begin_fixed(row.clamp(max=len(self.stored) - 2), place, inside, looked_at)
        ids = self.fed[row[:, None], place]
        if not self.ahead:
            ids = torch.where(slot < known, ids, self.model.shape.mask_id)
        positions = self.order[row[:, None], place]
        hidden = self.model(ids.view(-1), positions.view(-1), self.cache, last=self.cache.last, head=False)
        if choose is not None:
            filled = torch.where(mask < end, mask + self.ahead, spare).view(-1)
            rows = row[:, None].expand_as(mask).reshape(-1)
            self.fed[rows, filled] = chosen(self.model, hidden, rows, filled, choose)
