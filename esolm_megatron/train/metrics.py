"""What a run tells while it trains: metrics.jsonl, a progress line, wandb, and a picture of the loss."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from esolm_megatron.config import Config
from esolm_megatron.errors import without_secrets
from esolm_megatron.terminal import Terminal
from esolm_megatron.train.course import turns

logger = logging.getLogger(__name__)

# Dense bf16 peak of one device in FLOP/s, from the vendors' data sheets.
_GPU_PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "A6000": 155e12}


def peak_flops(config: Config, device: torch.device) -> float:
    """Peak FLOP/s of one device, for MFU: as configured, by the GPU's name, or of a matrix product on this CPU."""
    if config.train.peak_tflops is not None:
        return config.train.peak_tflops * 1e12
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for key, peak in _GPU_PEAKS.items() if key in name), 312e12)
    a = torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


_STATES = ("start", "step", "repeated", "skipped", "validation", "saving", "rollback")


class WallClock:
    """Where a process's time goes, since it started: useful steps, and what is lost to each cause.

    repeated: steps that an earlier process, or this one before a rollback, had already made. skipped: refused steps.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(_STATES, 0.0)
        self._mark = time.perf_counter()

    def spent(self, state: str) -> float:
        """Count the time since the last call as `state`; returns it."""
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        self.seconds[state] += seconds
        return seconds

    def shares(self) -> dict[str, float]:
        """goodput: share of the time in useful steps; lost_...: shares of the rest. They sum to 1."""
        total = max(sum(self.seconds.values()), 1e-9)
        lost = {f"lost_{state}": round(s / total, 4) for state, s in self.seconds.items() if state != "step" and s}
        return {"goodput": round(self.seconds["step"] / total, 4), **lost}


class Stragglers:
    """Which rank the others wait for, from each rank's own seconds of work over the steps since the last report."""

    def __init__(self, world_size: int):
        self._busy = np.zeros(world_size)

    def add(self, busy: np.ndarray) -> None:
        """One step's (world_size,) seconds."""
        self._busy += busy

    def report(self) -> dict[str, Any]:
        """slowest_rank; slowest_share: how much more it works than the median rank, as a share of its work."""
        busy, self._busy = self._busy, np.zeros_like(self._busy)
        if len(busy) < 2 or busy.max() == 0:
            return {}
        return {
            "slowest_rank": int(busy.argmax()),
            "slowest_share": round(float(1 - np.median(busy) / busy.max()), 4),
        }


class Metrics:
    """Writes one run's numbers, on the rank that has `active`; does nothing elsewhere.

    A run that resumes at a step drops the lines that its lost steps had written.
    """

    def __init__(self, config: Config, start_step: int, *, active: bool, flops_per_step: float, peak: float):
        self.config, self.active, self.flops_per_step, self.peak = config, active, flops_per_step, peak
        self.path = config.run_dir / "metrics.jsonl"
        self.wandb: Any = None
        self.last = (time.perf_counter(), start_step)
        self.tokens_per_step = config.train.global_batch_size * config.model.seq_length
        self.reached = start_step
        """The last step that has ever been made; those up to it are repeated."""
        if not active:
            return
        self.reached = max([start_step, *_drop_after(self.path, start_step)])
        if config.log.wandb != "off":
            self.wandb = _start_wandb(config)
        self.console = Terminal(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.progress.start()
        self.task = self.progress.add_task(config.name, total=config.train.num_steps, completed=start_step, text="")

    def log(self, step: int, **values: Any) -> None:
        """Record `values` after `step` steps, with speed since the last call."""
        if not self.active:
            return
        now, (before, last_step) = time.perf_counter(), self.last
        self.last = (now, step)
        steps, seconds = step - last_step, max(now - before, 1e-9)
        if steps > 0:
            values["tokens_per_s"] = round(self.tokens_per_step * steps / seconds, 1)
            values["mfu"] = round(self.flops_per_step * steps / seconds / self.peak, 4)
            left = (self.config.train.num_steps - step) * seconds / steps
            self._show(step, values, left)
        self._write(step, values)

    def go_back(self, step: int) -> None:
        """Drop the lines of the steps after `step`, which are made again."""
        self.last = (time.perf_counter(), step)
        if self.active:
            _drop_after(self.path, step)

    def log_validation(self, step: int, **values: Any) -> None:
        """Record a validation; its time does not count against training speed."""
        if not self.active:
            return
        self.last = (time.perf_counter(), step)
        self._write(step, values)
        shown = "  ".join(f"{k} {v:.4f}" for k, v in values.items() if isinstance(v, float))
        self.progress.console.print(f"step {step}: {shown}", highlight=False)

    def _write(self, step: int, values: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._tell_wandb(lambda run: run.log(values, step=step))

    def _tell_wandb(self, what: Callable[[Any], object]) -> None:
        """Do `what` with wandb's run. If that fails, the training goes on without wandb; metrics.jsonl has it all.

        Its service is a process that dies of the signals by which a scheduler asks a run to save.
        """
        if self.wandb is None:
            return
        try:
            what(self.wandb)
        except Exception as error:
            self.wandb = None
            logger.warning("wandb gets nothing more: %s: %s", type(error).__name__, error)

    def _show(self, step: int, values: dict[str, Any], seconds_left: float) -> None:
        left = time.strftime("%H:%M:%S", time.gmtime(seconds_left))
        text = f"loss {values['loss']:.3f}  {values['tokens_per_s'] / 1e3:.1f}K tok/s  MFU {values['mfu']:.1%}  left {left}"
        self.progress.update(self.task, completed=step, text=text)
        if not self.console.is_terminal:
            sys.stderr.write(f"{self.config.name} {step}/{self.config.train.num_steps}  {text}\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Finish the progress line and wandb, and draw loss.png."""
        if not self.active:
            return
        self.progress.stop()
        plot_loss(self.path, self.config.run_dir / "loss.png")
        self._tell_wandb(lambda run: run.finish())


def _drop_after(path: Path, step: int) -> list[int]:
    """Remove the lines of later steps; returns those steps."""
    if not path.exists():
        return []
    lines, dropped = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            of = json.loads(line)["step"]
            if of <= step:
                lines.append(line + "\n")
            else:
                dropped.append(of)
        except json.JSONDecodeError:  # a line that a killed process did not finish
            continue
    new = path.with_suffix(".new")
    new.write_text("".join(lines))
    os.replace(new, path)
    return dropped


def _start_wandb(config: Config) -> Any:
    import wandb

    file = config.run_dir / "wandb_id"
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12])
    return wandb.init(
        id=file.read_text().strip(),
        resume="allow",
        project=config.log.wandb_project,
        name=config.name,
        dir=str(config.run_dir),
        allow_val_change=True,  # a run's course, see course.py
        mode="offline" if config.log.wandb == "offline" else "online",
        config=json.loads(without_secrets(config.model_dump_json())),
    )


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plot_loss(metrics: Path, picture: Path) -> None:
    """Draw training loss and validation bound over steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lines = read(metrics)
    figure, axes = plt.subplots(figsize=(7, 4))
    for key, label in (("loss", "training loss"), ("diffusion", "diffusion part"), ("sequential", "sequential part")):
        points = [(x["step"], x[key]) for x in lines if x.get(key)]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, lw=1.6 if key == "loss" else 0.8)
    points = [(x["step"], x["validation_nelbo"]) for x in lines if "validation_nelbo" in x]
    if points:
        axes.plot(*zip(*points, strict=True), "o-", label="validation NELBO (moving average)", color="black", ms=4)
    for step, changed in turns(metrics.parent, lines[-1]["step"] if lines else 0):
        axes.axvline(step, color="grey", ls=":", label=", ".join(f"{name} = {x}" for name, x in changed.items()))
    axes.set(xlabel="step", ylabel="nats per token", title=f"Loss of {metrics.parent.name}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120, bbox_inches="tight")
    plt.close(figure)
