"""Passes through the KV cache over rows that each keep their own pace.

A row has a plan: how many places each of its passes fills. A pass feeds every row the tokens that its cache does not
hold yet, and the masks to fill now; nothing is fed for rows that are done, and no pass is empty for a row. Rows may
join and leave between passes.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from esolm_megatron.inference.decoding.cuda_graphs import Choose, RecordedPasses, Recorder, Size, chosen, sent
from esolm_megatron.model.cache import KVCache
from esolm_megatron.model.products import FastProducts
from esolm_megatron.model.transformer import EsoLM

SHORT = 32
"""Tokens of a prompt up to which it is fed with its row's first masks, at fixed shapes."""
CHUNK = 512
"""Tokens of a longer prompt that are fed at once."""
FED_AT_ONCE = 2**15
Filled = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Rows (M,) and places (M,) that a pass has filled."""


class Decoder:
    """Rows being filled in place, over a store of R rows of up to L places.

    fed: (R + 1, L + 1) int64 *in the generation order*; the last row and place are spare, for what is computed for nothing.
    order: (R + 1, L + 1), positions. rows: ids of the rows at work; as they lie in the cache, without fixed shapes. known:
    (R,) places that hold tokens, from the first on; cached: (R,) those whose keys are kept. passes: how many there were.
    fixed_shapes: run passes at a few shapes, of numbers on the device (inference/decoding/cuda_graphs.py); on GPUs by
    default. record: such passes may be recorded, as `choose` asks nothing of the host. int8: keep keys and values in 8 bits.
    more_slots: of each row of the cache, beside its places. places: of all rows of the cache, which then has pages.
    """

    def __init__(
        self,
        model: EsoLM,
        fed: Tensor,
        order: Tensor,
        *,
        fixed_shapes: bool | None = None,
        record: bool = False,
        int8: bool = False,
        more_slots: int = 0,
        places: int | None = None,
    ):
        num_rows, length = (n - 1 for n in fed.shape)
        self.model, self.fed, self.order, self.int8, self.more_slots = model, fed, order, int8, more_slots
        self.places = places
        self.fixed_shapes = fed.is_cuda if fixed_shapes is None else fixed_shapes
        self.recorder = Recorder(record and fed.is_cuda)
        self.products = FastProducts(model)
        self.rows, self.passes, self.fresh = np.empty(0, np.int64), 0, list[int]()
        self.prompts: dict[int, Hashable] = {}
        self.known, self.cached, self.pass_of = (np.zeros(num_rows, np.int64) for _ in range(3))
        self.plan = np.zeros((num_rows, length + 1), np.int64)  # ended by a zero

    @cached_property
    def cache(self) -> KVCache:
        """Memory for all rows, taken when it is first needed."""
        num_rows, length = (n - 1 for n in self.fed.shape)
        dtype, size = self.model.embedding.weight.dtype, self.model.linears.tensor_size
        slots = length + 1 + self.more_slots
        return KVCache(
            self.model.shape,
            num_rows,
            slots,
            dtype,
            self.fed.device,
            tensor_size=size,
            int8=self.int8,
            places=self.places,
        )

    @cached_property
    def recorded(self) -> RecordedPasses:
        """The passes at fixed shapes."""
        return RecordedPasses(self.model, self.cache, self.fed, self.order, self.recorder)

    @property
    def recording(self) -> tuple[int, float]:
        """Shapes of passes that were recorded, and the seconds that it took."""
        return len(self.recorder.graphs), self.recorder.seconds

    def add(self, row: int, ks: ArrayLike, num_given: int, prompt: Hashable = None) -> bool:
        """Start a row whose first `num_given` places are known; False if nothing is left to fill.

        ks: places of each pass, together at most those that are left; empty passes are left out. prompt: equal for rows
        whose given places hold equal tokens at equal positions.
        """
        self.prompts[row] = prompt
        steps = np.asarray(ks, np.int64)
        steps = steps[steps > 0]
        self.plan[row, : len(steps)], self.plan[row, len(steps)] = steps, 0
        self.known[row], self.cached[row], self.pass_of[row] = num_given, 0, 0
        if len(steps):
            self.rows = np.append(self.rows, row)
            self.fresh.append(row)
        return len(steps) > 0

    def remove(self, row: int) -> None:
        """Take a row out; without fixed shapes the last one in the cache moves to its place."""
        at, last = int(np.flatnonzero(self.rows == row)[0]), len(self.rows) - 1
        if at != last:
            if not self.fixed_shapes:
                self.cache.move(last, at, int(self.cached[self.rows[last]]))
            self.rows[at] = self.rows[last]
        self.rows = self.rows[:last]
        self.fresh = [x for x in self.fresh if x != row]
        if self.fixed_shapes:
            self.recorded.at_work(self.rows)

    def step(self, choose: Choose, kind: object = None) -> Filled:
        """One pass over all rows at work: `choose` fills the next places of each. Rows that are done are taken out.

        kind: see `RecordedPasses`.
        """
        rows = self.rows.copy()
        known, masks = self.known[rows], self.plan[rows, self.pass_of[rows]]
        if self.fixed_shapes:
            self._begin_fresh()
            width = (known + masks - self.cached[rows]).max()
            self.recorded(Size.around(len(rows), width, masks.max(), len(self.known)), choose, kind)
        else:
            self._packed(rows, self.cached[rows], known, masks, choose)
        self.cached[rows] = known
        self.known[rows] += masks
        self.pass_of[rows] += 1
        self.passes += 1
        over = self.plan[rows, self.pass_of[rows]] == 0
        if over.all():
            self.rows = self.rows[:0]
        else:
            for row in rows[over]:
                self.remove(row)
        first = np.cumsum(masks) - masks
        return np.repeat(rows, masks), np.arange(masks.sum()) + np.repeat(known - first, masks)

    def _begin_fresh(self) -> None:
        """Send the plans of rows that have come, at once."""
        if not self.fresh:
            return
        rows = np.array(self.fresh)
        self.fresh = []
        self.prefill(rows[self.known[rows] > SHORT])
        steps = self.plan[rows, : int((self.plan[rows] > 0).sum(1).max())]
        known = self.known[rows][:, None]
        bounds = np.concatenate([self.cached[rows][:, None], known, known + np.cumsum(steps, 1)], 1)
        self.recorded.plan(rows, bounds)
        self.recorded.at_work(self.rows)

    def prefill(self, rows: NDArray[np.int64]) -> None:
        """Feed the prompts of rows by themselves, in chunks, each prompt once: other rows get a copy of its keys."""
        first: dict[Hashable, int] = {}
        for row in rows.tolist():
            prompt = self.prompts[row]
            first.setdefault(row if prompt is None else prompt, row)
        for some in np.array_split(
            np.array(list(first.values()), np.int64), -(-len(first) * CHUNK // FED_AT_ONCE) or 1
        ):
            own = sent(some, self.fed.device)
            for at in range(0, int(self.known[some].max(initial=0)), CHUNK):
                begin, end = (np.minimum(x, self.known[some])[:, None] for x in (at, at + CHUNK))
                size = Size.around(1, (end - begin).max(), 1, 1)
                ends = sent(end, self.fed.device)
                self.recorded.feed(Size(len(some), size.width, 1), own, sent(begin, self.fed.device), ends, ends, None)
        for row in set(rows.tolist()) - set(first.values()):
            self.cache.move(first[self.prompts[row]], row, int(self.known[row]))
        self.cached[rows] = self.known[rows]

    def _packed(
        self,
        rows: NDArray[np.int64],
        begin: NDArray[np.int64],
        known: NDArray[np.int64],
        masks: NDArray[np.int64],
        choose: Choose,
    ) -> None:
        """The pass without padding: what rows are fed lies end to end."""
        counts = known - begin + masks
        inside = np.repeat(np.arange(len(rows)), counts)
        slots = np.arange(len(inside)) - np.repeat(np.cumsum(counts) - counts - begin, counts)
        at = np.flatnonzero(slots >= known[inside])
        where = sent(rows[inside[at]], self.fed.device), sent(slots[at], self.fed.device)
        with self.products:
            hidden = self._hidden(inside, slots, at)
            self.fed[where] = chosen(self.model, hidden, *where, choose)

    def _hidden(self, inside: NDArray[np.int64], slots: NDArray[np.int64], at: NDArray[np.int64]) -> Tensor:
        """What the head wants (M, H) of the masks `at` (M,) among the tokens fed to rows `inside` (T,) at `slots` (T,)."""
        self.cache.begin_step(*(torch.from_numpy(x) for x in (inside, slots, at)))
        fed = torch.from_numpy(self.rows[inside]).to(self.fed.device), self.cache.slots
        tokens = self.fed[fed]
        tokens[self.cache.last.fed] = self.model.shape.mask_id
        return self.model(tokens, self.order[fed], self.cache, last=self.cache.last, head=False)


@torch.inference_mode()
def decode(model: EsoLM, fed: Tensor, order: Tensor, ks: ArrayLike, choose: Choose, *, num_given: int = 0) -> int:
    """Fill `fed` in place, pass by pass; returns the number of passes.

    fed: (B, L) int64 *in the generation order*; its first `num_given` places are known, the others are overwritten by
    what `choose` returns; on GPUs it is also asked about a spare row B and place L. order: (B, L).
    ks: (S,), or (B, S) for a plan of its own in each row, places per pass.
    """
    room = F.pad(fed, (0, 1, 0, 1))
    decoder = Decoder(model, room, F.pad(order, (0, 1, 0, 1)))
    for row, steps in enumerate(np.broadcast_to(ks, (len(fed), np.shape(ks)[-1]))):
        decoder.add(row, steps, num_given)
    while len(decoder.rows):
        decoder.step(choose)
    fed.copy_(room[:-1, :-1])
    return decoder.passes
