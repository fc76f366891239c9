"""A whole training step of ours against the reference's way of computing it, and against a plain autoregressive step.

    python tools/benchmark_train.py [--size mid] [--alphas 1,0.5,0.25,0] [--steps 5] [--rows 8] [--json FILE]

The same network, rows, noise and optimizer in all three, on random tokens; each step draws its noise, goes forward and back
and updates. `reference`: diffusion rows under causal attention, sequential rows as 2L tokens under a dense 2L x 2L mask, logits
of all places. `ar`: all rows left to right under causal attention, logits of all places. The steps take turns; a table and
JSON give medians and ratios, in seconds on a GPU and in CPU-seconds elsewhere, and the peak memory of a process that makes
two steps of one kind. Ours and the reference must have the same loss. Exits with 1 where a ratio is below its bar.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from esolm_megatron.config import ModelConfig, ObjectiveConfig
from esolm_megatron.model.layers import PlainLinears
from esolm_megatron.model.size import flops_per_token, mask_capacity
from esolm_megatron.model.transformer import EsoLM, initialise
from esolm_megatron.objective.esolm import draw_diffusion, draw_sequential, draw_step, mean_loss, part_sums

SIZES = {
    "tiny": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "seq_length": 32, "vocab_size": 97},
    "mid": {"hidden_size": 256, "num_layers": 6, "num_heads": 4, "seq_length": 512, "vocab_size": 8192},
    "124m": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "seq_length": 1024, "vocab_size": 50258},
}
BARS = {1.0: 1.3, 0.5: 1.6, 0.25: 1.35, 0.0: 1.3}
"""Least ratio of the reference's time to ours, at the size `mid` on a CPU."""
KINDS = ("ours", "reference", "ar")
WARMUP = 1


class Dense:
    """Attention of rows of `length` tokens under one dense mask, or under a causal one."""

    def __init__(self, length: int, seen: Tensor | None):
        self.length, self.seen = length, seen

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(T, N, D) each -> (T, N, D)."""
        q, k, v = (x.view(-1, self.length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.seen, is_causal=self.seen is None)
        return out.transpose(1, 2).flatten(0, 1)


class Steps:
    """Training steps of one network, in any of the ways."""

    def __init__(self, size: str, alpha_0: float, rows: int, device: torch.device):
        self.shape = ModelConfig(**SIZES[size])  # type: ignore[arg-type]
        self.objective, self.rows, self.device, self.step = ObjectiveConfig(alpha_0=alpha_0), rows, device, 0
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = EsoLM(self.shape, PlainLinears(dtype, device))
        initialise(self.model, 0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)  # as the trainer
        length = self.shape.seq_length
        self.capacity = mask_capacity(length, alpha_0)
        order = torch.arange(length, device=device)
        clean, masks = order[:, None] >= order, order[:, None] > order
        eye = torch.eye(length, dtype=torch.bool, device=device)
        self.seen = torch.cat([torch.cat([clean, ~(clean | True)], 1), torch.cat([masks, eye], 1)])
        self.tokens = np.random.default_rng(0).integers(0, self.shape.mask_id, (64, rows, length))

    def run(self, kind: str) -> float:
        """One optimizer step; returns its loss."""
        tokens = self.tokens[self.step % len(self.tokens)]
        loss: Tensor = getattr(self, kind)(tokens, (0, self.step))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def ours(self, tokens: np.ndarray, key: tuple[int, int]) -> Tensor:
        """The loss as the trainer computes it."""
        noised = draw_step(
            tokens, np.ones_like(tokens, bool), np.arange(self.rows), self.objective, mask_id=self.shape.mask_id,
            global_batch_size=self.rows, num_micro_batches=1, capacity=self.capacity, key=key,
        )  # fmt: skip
        batch = noised.micro_batches[0].to(self.device)
        losses = self.model(
            batch.tokens, batch.positions, batch.attend, targets=batch.targets, dropout_ids=None, last=batch.last
        )
        return mean_loss(part_sums(losses, batch), noised.num_valid.to(self.device))

    def reference(self, tokens: np.ndarray, key: tuple[int, int]) -> Tensor:
        """The same loss from 2L tokens, a dense mask and all logits."""
        count, length = round(self.rows * self.objective.fraction), self.shape.seq_length
        everywhere, rows, total = np.ones_like(tokens, bool), np.arange(self.rows), torch.zeros((), device=self.device)
        if count:
            drawn = draw_diffusion(tokens[:count], everywhere[:count], rows[:count], count, self.objective, *key)
            fed = np.where(drawn.masked, self.shape.mask_id, drawn.tokens)
            total = total + self._all_places([fed], drawn, Dense(length, None), (count, length))
        if count < self.rows:
            drawn = draw_sequential(
                tokens[count:], everywhere[count:], rows[count:], self.objective.alpha_0, self.capacity, *key
            )
            masks = np.where(drawn.masked, self.shape.mask_id, drawn.tokens)
            shape = (self.rows - count, 2 * length)
            total = total + self._all_places([drawn.tokens, masks], drawn, Dense(2 * length, self.seen), shape)
        return total

    def _all_places(self, streams: list[np.ndarray], drawn: Any, attend: Dense, shape: tuple[int, int]) -> Tensor:
        """Mean loss per token of rows that feed these streams, one after the other; the last one carries the loss."""
        tokens, weights = (np.take_along_axis(x, drawn.order, 1) for x in (drawn.tokens, drawn.weights))
        fed = np.concatenate([np.take_along_axis(x, drawn.order, 1) for x in streams], 1)
        positions = np.concatenate([drawn.order] * len(streams), 1)
        fed, positions, tokens, weights = (
            torch.from_numpy(x).to(self.device) for x in (fed, positions, tokens, weights)
        )
        logits = self.model(fed.flatten(), positions.flatten(), attend).view(*shape, -1)[:, -self.shape.seq_length :]
        losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
        return (losses * weights.flatten().to(losses)).sum() / tokens.numel()

    def ar(self, tokens: np.ndarray, key: tuple[int, int]) -> Tensor:
        """The mean loss of the next token, for as many targets as there are tokens."""
        fed = torch.from_numpy(np.roll(tokens, 1, axis=1)).to(self.device)
        positions = torch.arange(self.shape.seq_length, device=self.device).repeat(self.rows)
        logits = self.model(fed.flatten(), positions, Dense(self.shape.seq_length, None))
        return F.cross_entropy(logits, torch.from_numpy(tokens).to(self.device).flatten())


def seconds_of(work: Callable[[], float], device: torch.device) -> tuple[float, float]:
    """(seconds of the clock, CPU-seconds) that `work` takes; on a GPU twice those of its events."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return (start.elapsed_time(end) / 1000,) * 2
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - cpu


def peak_of(args: argparse.Namespace, alpha_0: float, kind: str) -> float:
    """MiB that a process holds at most that makes two steps of a kind."""
    words = [f"--size={args.size}", f"--alphas={alpha_0}", f"--rows={args.rows}", f"--peak-of={kind}"]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return float(done.stdout)


def peak_here(size: str, alpha_0: float, rows: int, device: torch.device, kind: str) -> float:
    """The same of this process, less what it held before; on a GPU what torch allocated."""
    before = resident("VmRSS")
    steps = Steps(size, alpha_0, rows, device)
    for _ in range(2):
        steps.run(kind)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resident("VmHWM") - before


def resident(name: str) -> float:
    """MiB of this process's memory now (VmRSS) or at most (VmHWM); unlike getrusage's, without what its parent had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 2**10


def measure(args: argparse.Namespace, alpha_0: float, device: torch.device) -> dict[str, Any]:
    """Medians of one alpha_0."""
    steps = Steps(args.size, alpha_0, args.rows, device)
    key, tokens = (0, 0), steps.tokens[0]
    with torch.no_grad():
        losses = [steps.ours(tokens, key).item(), steps.reference(tokens, key).item()]
    if abs(losses[0] - losses[1]) > (1e-5 if device.type == "cpu" else 2e-2) * losses[1]:
        raise SystemExit(f"alpha_0 = {alpha_0:g}: loss {losses[0]:.7f}, the reference's way {losses[1]:.7f}")
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for number in range(WARMUP + args.steps):
        steps.step = number
        for kind in KINDS:
            took = seconds_of(lambda kind=kind: steps.run(kind), device)  # type: ignore[misc]
            if number >= WARMUP:
                seconds[kind].append(took)
    out: dict[str, Any] = {"alpha_0": alpha_0, "loss": losses[0], "capacity": steps.capacity}
    for kind in KINDS:
        clock, cpu = (statistics.median(x) for x in zip(*seconds[kind], strict=True))
        out[kind] = {"seconds": clock, "cpu_seconds": cpu, "peak_mib": round(peak_of(args, alpha_0, kind), 1)}
    count = args.rows * steps.shape.seq_length
    out["tokens_per_second"] = count / out["ours"]["seconds"]
    out["tflops"] = count * flops_per_token(steps.shape, steps.objective) / out["ours"]["seconds"] / 1e12
    for kind in KINDS[1:]:
        out[f"{kind}_over_ours"] = out[kind]["cpu_seconds"] / out["ours"]["cpu_seconds"]
    return out


def table_of(found: list[dict[str, Any]], title: str) -> Table:
    """The medians, and ratios to ours."""
    table = Table(title=title)
    names = ("alpha_0", *(f"{kind} {unit}" for unit in ("s", "MiB") for kind in KINDS))
    for name in (*names, "reference / ours", "ar / ours", "tokens/s"):
        table.add_column(name, justify="right")
    for row in found:
        cells = [f"{row[kind]['cpu_seconds']:.3f}" for kind in KINDS] + [
            f"{row[kind]['peak_mib']:.0f}" for kind in KINDS
        ]
        ratios = [f"{row[f'{kind}_over_ours']:.2f}" for kind in KINDS[1:]]
        table.add_row(f"{row['alpha_0']:g}", *cells, *ratios, f"{row['tokens_per_second']:,.0f}")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--alphas", default="1,0.5,0.25,0", help="alpha_0 of each line of the table")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each kind (default: 5)")
    parser.add_argument("--rows", type=int, default=8, help="rows in a step (default: 8)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--peak-of", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device, alphas = torch.device(args.device), [float(x) for x in args.alphas.split(",")]
    if args.peak_of:
        print(peak_here(args.size, alphas[0], args.rows, device, args.peak_of))
        return 0
    found = [measure(args, alpha_0, device) for alpha_0 in alphas]
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    Console(stderr=True, width=150).print(
        table_of(found, f"{args.size}, {args.rows} rows, {name}, medians of {args.steps}")
    )
    out = {"size": args.size, "rows": args.rows, "steps": args.steps, "device": name, "torch": torch.__version__}
    text = json.dumps({**out, "runs": found}, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    judged = [row for row in found if args.size == "mid" and device.type == "cpu" and row["alpha_0"] in BARS]
    low = [row for row in judged if row["reference_over_ours"] < BARS[row["alpha_0"]]]
    return 1 if low or any(row["ours"]["peak_mib"] >= row["reference"]["peak_mib"] for row in judged) else 0


if __name__ == "__main__":
    sys.exit(main())
