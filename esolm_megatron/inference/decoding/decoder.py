"""Passes through the KV cache over rows that each keep their own pace.

A row has a plan: how many places each of its passes fills. A pass feeds every row the tokens that its cache does not
hold yet, and the masks to fill now; nothing is fed for rows that are done, and no pass is empty for a row. Rows may
join and leave between passes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from esolm_megatron.inference.decoding.cuda_graphs import RecordedPasses, sent
from esolm_megatron.model.cache import KVCache
from esolm_megatron.model.products import FastProducts
from esolm_megatron.model.transformer import EsoLM

Choose = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits (M, V), rows (M,), places (M,)) -> (M,) int64 tokens to put there."""
LOGITS_AT_ONCE = 2**28
Filled = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Rows (M,) and places (M,) that a pass has filled."""


class Decoder:
    """Rows being filled in place, over a store of R rows of up to L places.

    fed: (R, L) int64 *in the generation order*. order: (R, L), positions. rows: ids of the rows at work, as they lie in
    the cache. known: (R,) places that hold tokens, from the first on; cached: (R,) those whose keys are kept.
    fixed_shapes: pad small passes to a few shapes (inference/decoding/cuda_graphs.py); on GPUs by default.
    """

    def __init__(self, model: EsoLM, fed: Tensor, order: Tensor, *, fixed_shapes: bool | None = None):
        num_rows, length = fed.shape
        self.model, self.fed, self.order = model, fed, order
        self.fixed_shapes = fed.is_cuda if fixed_shapes is None else fixed_shapes
        self.products = FastProducts(model)
        self.rows = np.empty(0, np.int64)
        self.known, self.cached, self.pass_of = (np.zeros(num_rows, np.int64) for _ in range(3))
        self.plan = np.zeros((num_rows, length + 1), np.int64)  # ended by a zero

    @cached_property
    def cache(self) -> KVCache:
        """Memory for all rows, taken when it is first needed."""
        num_rows, length = self.fed.shape
        return KVCache(self.model.shape, num_rows, length + 1, self.model.embedding.weight.dtype, self.fed.device)

    @cached_property
    def recorded(self) -> RecordedPasses | None:
        """Small passes at fixed shapes, where these are wanted."""
        if not self.fixed_shapes:
            return None
        mask_id = self.model.shape.mask_id
        return RecordedPasses(self.model, self.cache, self.fed, self.order, self.fed.is_cuda, mask_id)

    def add(self, row: int, ks: ArrayLike, num_given: int) -> bool:
        """Start a row whose first `num_given` places are known; False if nothing is left to fill.

        ks: places of each pass, together at most those that are left; empty passes are left out.
        """
        steps = np.asarray(ks, np.int64)
        steps = steps[steps > 0]
        self.plan[row, : len(steps)], self.plan[row, len(steps)] = steps, 0
        self.known[row], self.cached[row], self.pass_of[row] = num_given, 0, 0
        if len(steps):
            self.rows = np.append(self.rows, row)
        return len(steps) > 0

    def remove(self, row: int) -> None:
        """Take a row out; the last one in the cache moves to its place."""
        at, last = int(np.flatnonzero(self.rows == row)[0]), len(self.rows) - 1
        if at != last:
            self.cache.move(last, at, int(self.cached[self.rows[last]]))
            self.rows[at] = self.rows[last]
        self.rows = self.rows[:last]

    def step(self, choose: Choose) -> Filled:
        """One pass over all rows at work: `choose` fills the next places of each. Rows that are done are taken out."""
        rows, device = self.rows, self.fed.device
        begin, known = self.cached[rows], self.known[rows]
        masks = self.plan[rows, self.pass_of[rows]]
        counts = known - begin + masks
        inside = np.repeat(np.arange(len(rows)), counts)
        slots = np.arange(len(inside)) - np.repeat(np.cumsum(counts) - counts - begin, counts)
        at = np.flatnonzero(slots >= known[inside])
        filled = rows[inside[at]], slots[at]
        where = tuple(sent(x, device) for x in filled)
        logits = None if self.recorded is None else self.recorded(inside, slots, at, rows)
        if logits is None:
            with self.products:
                self.fed[where] = self._chosen(self._hidden(inside, slots, at), where, choose)
        else:
            self.fed[where] = choose(logits, *where)
        self.cached[rows] = known
        self.known[rows] += masks
        self.pass_of[rows] += 1
        for row in rows[self.plan[rows, self.pass_of[rows]] == 0]:
            self.remove(row)
        return filled

    def _hidden(self, inside: NDArray[np.int64], slots: NDArray[np.int64], at: NDArray[np.int64]) -> Tensor:
        """What the head wants (M, H) of the masks `at` (M,) among the tokens fed to rows `inside` (T,) at `slots` (T,)."""
        self.cache.begin_step(*(torch.from_numpy(x) for x in (inside, slots, at)))
        fed = torch.from_numpy(self.rows[inside]).to(self.fed.device), self.cache.slots
        tokens = self.fed[fed]
        tokens[self.cache.last.fed] = self.model.shape.mask_id
        return self.model(tokens, self.order[fed], self.cache, last=self.cache.last, head=False)

    def _chosen(self, hidden: Tensor, where: tuple[Tensor, ...], choose: Choose) -> Tensor:
        """Tokens (M,), chosen some at a time, so that logits have a bound that knows nothing of batch and steps."""
        tokens = []
        for part in torch.arange(len(hidden), device=hidden.device).split(
            max(1, LOGITS_AT_ONCE // self.model.shape.vocab)
        ):
            logits = self.model.logits(hidden if len(part) == len(hidden) else hidden[part])
            tokens.append(choose(logits, *(x[part] for x in where)))
        return torch.cat(tokens)  # nothing is written before all are chosen: they must not see one another


@torch.inference_mode()
def decode(model: EsoLM, fed: Tensor, order: Tensor, ks: ArrayLike, choose: Choose, *, num_given: int = 0) -> int:
    """Fill `fed` in place, pass by pass; returns the number of passes.

    fed: (B, L) int64 *in the generation order*; its first `num_given` places are known, the others are overwritten by
    what `choose` returns. order: (B, L). ks: (S,), or (B, S) for a plan of its own in each row, places per pass.
    """
    decoder, passes = Decoder(model, fed, order), 0
    for row, steps in enumerate(np.broadcast_to(ks, (len(fed), np.shape(ks)[-1]))):
        decoder.add(row, steps, num_given)
    while len(decoder.rows):
        decoder.step(choose)
        passes += 1
    return passes
