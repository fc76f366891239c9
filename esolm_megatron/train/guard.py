"""Which batches a run leaves out: those that gave bad numbers, and those left out when it went back to a checkpoint.

A step that is refused changes nothing: weights, moments, moving average and the number of steps stay. Step s (from 0)
trains on the s-th batch of the stream that is not left out, so the list of batches left out is all that a resumed run needs
to take the same ones; batches already trained on keep their steps, because new entries always come after them.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esolm_megatron.config.sections import GuardConfig
from esolm_megatron.train.ending import write_json

RECORD, EVENTS, REPORT = "guard.json", "events.jsonl", "report.json"


def spike(value: float, before: Sequence[float], config: GuardConfig) -> float | None:
    """The threshold that `value` is above; None if it is below, or there is too little to judge by."""
    if config.spike_factor == 0 or len(before) < config.min_history:
        return None
    middle = statistics.median(before)
    deviation = 1.4826 * statistics.median(abs(x - middle) for x in before)
    threshold = middle + config.spike_factor * max(deviation, 0.01 * abs(middle))
    return threshold if value > threshold else None


@dataclass(frozen=True)
class Rollback:
    """A return from step `failed_at` to the checkpoint of step `target`."""

    failed_at: int
    target: int


class Guard:
    """Judges each step's numbers, equally on all ranks, and remembers what was left out. `write` on one rank only."""

    def __init__(self, config: GuardConfig, run_dir: Path, *, writes: bool):
        self.config, self.run_dir, self.writes = config, run_dir, writes
        self.losses: deque[float] = deque(maxlen=config.window)
        self.norms: deque[float] = deque(maxlen=config.window)
        self.skipped: set[int] = set()
        self.rollbacks: list[Rollback] = []
        self.bad_in_a_row: list[int] = []

    def problem(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step, or None."""
        for name, value, before in (("loss", loss, self.losses), ("gradient norm", norm, self.norms)):
            if not math.isfinite(value):
                return f"{name} is {value}"
            threshold = spike(value, before, self.config)
            if threshold is not None:
                return f"{name} is {value:.6g}, above {threshold:.6g}"
        return None

    def accept(self, loss: float, norm: float) -> None:
        """Note a step that was made."""
        self.losses.append(loss)
        self.norms.append(norm)
        self.bad_in_a_row = []

    def refuse(self, step: int, batch: int, batch_size: int, reason: str, loss: float, norm: float) -> None:
        """Leave out a batch. step: the step (from 1) that it would have made; batch: its number in the stream."""
        self.skipped.add(batch)
        self.bad_in_a_row.append(batch)
        self.event(
            "bad_batch",
            step=step,
            batch=batch,
            samples=[batch * batch_size, (batch + 1) * batch_size - 1],
            rows=[0, batch_size - 1],
            reason=reason,
            loss=str(loss),
            grad_norm=str(norm),
            bad_in_a_row=len(self.bad_in_a_row),
        )
        self._record()

    @property
    def must_roll_back(self) -> bool:
        """Whether so many batches in a row were bad that the weights are to blame."""
        return len(self.bad_in_a_row) >= self.config.rollback_after

    def target(self, step: int, saved: Sequence[int]) -> int | None:
        """The checkpoint to go back to from `step`, of those `saved`; None when the run must stop.

        The newest that is older than `step`; after a rollback that led nowhere, older than that one's.
        """
        if len(self.rollbacks) >= self.config.max_rollbacks or not saved:
            return None
        last = self.rollbacks[-1] if self.rollbacks else None
        limit = last.target if last is not None and step <= last.failed_at else step
        return max((s for s in saved if s < limit), default=min(saved))

    def roll_back(self, step: int, target: int) -> None:
        """Note the return to `target`, and leave out the bad batches and some before them."""
        first_bad, first_kept = self.bad_in_a_row[0], self.batch_of(target)
        more = range(max(first_kept, first_bad - self.config.rollback_skip_batches), self.bad_in_a_row[-1] + 1)
        self.skipped |= set(more)
        self.rollbacks.append(Rollback(step, target))
        self.bad_in_a_row = []
        self.event("rollback", step=step, target=target, skipped=[more.start, more.stop - 1])
        self._record()

    def give_up(self, step: int) -> str:
        """Write the report of a run that cannot go on, and return its one-line form."""
        text = (
            f"{len(self.bad_in_a_row)} bad batches in a row after step {step}, {len(self.rollbacks)} rollbacks: "
            f"no checkpoint left to go back to, or guard.max_rollbacks = {self.config.max_rollbacks} reached; lower optim.lr, "
            f"look at the batches in {EVENTS}, then raise guard.max_rollbacks to continue"
        )
        if self.writes:
            events = [json.loads(line) for line in (self.run_dir / EVENTS).read_text().splitlines()]
            tree = {"step": step, "what": text, "losses": list(self.losses)[-32:], "norms": list(self.norms)[-32:]}
            write_json(self.run_dir / REPORT, {**tree, **self._tree(), "events": events[-200:]})
        return text

    def batch_of(self, step: int) -> int:
        """The batch that step `step` (from 0) trains on."""
        return batches_done(step, self.skipped)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain numbers for its manifest."""
        return {**self._tree(), "losses": list(self.losses), "norms": list(self.norms)}

    def restore(self, step: int, state: dict[str, Any] | None, record: dict[str, Any] | None) -> None:
        """Go on at `step` with a checkpoint's state, and with the run folder's record, which may know more."""
        state, record = state or {}, record or {}
        self.losses = deque(state.get("losses", ()), self.config.window)
        self.norms = deque(state.get("norms", ()), self.config.window)
        self.skipped |= {*state.get("skipped", ()), *record.get("skipped", ())}
        known = max(state.get("rollbacks", []), record.get("rollbacks", []), key=len)
        self.rollbacks = [Rollback(*pair) for pair in known]
        self.bad_in_a_row = []
        self.skipped |= {b for b in self.config.skip_batches if b >= self.batch_of(step)}

    def read_record(self) -> dict[str, Any] | None:
        """What earlier processes of this run wrote down."""
        path = self.run_dir / RECORD
        return json.loads(path.read_text()) if path.exists() else None

    def event(self, what: str, **facts: Any) -> None:
        """A line of events.jsonl; unlike metrics, none is ever dropped."""
        if self.writes:
            with (self.run_dir / EVENTS).open("a") as file:
                file.write(json.dumps({"event": what, "time": round(time.time(), 3), **facts}) + "\n")

    def _tree(self) -> dict[str, Any]:
        return {"skipped": sorted(self.skipped), "rollbacks": [[r.failed_at, r.target] for r in self.rollbacks]}

    def _record(self) -> None:
        if self.writes:
            write_json(self.run_dir / RECORD, self._tree())


def batches_done(step: int, skipped: Iterable[int]) -> int:
    """Batches that are behind a run after `step` steps, those in `skipped` that it left out on the way included."""
    batch = step
    for left_out in sorted(skipped):
        if left_out > batch:
            break
        batch += 1
    return batch


def kept(batches: Iterator[Any], first: int, guard: Guard) -> Iterator[tuple[int, Any]]:
    """(number, batch) of those that are not left out. batches: numbered from `first`."""
    for number, batch in enumerate(batches, first):
        if number not in guard.skipped:
            yield number, batch
