"""The training loop."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from esolm_megatron.checkpoint import Checkpoint, complete_steps, step_folder
from esolm_megatron.config import Config
from esolm_megatron.model.size import flops_per_step
from esolm_megatron.parallel import groups
from esolm_megatron.parallel.engine import Engine, Staged, StepResult
from esolm_megatron.parallel.replicas import accusations, compared
from esolm_megatron.terminal import Terminal
from esolm_megatron.train import course, preflight
from esolm_megatron.train.collate import CollateAhead, noising
from esolm_megatron.train.course import Leg
from esolm_megatron.train.ending import Ending, StopRequest, mark, mark_running
from esolm_megatron.train.feed import Feed
from esolm_megatron.train.guard import Guard
from esolm_megatron.train.lease import Lease
from esolm_megatron.train.metrics import Metrics, Stragglers, WallClock, peak_flops
from esolm_megatron.train.run_folder import prepare_run_folder, resume, set_aside
from esolm_megatron.train.saver import Saver
from esolm_megatron.train.schedule import learning_rate
from esolm_megatron.train.signals import Signals
from esolm_megatron.train.validation import Validation
from esolm_megatron.train.watchdog import Watchdog
from esolm_megatron.version import __version__


@dataclass(frozen=True)
class Outcome:
    """How a run ended, the step it reached, and the newest numbers. detail: what to know about an ending."""

    step: int
    ending: Ending
    detail: str
    loss: float | None
    validation_nelbo: float | None

    @property
    def finished(self) -> bool:
        """Whether the last step was made."""
        return self.ending == Ending.FINISHED


def train(config: Config) -> Outcome:
    """Train, or continue the run in config.run_dir from its newest whole checkpoint.

    Every process of the run calls this. SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 end it after the step, with a checkpoint.
    A process that hangs exits with Ending.HUNG.

    Raises:
        ConfigError: data, run folder or number of processes do not fit; before anything is written.
        UserError: another process writes this run.
    """
    config = preflight.resolve(config)
    preflight.refuse_other_run(config)
    stop, rank, legs = StopRequest(), int(os.environ.get("RANK", 0)), course.legs(config)
    lease = Lease(config.run_dir) if rank == 0 else nullcontext()
    with lease, Watchdog(config.watchdog, config.run_dir, rank) as watchdog:
        _, device = groups.start(config)
        try:
            step, outcome = groups.from_first_rank(max(complete_steps(config.run_dir), default=0), device), None
            while outcome is None:
                leg = next((leg for leg in legs if leg.holds(step)), legs[-1])
                step, outcome = _train_leg(config, leg, stop, watchdog)
        finally:
            groups.stop()
        if rank == 0:
            mark(config.run_dir, outcome.ending, outcome.step, outcome.detail)
        return outcome


def _train_leg(config: Config, leg: Leg, stop: StopRequest, watchdog: Watchdog) -> tuple[int, Outcome | None]:
    """Train until the run ends, or goes on in another leg; returns the steps that are done."""
    engine = Engine(leg.config)
    run = _Run(config, leg, engine, stop, watchdog)
    try:
        outcome = run.go()
        return run.step, outcome
    except Exception as error:
        if engine.is_first_rank and run.started:
            mark(config.run_dir, Ending.FAILED, run.step, f"{type(error).__name__}: {error}")
        raise
    finally:
        engine.release()


class _Run:
    """One process's part in a run."""

    def __init__(self, whole: Config, leg: Leg, engine: Engine, stop: StopRequest, watchdog: Watchdog):
        self.whole, self.leg, self.config = whole, leg, leg.config
        self.engine, self.stop, self.watchdog = engine, stop, watchdog
        self.clock = WallClock()
        self.stragglers = Stragglers(engine.topology.world_size)
        self.guard = Guard(whole.guard, whole.run_dir, writes=engine.is_first_rank)
        self.corruption: list[str] = []
        self.loss: float | None = None
        self.nelbo: float | None = None
        self.step, self.saved, self.started = 0, 0, False

    def go(self) -> Outcome | None:
        """The run, from its newest checkpoint to its end; None where it goes on in another leg."""
        config, engine = self.config, self.engine
        self.feed = Feed(config, engine, self.guard)
        self.watchdog.patience_s = self.feed.patience_s
        self.step = self.saved = resume(config, engine, self.feed)
        if not self.leg.holds(self.step):  # the newest checkpoint was damaged
            self.feed.close()
            return None
        self._restore_guard()
        if engine.is_first_rank:
            if jump := preflight.rate_jump(self.whole, self.step):
                Terminal(stderr=True, soft_wrap=True).print(f"warning: {jump}", highlight=False)
            prepare_run_folder(self.whole)
            mark_running(config.run_dir, self.step)
        self.started = True
        self.watchdog.run_starts()
        self.validation = Validation(config, engine) if config.evaluate.every_steps else None
        flops, peak = flops_per_step(config), peak_flops(config, engine.device) * engine.topology.world_size
        self.metrics = Metrics(config, self.step, active=engine.is_first_rank, flops_per_step=flops, peak=peak)
        self.clock.spent("start")
        noised = noising(config, engine)
        ended = (Ending.FINISHED, "") if self.step >= config.train.num_steps else None
        with Saver(config, engine) as self.saver:
            while ended is None and self.leg.holds(self.step):  # once more after each rollback
                first = self.guard.batch_of(self.step)
                with CollateAhead(self.feed, first, lambda batch, step: engine.stage(noised(batch, step))) as ahead:
                    ended = self._steps(ahead)
            with self.watchdog.slow("saving"):
                self.saver.drain()
        self.metrics.close()
        self.feed.close()
        if ended is None or (ended[0] == Ending.FINISHED and self.step < config.train.num_steps):
            return None
        return Outcome(self.step, *ended, self.loss, self.nelbo)

    def _steps(self, ahead: CollateAhead[Staged]) -> tuple[Ending, str] | None:
        """Steps until the run ends, or has gone back to a checkpoint (None)."""
        config, engine, guard, last = self.config, self.engine, self.guard, self.leg.until
        first = True
        while True:
            number, staged = ahead.next(self.step + 1)
            lr = learning_rate(self.step, config.optim, config.train.num_steps)
            result, refused = engine.try_step(staged, lr, partial(self._objection, number))
            told: Signals[np.ndarray] = Signals(*engine.table(self._signals(number)).T)
            self.feed.settle(number, told)
            if told.save_failed.any():
                self.saver.check()
            if corrupted := self._corrupted(told):
                return Ending.CORRUPTED, corrupted
            stopping = bool(told.stop_asked.any())
            if refused is not None:
                self.watchdog.step_done(self.step, None if first else self.clock.spent("skipped"))
                guard.refuse(
                    self.step + 1, number, config.train.global_batch_size, refused, result.loss, result.grad_norm
                )
                if guard.must_roll_back and not stopping:
                    return self._roll_back()
            else:
                self.step, self.loss = self.step + 1, result.loss
                guard.accept(result.loss, result.grad_norm)
                self.stragglers.add(told.busy_s)
                seconds = self.clock.spent("step" if self.step > self.metrics.reached else "repeated")
                self.watchdog.step_done(self.step, None if first else seconds)
                if first or self._due(config.train.log_every_steps):
                    self._log(result, lr, ahead, first=first)
                if self.validation is not None and self._due(config.evaluate.every_steps):
                    self._validate(self.validation)
                if first:
                    self.saver.reserve(engine.pieces())  # moments exist from the first step on
            if (refused is None and self._due(config.checkpoint.every_steps)) or (stopping and self.step > self.saved):
                self._save()
            if self.step == last:
                return Ending.FINISHED, ""
            if stopping:
                return Ending.STOPPED, "a signal asked for it"
            first = False

    def _due(self, every: int) -> bool:
        """Whether something that happens `every` steps, and after the last one of a leg, happens now."""
        return (every > 0 and self.step % every == 0) or self.step == self.leg.until

    def _signals(self, number: int) -> Signals[float]:
        """What this rank tells the others after the step that was made, or refused, from batch `number`."""
        return Signals(
            *self.engine.evidence,
            self.engine.work.seconds(),
            float(self.stop.signal is not None),
            float(self.saver.failed),
            float(self.feed.failed(number)),
            float(self.feed.blank_rows(number)),
        )

    def _log(self, result: StepResult, lr: float, ahead: CollateAhead[Staged], *, first: bool) -> None:
        config, next_batch = self.config, self.guard.batch_of(self.step)
        facts = {**self.stragglers.report(), **self.clock.shares(), "data_wait_s": round(ahead.waited, 4)}
        facts["drawn_ahead"] = ahead.drawn
        if first:
            facts["providers"] = self.engine.providers
            facts["started_from"] = config.start_from
            every = config.guard.checksum_every_steps
            facts["compared"] = compared(self.engine.topology, config.parallel.zero_stage, every)
        facts["sources"] = self.feed.counts(next_batch)
        if self.feed.corrupt_rows:
            facts["corrupt_rows"] = self.feed.corrupt_rows
        if self.guard.skipped:
            facts["skipped_batches"] = next_batch - self.step
        self.metrics.log(self.step, **vars(result), lr=lr, **facts)

    def _validate(self, validation: Validation) -> None:
        with self.watchdog.slow("validation"):
            self.nelbo = validation.nelbo()
        perplexity = float(np.exp(self.nelbo))
        self.metrics.log_validation(self.step, validation_nelbo=self.nelbo, validation_perplexity=perplexity)
        self.clock.spent("validation")

    def _save(self) -> None:
        """Start writing a checkpoint together; it appears whole or not at all, some steps later or when the saver drains.

        Raises:
            CheckpointError: on every rank, when the save before failed on any rank; older checkpoints stay.
        """
        numbers = {"loss": self.loss, "validation_nelbo": self.nelbo, "guard": self.guard.state()}
        numbers["optimizer_steps"] = self.engine.state.num_steps
        manifest = {
            "step": self.step,
            "config": self.config.model_dump(mode="json"),
            "topology": vars(self.engine.topology),
            "data_fingerprint": self.feed.facts,
            "versions": {"esolm_megatron": __version__, "torch": torch.__version__},
            "numbers": {**numbers, "corrupt_rows": self.feed.corrupt_rows},
        }
        with self.watchdog.slow("saving"):
            self.saver.save(self.step, self.engine.pieces(), manifest, self.engine.probe())
        self.saved = self.step
        self.clock.spent("saving")

    def _objection(self, number: int, loss: float, norm: float) -> str | None:
        """Why a step must not be made; asked on all ranks, after backward and before the update."""
        if (every := self.config.guard.checksum_every_steps) > 0 and (self.step + 1) % every == 0:
            self.corruption = self.engine.disagreements()
        if self.feed.failed(number):
            return "a batch that could not be read"
        return "corrupted weights" if self.corruption else self.guard.problem(loss, norm)

    def _corrupted(self, told: Signals[np.ndarray]) -> str:
        """Who holds other weights, or found another loss, than ranks that should agree with it; empty where all agree."""
        top, stage = self.engine.topology, self.config.parallel.zero_stage
        found = [*self.corruption, *accusations(told.loss, told.fingerprint, top, zero_stage=stage)]
        if not found:
            return ""
        self.guard.event("corrupted", step=self.step, found=found)
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        return f"{'; '.join(found[:3])}{more}; look at that rank's memory, and leave out its machine"

    def _restore_guard(self) -> None:
        """Make all ranks leave out the batches that this run has left out so far."""
        state = record = None
        if self.engine.is_first_rank:
            record = self.guard.read_record()
            if self.step:
                found = Checkpoint.open(step_folder(self.config.run_dir, self.step))
                state = found.manifest["numbers"].get("guard")
        state, record = self.engine.from_first_rank((state, record))
        self.guard.restore(self.step, state, record)

    def _roll_back(self) -> tuple[Ending, str] | None:
        """Go back to an earlier checkpoint; an ending where there is none left to go to."""
        config, engine, guard = self.config, self.engine, self.guard
        with self.watchdog.slow("saving"):
            self.saver.drain()
        saved = complete_steps(config.run_dir) if engine.is_first_rank else []
        target = engine.from_first_rank(guard.target(self.step, saved))
        if target is None:
            return Ending.BAD_NUMBERS, guard.give_up(self.step)
        with self.watchdog.slow("rollback"):
            guard.roll_back(self.step, target)
            if engine.is_first_rank:
                set_aside(config.run_dir, [s for s in saved if s > target], len(guard.rollbacks))
            found = Checkpoint.open(step_folder(config.run_dir, target), verify=engine.is_first_rank)
            engine.restore(found)
            self.feed.restore(found.manifest["numbers"])
            self.metrics.reached = max(self.metrics.reached, self.step)
            self.metrics.go_back(target)
            self.step = self.saved = target
            self._restore_guard()
        self.clock.spent("rollback")
        return None
