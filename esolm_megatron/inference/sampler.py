"""KV-cached sampling: plans, exact draws, and the log-probability of what was drawn.

`decoding/` has the parts: a plan says which places each pass fills, the decoder runs the network over the passes, and
`draw_tokens` picks tokens. Here they are put together, for all rows at once (`sample`) or for rows that come and go
(`Sampler`). Random numbers are keyed by (seed, row, place): the same sample comes from every split of the rows into
batches.

Shapes: B rows, L places, S passes, M masks of a pass, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from esolm_megatron.inference.decoding.cuda_graphs import sent
from esolm_megatron.inference.decoding.decoder import Decoder, decode
from esolm_megatron.inference.decoding.draw import DEFAULT, draw_tokens, fused_draw
from esolm_megatron.inference.decoding.scheduler import RowPlan, plan_rows
from esolm_megatron.inference.decoding.speculative import VerifiedPasses, spare_slots
from esolm_megatron.inference.request import Cache, SampleRequest
from esolm_megatron.model.transformer import EsoLM
from esolm_megatron.objective.likelihood import check_rows

Watch = Callable[[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]], None]
"""Called after each pass: (pass, rows (M,), positions (M,), tokens (M,)) of what it filled."""


class Samples(tuple[Tensor, Tensor]):
    """(tokens (B, L) int64, log_probs (B, L)), with how they were made.

    log_probs: log-probability of each drawn token under the untempered model (temperature, top_p and so on aside), given
    what its pass saw; 0 at prompt positions. A row's sum is the exact log p of the row under its order and schedule.
    order: (B, L) int64, the position generated k-th, the prompt's first. ks: places filled by each pass; with schedules
    of their own a list for each row, ended by zeros. num_forward_passes: passes through the network, each over a few
    places of every row. saved: (B,) int64, places that were not generated because the row's text had ended before them.
    recorded: shapes of passes that a GPU recorded for this call, and the seconds that it took.
    """

    order: Tensor
    ks: list[Any]
    num_forward_passes: int
    saved: Tensor
    recorded: tuple[int, float]

    def __new__(
        cls,
        tokens: Tensor,
        log_probs: Tensor,
        order: Tensor,
        ks: Sequence[Any],
        num_forward_passes: int | None = None,
        saved: Tensor | None = None,
        recorded: tuple[int, float] = (0, 0.0),
    ) -> Samples:
        """The two tensors as the tuple, the rest as attributes."""
        samples = super().__new__(cls, (tokens, log_probs))
        samples.order, samples.ks = order, list(ks)
        samples.num_forward_passes = len(samples.ks) if num_forward_passes is None else num_forward_passes
        samples.saved = torch.zeros(len(tokens), dtype=torch.int64) if saved is None else saved
        samples.recorded = recorded
        return samples

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self[0], self[1], self.order, self.ks, self.num_forward_passes, self.saved, self.recorded


class Filled(NamedTuple):
    """What a pass has made: rows (M,), positions (M,), tokens (M,), and the rows that are done now."""

    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    tokens: NDArray[np.int64]
    done: list[int]


@dataclass
class _Report:
    """What a pass has made, before the host has read it: `made` (M,) tokens may still be on their way.

    at_work: rows of the pass. known: (R,) places that held tokens after it. born: (R,) which texts the rows held.
    verified: rows at work by proposals; `told` (rows, 2 + most) says what became of them.
    """

    rows: NDArray[np.int64]
    places: NDArray[np.int64]
    made: Tensor
    at_work: NDArray[np.int64]
    left: NDArray[np.bool_]
    known: NDArray[np.int64]
    born: NDArray[np.int64]
    verified: NDArray[np.int64]
    told: Tensor
    ready: torch.cuda.Event | None = None
    found: bool = False
    """Whether any of `verified` was not yet done."""

    def read(self, ends: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens (M,), once they are there. Rows, places and what is known then tell of `verified` rows too. ends: (R,)."""
        if self.ready is not None:
            self.ready.synchronize()
        tokens, told = self.made.numpy(), self.told.numpy()
        before, after = told[:, 0], told[:, 1]
        each, own = np.arange(told.shape[1] - 2), before < after
        self.found = bool(own.any())
        new = each < (after - before)[:, None]
        self.rows = np.concatenate([self.rows, np.repeat(self.verified, new.sum(1))])
        self.places = np.concatenate([self.places, (before[:, None] + each)[new]])
        self.known[self.verified] = after
        self.at_work = np.concatenate([self.at_work, self.verified[own]])
        self.left = np.concatenate([self.left, (after < ends[self.verified])[own]])
        return np.concatenate([tokens, told[:, 2:][new]])


LATE = 4
"""Passes that a GPU has begun before the host reads what the first of them made."""


class Sampler:
    """Rows that are sampled together, each with its own length, order, pace and way of drawing; they come and go.

    `add` plans while `free` has rows, call `step` until a row is among those done, read its `result`, and `release` it. fed,
    log_probs: (R + 1, L + 1), in the generation order, the last row and place spare. saved: (R,) as in `Samples`. late: passes
    that are begun before the first of them is read. cache: see `SampleRequest`. most: tokens that a row may propose at once.
    places: memory of the cache, in places of all rows together; a row takes as many as its text has (`takes` says whether
    there are so many) and gives them back when it is released. By default each row has its own.
    """

    def __init__(
        self,
        model: EsoLM,
        num_rows: int,
        num_places: int,
        *,
        fixed_shapes: bool | None = None,
        late: int | None = None,
        cache: Cache = "full",
        most: int = 1,
        places: int | None = None,
    ):
        device = model.embedding.weight.device
        self.fed = torch.full((num_rows + 1, num_places + 1), model.shape.mask_id, device=device)
        self.order, self.raw = (torch.zeros_like(self.fed) for _ in range(2))
        self.log_probs = torch.zeros(self.fed.shape, dtype=_wide(model), device=device)
        self.kinds = torch.ones(num_rows + 1, 4, dtype=torch.float64, device=device)
        self.kernel = fused_draw(self.log_probs)
        self.mask_id, self.length = model.shape.mask_id, num_places
        fused, int8 = self.kernel is not None, cache == "int8"
        if most > 1 or places is not None:  # rows keep their places in the cache, which passes of both sorts share
            fixed_shapes = True
        self.decoder = Decoder(
            model,
            self.fed,
            self.order,
            fixed_shapes=fixed_shapes,
            record=fused,
            int8=int8,
            more_slots=spare_slots(most),
            places=places,
        )
        self.verified, self.most = VerifiedPasses(self.decoder, self.log_probs, self.kinds, most), most
        self.plans: dict[int, RowPlan] = {}
        self.free = list(range(num_rows))[::-1]
        self.saved, self.ended_at = np.zeros(num_rows, np.int64), np.full(num_rows, num_places)
        self.ends = self.ended_at.copy()
        self.born, self.reports = np.zeros(num_rows, np.int64), deque[_Report]()
        self.late = (LATE if device.type == "cuda" else 0) if late is None else late

    @property
    def lasting(self) -> bool:
        """Whether it has something that the next call need not make again: passes that a GPU has recorded."""
        return self.decoder.recorder.record

    @property
    def passes(self) -> int:
        """Passes so far."""
        return self.decoder.passes + self.verified.counted

    def serves(self, request: SampleRequest, most: int) -> bool:
        """Whether it is idle, and as large as a request needs, but not four times as large. most: that a row proposes."""
        rows, places, wanted = len(self.saved), self.length, (request.num_samples, request.length)
        fits = rows >= wanted[0] and places >= wanted[1] and rows * places <= 4 * wanted[0] * wanted[1]
        same = self.decoder.int8 == (request.cache == "int8") and self.most == most
        return fits and same and len(self.free) == rows

    @property
    def busy(self) -> bool:
        """Whether a row has passes left, or made some that nobody was told of."""
        return len(self.decoder.rows) > 0 or len(self.verified.rows) > 0 or len(self.reports) > 0

    def at_work(self, row: int) -> bool:
        """Whether `step` has yet to say that a row is done."""
        mine = (row in x.at_work and x.born[row] == self.born[row] for x in self.reports)
        passing = row in self.decoder.rows or row in self.verified.rows
        return passing or (self.saved[row] == 0 and any(mine))

    def takes(self, plan: RowPlan) -> bool:
        """Whether there is a row for it, and memory."""
        cache = self.decoder.cache
        return len(self.free) > 0 and cache.pages_for(self._slots_of(plan)) <= len(cache.free)

    def _slots_of(self, plan: RowPlan) -> int:
        proposed = 0 if plan.proposing is None else plan.proposing.most
        return len(plan.order) + proposed * self.most  # groups of masks are as wide as those of any row

    def add(self, plan: RowPlan) -> int:
        """Take a row in; returns its id."""
        return self.add_all([plan])[0]

    def add_all(self, plans: Sequence[RowPlan]) -> list[int]:
        """Take rows in at once; returns their ids.

        Raises:
            ValueError: a row proposes more tokens at once than this sampler has room for.
        """
        proposed = max((plan.proposing.most for plan in plans if plan.proposing is not None), default=1)
        if proposed > self.most:
            raise ValueError(f"propose = {proposed}: this sampler was made with most = {self.most}; make it with more")
        rows = [self.free.pop() for _ in plans]
        fed = np.full((len(rows), self.length + 1), self.mask_id)
        order, raw = np.zeros_like(fed), np.zeros_like(fed)
        for i, plan in enumerate(plans):
            fed[i, : len(plan.given)], order[i, : len(plan.order)], raw[i, : len(plan.raw)] = (
                plan.given, plan.order, plan.raw
            )  # fmt: skip
        where = sent(np.array(rows), self.fed.device)
        for store, values in ((self.fed, fed), (self.order, order), (self.raw, raw)):
            store[where] = sent(values, self.fed.device)
        self.log_probs[where] = 0
        draws = [plan.draw for plan in plans]
        kinds = [[x.temperature, x.top_p, x.top_k, x.repetition_penalty] for x in draws]
        self.kinds[where] = torch.tensor(kinds, dtype=torch.float64).to(self.fed.device)
        self.saved[rows], self.ended_at[rows] = 0, self.length
        self.born[rows] += 1
        for row, plan in zip(rows, plans, strict=True):
            self.plans[row], self.ends[row] = plan, len(plan.order)
            self.decoder.cache.take(row, self._slots_of(plan))
            count = len(plan.given)
            prompt = plan.given.tobytes(), plan.order[:count].tobytes()
            if plan.proposing is None:
                self.decoder.add(row, plan.ks, count, prompt)
            else:
                filtered = plan.draw.top_k > 0 or plan.draw.top_p < 1
                self.verified.add(row, len(plan.order), count, plan.proposing, prompt=prompt, filtered=filtered)
        return rows

    def release(self, row: int) -> None:
        """Let another row have this one's memory; a row that is not done is given up."""
        self._take_out(row)
        del self.plans[row]
        self.decoder.cache.give(row)
        self.born[row] += 1
        self.free.append(row)

    def _take_out(self, row: int) -> None:
        for passes in (self.decoder, self.verified):
            if row in passes.rows:
                passes.remove(row)

    def result(self, row: int) -> tuple[Tensor, Tensor]:
        """Tokens (L,) and log-probabilities (L,) of a row, by position."""
        length = len(self.plans[row].order)
        order = self.order[row, :length]
        return tuple(_by_position(x[row, :length], order) for x in (self.fed, self.log_probs))  # type: ignore[return-value]

    def step(self, watched: bool = True) -> Filled | None:
        """One pass over all rows, if any has one left, and what the oldest pass made that is to be told; None for none yet.

        Without `watched`, and where no row can stop early, nothing is read back or told.
        """
        before, verified = self.decoder.rows.copy(), self.verified.rows.copy()
        rows = places = np.empty(0, np.int64)
        told = self.fed.new_empty(0, 2 + self.most)
        if len(before):
            penalised = any(self.plans[row].draw.repetition_penalty != 1 for row in before.tolist())
            rows, places = self.decoder.step(self._choose, penalised)
        if len(verified):
            told = self.verified.step(exact=self.late == 0)
        stopping = any(self.plans[row].stop_id is not None for row in before.tolist())
        if len(verified) or (len(before) and (watched or stopping)):
            made = self.fed[sent(rows, self.fed.device), sent(places, self.fed.device)]
            left = np.isin(before, self.decoder.rows)
            known = self.decoder.known.copy()
            report = _Report(rows, places, made, before, left, known, self.born.copy(), verified, told)
            if made.is_cuda:
                report.made, report.told = (_on_its_way(x) for x in (made, told))
                report.ready = torch.cuda.Event()
                report.ready.record()
            self.reports.append(report)
        resting = not len(self.decoder.rows) and not len(self.verified.rows)
        if self.reports and (len(self.reports) > self.late or resting):
            return self._told(self.reports.popleft())
        return None

    def _told(self, report: _Report) -> Filled:
        """What a pass made of texts that are still there, and not yet over; a text that has ended is taken out."""
        tokens = report.read(self.ends)
        self.verified.counted += report.found
        here = (report.born == self.born) & (self.saved == 0)
        mine = here[report.rows]
        rows, places, tokens = report.rows[mine], report.places[mine], tokens[mine]
        found = zip(rows.tolist(), places.tolist(), strict=True)
        positions = np.fromiter((self.plans[row].order[place] for row, place in found), np.int64, len(rows))
        ended = self.ended(rows, positions, tokens, report.known)
        over = report.at_work[here[report.at_work] & ~report.left].tolist()
        for row in {*ended, *over}:
            self._take_out(row)
        return Filled(rows, positions, tokens, [*over, *(row for row in ended if row not in over)])

    def _choose(self, logits: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        draws = {row: plan.draw for row, plan in self.plans.items()}
        kinds = list(dict.fromkeys(draws[row] for row in self.decoder.rows.tolist()))
        if self.kernel is not None:
            held = self.fed[rows, :-1] if any(kind.repetition_penalty != 1 for kind in kinds) else None
            tokens, self.log_probs[rows, places] = self.kernel(logits, self.raw[rows, places], rows, self.kinds, held)
            return tokens
        tokens = torch.empty_like(places)
        for kind in kinds:
            mine = slice(None)
            if len(kinds) > 1:
                own = [draws.get(row, DEFAULT) == kind for row in rows.tolist()]
                mine = torch.tensor(own, device=rows.device).nonzero()[:, 0]
            at = rows[mine], places[mine]
            held = self.fed[at[0], :-1] if kind.repetition_penalty != 1 else None
            tokens[mine], self.log_probs[at] = draw_tokens(logits[mine], self.raw[at], kind, held)
        return tokens

    def ended(
        self,
        rows: NDArray[np.int64],
        positions: NDArray[np.int64],
        tokens: NDArray[np.int64],
        known: NDArray[np.int64],
    ) -> list[int]:
        """The rows with places left whose places before the first end-of-text are all filled: the others are cut off.

        rows, positions, tokens: (M,), what a pass has filled. known: (R,) places that hold tokens. The places left get
        end-of-text.
        """
        found: list[int] = []
        if all(plan.stop_id is None for plan in self.plans.values()):
            return found
        stop_ids = np.array([self.plans[row].stop_id if self.plans[row].stop_id is not None else -1 for row in rows])
        ends = tokens == stop_ids
        np.minimum.at(self.ended_at, rows[ends], positions[ends])
        for row in {row for row in rows.tolist() if self.ended_at[row] < self.length}:
            plan = self.plans[row]
            left = plan.order[known[row] :]
            if len(left) and (left > self.ended_at[row]).all():
                assert plan.stop_id is not None
                self.fed[row, known[row] : len(plan.order)] = plan.stop_id
                self.log_probs[row, known[row] :] = 0
                self.saved[row] = len(left)
                found.append(row)
        return found


def sample(model: EsoLM, num_samples: int, length: int, *, watch: Watch | None = None, **fields: Any) -> Samples:
    """`sample_rows` of a request with these fields."""
    return sample_rows(model, SampleRequest(num_samples, length, **fields), watch)


@torch.inference_mode()
def sample_rows(
    model: EsoLM, request: SampleRequest, watch: Watch | None = None, kept: list[Sampler] | None = None
) -> Samples:
    """Sequences drawn from the model, with their log-probabilities, on the model's device. watch: called after each pass.

    kept: a sampler of an earlier call, which is used where it fits, and makes room for this call's.

    Raises:
        ValueError: a field out of its range, said with the fix; or logits that are not numbers.
    """
    plans = plan_rows(request, model.shape.mask_id)
    kept = [] if kept is None else kept
    sampler = kept.pop() if kept else None  # another thread that samples meanwhile makes its own
    most = max((plan.proposing.most for plan in plans if plan.proposing is not None), default=1)
    if sampler is None or not sampler.serves(request, most):
        sampler = Sampler(model, request.num_samples, request.length, cache=request.cache, most=most)
    made, (shapes, seconds), count = sampler.passes, sampler.decoder.recording, 0
    taken = sampler.add_all(plans)
    fed, log_probs = (x[: len(taken), : request.length] for x in (sampler.fed, sampler.log_probs))
    while sampler.busy:
        filled = sampler.step(watched=watch is not None)
        if watch is not None and filled is not None and len(filled.rows):
            watch(count, *filled[:3])
            count += 1
    if not bool(log_probs.isfinite().all()):
        raise ValueError("the model's logits are not finite numbers: check its weights, or load it in a wider dtype")
    order_BL = torch.from_numpy(np.stack([plan.order for plan in plans])).to(sampler.order.device)
    ks: list[Any] = of_one_length([plan.ks for plan in plans]) if request.own_schedules else plans[0].ks
    saved, more = torch.from_numpy(sampler.saved[: len(taken)].copy()), sampler.decoder.recording
    tokens, log_probs = _by_position(fed, order_BL), _by_position(log_probs, order_BL)
    for row in reversed(taken):  # the next call's rows are 0, 1, ... again
        sampler.release(row)
    if sampler.lasting:
        kept[:] = [sampler]
    return Samples(tokens, log_probs, order_BL, ks, sampler.passes - made, saved, (more[0] - shapes, more[1] - seconds))


def of_one_length(schedules: list[list[int]]) -> list[list[int]]:
    """The schedules of several rows, shorter ones ended by zeros."""
    most = max(map(len, schedules))
    return [ks + [0] * (most - len(ks)) for ks in schedules]


def _on_its_way(x: Tensor) -> Tensor:
    """A copy in the host's memory, which is there once the device comes to it."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _wide(model: EsoLM) -> torch.dtype:
    return torch.float64 if model.embedding.weight.dtype == torch.float64 else torch.float32


def _by_position(in_order: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(in_order).scatter_(-1, order, in_order)


def schedule_log_probs(model: EsoLM, tokens: Tensor, order: Tensor, ks: ArrayLike, *, num_given: int = 0) -> Tensor:
    """Log-probability (B, L) of each given token if it were drawn in this order with this schedule; no gradients.

    tokens, order: (B, L) int64. ks: (S,) or (B, S), places filled by each step, the first `num_given` of the order
    excepted, which are a prompt: known from the start, log-probability 0.

    Raises:
        ValueError: shapes differ, a row of `order` is no permutation, a token is outside the vocabulary, or the steps
            do not add up to the places.
    """
    check_rows(tokens, order, model.shape.mask_id)
    wanted, found = tokens.shape[1] - num_given, np.unique(np.sum(ks, axis=-1))
    if not np.array_equal(found, [wanted]) or np.min(ks, initial=0) < 0:
        raise ValueError(
            f"ks: steps fill {', '.join(map(str, found))} places; they must be at least 0 each and fill the {wanted} places "
            f"that {num_given} given ones leave of {tokens.shape[1]}"
        )
    in_order = tokens.gather(1, order)
    spare = F.pad(in_order, (0, 1, 0, 1))
    log_probs = torch.zeros(spare.shape, dtype=_wide(model), device=tokens.device)

    def choose(logits: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        chosen = spare[rows, places]
        log_probs[rows, places] = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(-1)
        return chosen

    decode(model, in_order.clone(), order, ks, choose, num_given=num_given)
    return _by_position(log_probs[:-1, :-1], order)


def schedule_log_likelihood(
    model: EsoLM, tokens: Tensor, order: Tensor, ks: ArrayLike, *, num_given: int = 0
) -> Tensor:
    """log p(tokens | order, schedule) of each row, exact, through the cached path: (B,). See `schedule_log_probs`."""
    return schedule_log_probs(model, tokens, order, ks, num_given=num_given).sum(1)


@torch.inference_mode()
def loss_of_cache(model: EsoLM, samples: Samples, num_given: int = 0) -> float:
    """Nats a drawn token that sampling with `cache="int8"` costs: the mean of log p with that cache - log p without.

    It estimates the KL divergence of what was drawn from the model's own distribution, if tokens were drawn untempered.
    num_given: tokens of the prompt. The first 16 texts are judged.
    """
    tokens, log_probs, order, saved = (x[:16] for x in (*samples, samples.order, samples.saved))
    ks = samples.ks[:16] if np.ndim(samples.ks) == 2 else samples.ks
    lost = (log_probs - schedule_log_probs(model, tokens, order, ks, num_given=num_given)).gather(1, order)
    made = torch.arange(lost.shape[1]) < lost.shape[1] - saved[:, None]
    made[:, :num_given] = False
    return float(lost[made.to(lost.device)].double().mean())
