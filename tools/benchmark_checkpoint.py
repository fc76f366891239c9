"""How long training stands still for a checkpoint, written beside the steps against written while everything waits.

    python tools/benchmark_checkpoint.py [--gigabytes 1] [--saves 3] [--folder DIR] [--json FILE]

One process trains a real Engine, whose weights, moments and moving average take `gigabytes` in fp32, and saves its state in
turn both ways. A stall is the time from the end of a step to the start of the next, with the probe (forward passes that
either save makes) and without. Prints a table and JSON; exits with 1 where the stall without the probe is not at least BAR
times shorter. Runs on the GPU if there is one, else on the CPU.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from esolm_megatron.checkpoint import folder as checkpoint
from esolm_megatron.config import Config, check
from esolm_megatron.model.size import mask_capacity
from esolm_megatron.objective.esolm import Noised, draw_step
from esolm_megatron.parallel.engine import Engine
from esolm_megatron.train.saver import Saver

BAR = 10.0
VOCAB, WIDTH, LENGTH = 2048, 512, 32
BYTES_PER_PARAMETER = 16  # weight, two moments, moving average; fp32


def experiment(folder: str, gigabytes: float) -> Config:
    """A run whose state takes about so much."""
    layers = max(1, round((gigabytes * 1e9 / BYTES_PER_PARAMETER - 2 * VOCAB * WIDTH) / (12 * WIDTH**2)))
    return check(
        {
            "name": "benchmark",
            "runs_dir": folder,
            "model": {
                "num_layers": layers, "hidden_size": WIDTH, "num_heads": 8, "vocab_size": VOCAB, "seq_length": LENGTH
            },
            "objective": {"alpha_0": 0.5},
            "train": {"num_steps": 10**6, "global_batch_size": 2, "micro_batch_size": 2, "precision": "fp32"},
            "optim": {"lr": 1e-4, "ema_decay": 0.999},
            "data": {"path": "random tokens"},
        }
    )  # fmt: skip


class Training:
    """Steps on random tokens."""

    def __init__(self, config: Config):
        self.config, self.step, self.engine = config, 0, Engine(config)
        self.capacity = mask_capacity(LENGTH, config.objective.alpha_0)

    def draw(self) -> Noised:
        """A batch of random tokens."""
        rows = np.arange(2)
        tokens = np.random.default_rng(self.step).integers(0, VOCAB - 1, (2, LENGTH))
        return draw_step(
            tokens,
            np.ones((2, LENGTH), bool),
            rows,
            self.config.objective,
            mask_id=self.config.model.mask_id,
            global_batch_size=2,
            num_micro_batches=1,
            capacity=self.capacity,
            key=(0, self.step),
        )

    def steps(self, until: Any) -> list[float]:
        """Seconds of each step, until `until()` holds."""
        out: list[float] = []
        while not out or not until():
            start = time.perf_counter()
            self.step += 1
            self.engine.train_step(self.draw(), 1e-4)
            out.append(time.perf_counter() - start)
        return out

    def manifest(self) -> dict[str, Any]:
        """What `commit` asks for."""
        return {"step": self.step, "config": self.config.model_dump(mode="json")}


def blocking(training: Training) -> dict[str, float]:
    """A save that training waits for."""
    run, start = training.config.run_dir, time.perf_counter()
    probe = training.engine.probe()
    probed = time.perf_counter()
    staging = checkpoint.staging_folder(run, training.step)
    checkpoint.write_rank(staging, 0, training.engine.pieces())
    checkpoint.commit(staging, checkpoint.step_folder(run, training.step), training.manifest(), 1, probe)
    checkpoint.prune(run, 1)
    stall = time.perf_counter() - start
    return {"stall": stall, "probe": probed - start, "total": stall}


def beside(training: Training, saver: Saver) -> dict[str, Any]:
    """A save beside the steps, and the steps until it is on the disk."""
    start = time.perf_counter()
    probe = training.engine.probe()
    probed = time.perf_counter()
    saver.save(training.step, training.engine.pieces(), training.manifest(), probe)
    stall = time.perf_counter() - start
    final = checkpoint.step_folder(training.config.run_dir, training.step)
    steps = training.steps(final.exists)
    total = time.perf_counter() - start
    saver.drain()
    return {"stall": stall, "probe": probed - start, "total": total, "steps": steps}


def measure(folder: str, gigabytes: float, saves: int) -> dict[str, Any]:
    """Medians over `saves` saves of each kind, in turn."""
    training = Training(experiment(folder, gigabytes))
    alone: list[float] = []
    waiting: list[dict[str, Any]] = []
    running: list[dict[str, Any]] = []
    with Saver(training.config, training.engine) as saver:
        training.steps(lambda: training.step >= 3)
        pieces = list(training.engine.pieces())
        size = sum(piece.tensor.numel() * piece.tensor.element_size() for piece in pieces)
        saver.reserve(pieces)
        del pieces
        for _ in range(saves):
            end = training.step + 5
            alone += training.steps(lambda end=end: training.step >= end)
            waiting.append(blocking(training))
            training.steps(lambda: True)
            running.append(beside(training, saver))
    device = str(training.engine.device)
    training.engine.close()

    def median(rows: list[dict[str, Any]], name: str) -> float:
        return round(statistics.median(row[name] for row in rows), 4)

    out: dict[str, Any] = {"gigabytes": round(size / 1e9, 3), "saves": saves, "device": device}
    out["threads"] = torch.get_num_threads()
    for name, rows in (("blocking", waiting), ("beside", running)):
        out[name] = {f"{key}_s": median(rows, key) for key in ("stall", "probe", "total")}
        out[name]["save_alone_s"] = round(statistics.median(row["stall"] - row["probe"] for row in rows), 4)
        out[name]["stalls_s"] = [round(row["stall"], 4) for row in rows]
    busy = [seconds for row in running for seconds in row["steps"]]
    out["step_s"] = {"no save": round(statistics.median(alone), 4), "during a save": round(statistics.median(busy), 4)}
    out["steps_during_saves"] = len(busy)
    out["ratio"] = round(out["blocking"]["stall_s"] / out["beside"]["stall_s"], 1)
    out["ratio_without_probe"] = round(out["blocking"]["save_alone_s"] / out["beside"]["save_alone_s"], 1)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the state (default: 1)")
    parser.add_argument("--saves", type=int, default=3, help="saves of each kind (default: 3)")
    parser.add_argument("--folder", help="where to write; the disk that is measured (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(folder, args.gigabytes, args.saves)
    table = Table(title=f"a state of {found['gigabytes']} GB, median of {args.saves} saves, {found['device']}")
    for name in ("", "training stopped", "of that the probe", "until on the disk"):
        table.add_column(name, justify="right")
    for name in ("blocking", "beside"):
        row = found[name]
        table.add_row(name, *(f"{row[key]:.3f} s" for key in ("stall_s", "probe_s", "total_s")))
    Console(stderr=True).print(table)
    text = json.dumps(found, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return 0 if found["ratio_without_probe"] >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
