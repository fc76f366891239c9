"""The training loop."""

from __future__ import annotations

import math
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esolm_megatron import __version__, checkpoint
from esolm_megatron.checkpoint import CheckpointError
from esolm_megatron.config import Config, ConfigError, dump
from esolm_megatron.data.stream import TokenStream, ValidationSet
from esolm_megatron.model.size import flops_per_step, mask_capacity
from esolm_megatron.objective.esolm import Noised, draw_step, draw_validation, mean_loss
from esolm_megatron.parallel.engine import Engine
from esolm_megatron.train import preflight
from esolm_megatron.train.metrics import Metrics, peak_flops
from esolm_megatron.train.saver import Saver
from esolm_megatron.train.schedule import learning_rate


class StopRequest:
    """Remembers that a signal asked the run to stop; a second one ends the process at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the step it reached, whether that is the last, and the newest numbers."""

    step: int
    finished: bool
    loss: float | None
    validation_nelbo: float | None


def due(step: int, every: int) -> bool:
    """Whether something that happens `every` steps happens after `step` steps."""
    return every > 0 and step % every == 0


def train(config: Config) -> Outcome:
    """Train, or continue the run in config.run_dir from its newest whole checkpoint.

    Every process of the run calls this. SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 end it after the step, with a checkpoint.

    Raises:
        ConfigError: data, run folder or number of processes do not fit; before anything is written.
    """
    config = preflight.resolve(config)
    preflight.refuse_other_run(config)
    stop = StopRequest()
    engine = Engine(config)
    try:
        return _train(config, engine, stop)
    finally:
        engine.close()


def _train(config: Config, engine: Engine, stop: StopRequest) -> Outcome:
    top, t = engine.topology, config.train
    stream = TokenStream(
        config.data.path,
        seq_length=config.model.seq_length,
        global_batch_size=t.global_batch_size,
        data_rank=top.data_rank,
        data_size=top.data_size,
        seed=config.seed,
        num_lanes=config.data.num_lanes,
        shuffle_window=config.data.shuffle_window,
    )
    start = resume(config, engine, stream.fingerprint)
    if engine.is_first_rank:
        prepare_run_folder(config)
    validation = Validation(config, engine) if config.evaluate.every_steps else None
    metrics = Metrics(
        config,
        start,
        active=engine.is_first_rank,
        flops_per_step=flops_per_step(config),
        peak=peak_flops(config, engine.device) * top.world_size,
    )
    multiple = math.lcm(64, top.tensor_size)  # sequence parallelism cuts the packed row evenly
    capacity = mask_capacity(config.model.seq_length, config.objective.alpha_0, multiple)
    num_micro_batches = t.global_batch_size // (t.micro_batch_size * top.data_size)
    saved, loss, nelbo, step = start, None, None, start
    prefetch = stream.prefetch(start, t.num_steps, config.data.prefetch_batches)
    with Saver(config, engine) as saver, prefetch as batches:
        for step, batch in enumerate(batches, start + 1):
            noised = draw_step(
                batch.tokens,
                batch.valid,
                batch.rows,
                config.objective,
                mask_id=config.model.mask_id,
                global_batch_size=t.global_batch_size,
                num_micro_batches=num_micro_batches,
                capacity=capacity,
                key=(config.seed, step),
            )
            lr = learning_rate(step - 1, config.optim, t.num_steps)
            result = engine.train_step(noised, lr)
            loss = result.loss
            if due(step, t.log_every_steps) or step in (start + 1, t.num_steps):
                metrics.log(step, **vars(result), lr=lr)
            if validation is not None and (due(step, config.evaluate.every_steps) or step == t.num_steps):
                nelbo = validation.nelbo()
                metrics.log_validation(step, validation_nelbo=nelbo, validation_perplexity=float(np.exp(nelbo)))
            if step == start + 1:
                saver.reserve(engine.pieces())  # moments exist from the first step on
            stopping = engine.any_rank(stop.signal is not None or saver.failed)
            if stopping:
                saver.check()
            if due(step, config.checkpoint.every_steps) or step == t.num_steps or stopping:
                save(config, engine, saver, step, stream.fingerprint, {"loss": loss, "validation_nelbo": nelbo})
                saved = step
            if stopping:
                break
    metrics.close()
    stream.close()
    assert saved == step
    return Outcome(step, step == t.num_steps, loss, nelbo)


class Validation:
    """The bound on held-out text: every sequence in both parts, the same noise each time, with averaged weights."""

    def __init__(self, config: Config, engine: Engine):
        self.config, self.engine = config, engine
        self.data = ValidationSet(config.data.path, seq_length=config.model.seq_length)
        self.count = min(config.evaluate.num_sequences, len(self.data))
        if self.count == 0:
            raise ConfigError(
                f"data.path = {config.data.path}: has no validation tokens; prepare it with validation_fraction above 0, "
                "or set evaluate.every_steps=0"
            )

    def nelbo(self) -> float:
        """NELBO in nats per token, of both estimators' parts summed."""
        top, size = self.engine.topology, self.config.train.micro_batch_size
        together = self.config.parallel.pipeline_size  # micro-batches at once, so that no stage waits
        sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        with self.engine.state.averaged_weights():
            for first in range(0, self.count, size * top.data_size * together):
                parts = [
                    self._draw(first + (m * size + np.arange(size)) * top.data_size + top.data_rank)
                    for m in range(together)
                ]
                share = Noised([p.micro_batches[0] for p in parts], sum(p.num_valid for p in parts))  # type: ignore[arg-type]
                got, seen = self.engine.evaluate(share)
                sums += got.cpu()
                counts += seen.cpu()
        return float(mean_loss(sums, counts))

    def _draw(self, rows: np.ndarray) -> Noised:
        batch = self.data.rows(np.minimum(rows, self.count - 1))
        valid = batch.valid & (rows < self.count)[:, None]
        return draw_validation(
            batch.tokens,
            valid,
            rows,
            self.count,
            self.config.objective,
            mask_id=self.config.model.mask_id,
            key=(self.config.seed, "validation"),
        )


def prepare_run_folder(config: Config) -> None:
    """Write what makes the run reproducible: the resolved configuration and the tokenizer."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    checkpoint.prune(config.run_dir, config.checkpoint.keep_last, config.checkpoint.keep_every, remove_unfinished=True)
    (config.run_dir / "config.yaml").write_text(dump(config))
    tokenizer = Path(config.data.path) / "tokenizer"
    if tokenizer.is_dir() and not (config.run_dir / "tokenizer").exists():
        shutil.copytree(tokenizer, config.run_dir / "tokenizer")


def resume(config: Config, engine: Engine, fingerprint: str) -> int:
    """Load the newest whole checkpoint, if there is one; returns the steps already done.

    Raises:
        ConfigError: the checkpoint was trained on other data.
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
    was = found.manifest["data_fingerprint"]
    if was != fingerprint:
        raise ConfigError(
            f"data.path = {config.data.path}: is not what step {found.step} was trained on (fingerprint {was[:12]}, now "
            f"{fingerprint[:12]}); restore the data, or start a run with another name"
        )
    engine.restore(found, tuple(found.kinds()), found.step)
    return found.step


def save(config: Config, engine: Engine, saver: Saver, step: int, fingerprint: str, numbers: dict[str, Any]) -> None:
    """Start writing a checkpoint together; it appears whole or not at all, some steps later or when `saver` drains.

    Raises:
        CheckpointError: on every rank, when the save before failed on any rank; older checkpoints stay.
    """
    manifest = {
        "step": step,
        "config": config.model_dump(mode="json"),
        "topology": vars(engine.topology),
        "data_fingerprint": fingerprint,
        "versions": {"esolm_megatron": __version__, "torch": torch.__version__},
        "numbers": numbers,
    }
    saver.save(step, engine.pieces(), manifest, engine.probe())
