"""The training loop."""

from __future__ import annotations

import math
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esolm_megatron.checkpoint import Checkpoint, CheckpointError
from esolm_megatron.checkpoint import folder as checkpoint
from esolm_megatron.config import Config, ConfigError, dump
from esolm_megatron.data.shards.shard_cache import open_folder
from esolm_megatron.data.stream import Batch
from esolm_megatron.data.stream.mixture import sources_of
from esolm_megatron.model.size import CAPACITY_MULTIPLE, flops_per_step, mask_capacity
from esolm_megatron.objective.esolm import Noised, document_numbers, draw_step, draw_validation, mean_loss
from esolm_megatron.parallel.engine import Engine, Staged, StepResult
from esolm_megatron.parallel.replicas import accusations, compared
from esolm_megatron.train import preflight
from esolm_megatron.train.collate import Ahead
from esolm_megatron.train.ending import Ending, mark, mark_running
from esolm_megatron.train.feed import Feed, ValidationFeed
from esolm_megatron.train.guard import Guard, batches_done
from esolm_megatron.train.metrics import Metrics, Stragglers, WallClock, peak_flops
from esolm_megatron.train.saver import Saver
from esolm_megatron.train.schedule import learning_rate
from esolm_megatron.train.watchdog import Watchdog
from esolm_megatron.version import __version__


class StopRequest:
    """Remembers that a signal asked the run to stop; a second one ends the process at once.

    Not so in a job of SLURM, which sends its signals twice and kills what does not end in time.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self.signal is not None and "SLURM_JOB_ID" not in os.environ:
            os._exit(128 + number)
        self.signal = number


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


def due(step: int, every: int) -> bool:
    """Whether something that happens `every` steps happens after `step` steps."""
    return every > 0 and step % every == 0


def train(config: Config) -> Outcome:
    """Train, or continue the run in config.run_dir from its newest whole checkpoint.

    Every process of the run calls this. SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 end it after the step, with a checkpoint.
    A process that hangs exits with Ending.HUNG.

    Raises:
        ConfigError: data, run folder or number of processes do not fit; before anything is written.
    """
    config = preflight.resolve(config)
    preflight.refuse_other_run(config)
    stop = StopRequest()
    with Watchdog(config.watchdog, config.run_dir, int(os.environ.get("RANK", 0))) as watchdog:
        engine = Engine(config)
        run = _Run(config, engine, stop, watchdog)
        try:
            outcome = run.go()
        except Exception as error:
            if engine.is_first_rank and run.started:
                mark(config.run_dir, Ending.FAILED, run.step, f"{type(error).__name__}: {error}")
            raise
        finally:
            engine.close()
        if engine.is_first_rank:
            mark(config.run_dir, outcome.ending, outcome.step, outcome.detail)
        return outcome


class _Run:
    """One process's part in a run."""

    def __init__(self, config: Config, engine: Engine, stop: StopRequest, watchdog: Watchdog):
        self.config, self.engine, self.stop, self.watchdog = config, engine, stop, watchdog
        self.clock = WallClock()
        self.stragglers = Stragglers(engine.topology.world_size)
        self.guard = Guard(config.guard, config.run_dir, writes=engine.is_first_rank)
        self.corruption: list[str] = []
        self.loss: float | None = None
        self.nelbo: float | None = None
        self.step, self.saved, self.started = 0, 0, False

    def go(self) -> Outcome:
        """The run, from its newest checkpoint to its end."""
        config, engine, t = self.config, self.engine, self.config.train
        noised_by = _noising(config, engine)
        self.feed = Feed(config, engine, self.guard)
        self.watchdog.patience_s = self.feed.patience_s
        self.step = self.saved = resume(config, engine, self.feed)
        self._restore_guard()
        if engine.is_first_rank:
            prepare_run_folder(config)
            mark_running(config.run_dir, self.step)
        self.started = True
        self.watchdog.run_starts()
        self.validation = Validation(config, engine) if config.evaluate.every_steps else None
        self.metrics = Metrics(
            config,
            self.step,
            active=engine.is_first_rank,
            flops_per_step=flops_per_step(config),
            peak=peak_flops(config, engine.device) * engine.topology.world_size,
        )
        self.clock.spent("start")
        ending, detail = Ending.FINISHED if self.step >= t.num_steps else None, ""
        with Saver(config, engine) as self.saver:
            while ending is None:  # once more after each rollback
                first = self.guard.batch_of(self.step)
                with Ahead(self.feed, first, lambda batch, step: engine.stage(noised_by(batch, step))) as ahead:
                    ending, detail = self._train_on(ahead)
            with self.watchdog.slow("saving"):
                self.saver.drain()
        self.metrics.close()
        self.feed.close()
        return Outcome(self.step, ending, detail, self.loss, self.nelbo)

    def _train_on(self, ahead: Ahead[Staged]) -> tuple[Ending | None, str]:
        """Steps until the run ends, or goes back to a checkpoint (None)."""
        config, engine, guard, t = self.config, self.engine, self.guard, self.config.train
        fresh = True
        while True:
            number, staged = ahead.next(self.step + 1)
            lr = learning_rate(self.step, config.optim, t.num_steps)
            result, problem = engine.try_step(staged, lr, partial(self._objection, number))
            flags = [float(self.stop.signal is not None), float(self.saver.failed)]
            table = engine.table([*engine.evidence, engine.work.seconds(), *flags, *self.feed.flags(number)])
            self.feed.settle(number, table[:, 5:])
            stopping = bool(table[:, 3].any())
            if table[:, 4].any():
                self.saver.check()
            corrupted = self._corrupted(table[:, 0], table[:, 1])
            if corrupted:
                return Ending.CORRUPTED, corrupted
            if problem is not None:
                self.watchdog.step_done(self.step, None if fresh else self.clock.spent("skipped"))
                guard.refuse(self.step + 1, number, t.global_batch_size, problem, result.loss, result.grad_norm)
                if guard.must_roll_back and not stopping:
                    return self._roll_back()
            else:
                self.step, self.loss = self.step + 1, result.loss
                guard.accept(result.loss, result.grad_norm)
                self.stragglers.add(table[:, 2])
                seconds = self.clock.spent("step" if self.step > self.metrics.reached else "repeated")
                self.watchdog.step_done(self.step, None if fresh else seconds)
                self._report(result, lr, ahead, first=fresh)
                if fresh:
                    self.saver.reserve(engine.pieces())  # moments exist from the first step on
            fresh = False
            self._save_if_due(stopping, new_step=problem is None)
            if self.step == t.num_steps:
                return Ending.FINISHED, ""
            if stopping:
                return Ending.STOPPED, "a signal asked for it"

    def _report(self, result: StepResult, lr: float, ahead: Ahead[Staged], *, first: bool) -> None:
        config, step = self.config, self.step
        if due(step, config.train.log_every_steps) or step == config.train.num_steps or first:
            facts = {**self.stragglers.report(), **self.clock.shares(), "data_wait_s": round(ahead.waited, 4)}
            facts["drawn_ahead"] = ahead.drawn
            if first:
                facts["attention"] = self.engine.kernels
                p, every = config.parallel, config.guard.checksum_every_steps
                facts["compared"] = compared(self.engine.topology, p.zero_stage, every)
            facts["sources"] = self.feed.counts(self.guard.batch_of(step))
            if self.feed.corrupt_rows:
                facts["corrupt_rows"] = self.feed.corrupt_rows
            if self.guard.skipped:
                facts["skipped_batches"] = self.guard.batch_of(step) - step
            self.metrics.log(step, **vars(result), lr=lr, **facts)
        if self.validation is None:
            return
        if due(step, config.evaluate.every_steps) or step == config.train.num_steps:
            with self.watchdog.slow("validation"):
                self.nelbo = self.validation.nelbo()
            self.metrics.log_validation(
                step, validation_nelbo=self.nelbo, validation_perplexity=float(np.exp(self.nelbo))
            )
            self.clock.spent("validation")

    def _save_if_due(self, stopping: bool, *, new_step: bool) -> None:
        config, step = self.config, self.step
        wanted = due(step, config.checkpoint.every_steps) or step == config.train.num_steps
        if (new_step and wanted) or (stopping and step > self.saved):
            numbers = {"loss": self.loss, "validation_nelbo": self.nelbo, "guard": self.guard.state()}
            numbers["corrupt_rows"] = self.feed.corrupt_rows
            with self.watchdog.slow("saving"):
                save(config, self.engine, self.saver, step, self.feed.facts, numbers)
            self.saved = step
            self.clock.spent("saving")

    def _objection(self, number: int, loss: float, norm: float) -> str | None:
        """Why a step must not be made; asked on all ranks, after backward and before the update."""
        if due(self.step + 1, self.config.guard.checksum_every_steps):
            self.corruption = self.engine.disagreements()
        if self.feed.failed(number):
            return "a batch that could not be read"
        return "corrupted weights" if self.corruption else self.guard.problem(loss, norm)

    def _corrupted(self, losses: np.ndarray, fingerprints: np.ndarray) -> str:
        """Who holds other weights, or found another loss, than ranks that should agree with it; empty where all agree."""
        top, stage = self.engine.topology, self.config.parallel.zero_stage
        found = [*self.corruption, *accusations(losses, fingerprints, top, zero_stage=stage)]
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
                found = Checkpoint.open(checkpoint.step_folder(self.config.run_dir, self.step))
                state = found.manifest["numbers"].get("guard")
        state, record = self.engine.from_first_rank((state, record))
        self.guard.restore(self.step, state, record)

    def _roll_back(self) -> tuple[Ending | None, str]:
        """Go back to an earlier checkpoint; an ending where there is none left to go to."""
        config, engine, guard = self.config, self.engine, self.guard
        with self.watchdog.slow("saving"):
            self.saver.drain()
        saved = checkpoint.complete_steps(config.run_dir) if engine.is_first_rank else []
        target = engine.from_first_rank(guard.target(self.step, saved))
        if target is None:
            return Ending.BAD_NUMBERS, guard.give_up(self.step)
        with self.watchdog.slow("rollback"):
            guard.roll_back(self.step, target)
            if engine.is_first_rank:
                _set_aside(config.run_dir, [s for s in saved if s > target], len(guard.rollbacks))
            found = Checkpoint.open(checkpoint.step_folder(config.run_dir, target), verify=engine.is_first_rank)
            engine.restore(found, tuple(found.kinds()), target)
            self.feed.restore(found.manifest["numbers"])
            self.metrics.reached = max(self.metrics.reached, self.step)
            self.metrics.go_back(target)
            self.step = self.saved = target
            self._restore_guard()
        self.clock.spent("rollback")
        return None, ""


def _set_aside(run_dir: Path, steps: Sequence[int], number: int) -> None:
    """Rename the checkpoints that the run went back over: it will save these steps again.

    Those of an earlier rollback make room: what a run leaves does not grow with its rollbacks.
    """
    parent = checkpoint.step_folder(run_dir, 0).parent
    for old in parent.glob("*.rolled_back-*"):
        shutil.rmtree(old, ignore_errors=True)
    for step in steps:
        folder = checkpoint.step_folder(run_dir, step)
        folder.rename(folder.with_name(f"{folder.name}.rolled_back-{number}"))


def _noising(config: Config, engine: Engine) -> Callable[[Batch, int], Noised]:
    """A function of this rank's batch and the step (from 1) it makes: the batch with the noise of that step."""
    top, t = engine.topology, config.train
    multiple = math.lcm(
        CAPACITY_MULTIPLE, top.token_multiple
    )  # sequence and context parallelism cut the packed row evenly
    capacity = mask_capacity(config.model.seq_length, config.objective.alpha_0, multiple)

    def noised(batch: Batch, step: int) -> Noised:
        return draw_step(
            batch.tokens,
            batch.valid,
            batch.rows,
            config.objective,
            mask_id=config.model.mask_id,
            global_batch_size=t.global_batch_size,
            num_micro_batches=t.global_batch_size // (t.micro_batch_size * top.data_size),
            capacity=capacity,
            key=(config.seed, step),
            documents=None if config.data.cross_document else document_numbers(batch.documents, batch.valid),
        )

    return noised


class Validation:
    """The bound on held-out text: every sequence in both parts, the same noise each time, with averaged weights."""

    def __init__(self, config: Config, engine: Engine):
        self.config, self.engine = config, engine
        self.data = ValidationFeed(config, engine)
        self.count = min(config.evaluate.num_sequences, len(self.data))
        if self.count == 0:
            raise ConfigError(
                "data: has no validation tokens; prepare it with validation_fraction above 0, "
                "or set evaluate.every_steps=0"
            )

    def nelbo(self) -> float:
        """NELBO in nats per token, of both estimators' parts summed."""
        top, size = self.engine.topology, self.config.train.micro_batch_size
        together = self.config.parallel.pipeline_size  # micro-batches at once, so that no stage waits
        sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        with self.engine.state.averaged_weights():
            for first in range(0, self.count, size * top.data_size * together):
                places = [first + (m * size + np.arange(size)) * top.data_size + top.data_rank for m in range(together)]
                batches = self.data.rows([np.minimum(rows, self.count - 1) for rows in places])
                parts = [self._draw(rows, batch) for rows, batch in zip(places, batches, strict=True)]
                share = Noised([p.micro_batches[0] for p in parts], sum(p.num_valid for p in parts))  # type: ignore[arg-type]
                got, seen = self.engine.evaluate(share)
                sums += got.cpu()
                counts += seen.cpu()
        return float(mean_loss(sums, counts))

    def _draw(self, rows: np.ndarray, batch: Batch) -> Noised:
        valid = batch.valid & (rows < self.count)[:, None]
        return draw_validation(
            batch.tokens,
            valid,
            rows,
            self.count,
            self.config.objective,
            mask_id=self.config.model.mask_id,
            key=(self.config.seed, "validation"),
            documents=None if self.config.data.cross_document else document_numbers(batch.documents, valid),
        )


def prepare_run_folder(config: Config) -> None:
    """Write what makes the run reproducible: the resolved configuration and the tokenizer."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    checkpoint.prune(config.run_dir, config.checkpoint.keep_last, config.checkpoint.keep_every, remove_unfinished=True)
    (config.run_dir / "config.yaml").write_text(dump(config))
    place = open_folder(next(iter(sources_of(config.data).values())).path, config.data)
    if (config.run_dir / "tokenizer").exists():
        return
    if place.remote:
        definition = place.read("tokenizer/tokenizer.json", "copy the whole folder again")
        (config.run_dir / "tokenizer").mkdir()
        (config.run_dir / "tokenizer" / "tokenizer.json").write_bytes(definition)
    elif (place.path / "tokenizer").is_dir():
        shutil.copytree(place.path / "tokenizer", config.run_dir / "tokenizer")


def resume(config: Config, engine: Engine, feed: Feed) -> int:
    """Load the newest whole checkpoint, if there is one; returns the steps already done.

    Raises:
        ConfigError: the checkpoint was trained on other data, or with other weights of its sources,
            or the run starts from weights of another network.
    """
    step, error = -1, None
    if engine.is_first_rank:  # one rank verifies, and tells the others which checkpoint is whole
        try:
            whole = checkpoint.newest(config.run_dir, verify=True, move_damaged=True)
            step = -1 if whole is None else whole.step
        except CheckpointError as problem:
            error = problem
    if engine.any_rank(error is not None):
        raise error or CheckpointError(f"{config.run_dir}: the first rank found no checkpoint to continue from")
    step = engine.all_ranks(step)[0]
    if step < 0:
        return 0
    found = checkpoint.Checkpoint.open(checkpoint.step_folder(config.run_dir, step))
    numbers = found.manifest["numbers"]
    if "converted_from" in found.manifest:
        preflight.refuse_other_model(config, found.config_tree["model"])
    else:
        feed.check_same(found.manifest, batches_done(found.step, (numbers.get("guard") or {}).get("skipped", ())))
        feed.restore(numbers)
    engine.restore(found, tuple(found.kinds()), found.step)
    return found.step


def save(
    config: Config, engine: Engine, saver: Saver, step: int, data: dict[str, Any], numbers: dict[str, Any]
) -> None:
    """Start writing a checkpoint together; it appears whole or not at all, some steps later or when `saver` drains.

    Raises:
        CheckpointError: on every rank, when the save before failed on any rank; older checkpoints stay.
    """
    manifest = {
        "step": step,
        "config": config.model_dump(mode="json"),
        "topology": vars(engine.topology),
        "data_fingerprint": data,
        "versions": {"esolm_megatron": __version__, "torch": torch.__version__},
        "numbers": numbers,
    }
    saver.save(step, engine.pieces(), manifest, engine.probe())
