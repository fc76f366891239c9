"""A whole training step of ours against the reference's way of computing it, and against a plain autoregressive step.

    python tools/benchmark_train.py [--sizes mid] [--alphas 1,0.5,0.25,0] [--options plain] [--steps 5] [--rows 8]
                                    [--json FILE] [--picture FILE] [--bars]

The same network, rows, noise and optimizer in all three, on random tokens; each step draws its noise, goes forward and back
and updates (on a GPU it is drawn before the clock starts, as the trainer draws it ahead). `reference`: diffusion rows under
causal attention, sequential rows as 2L tokens under a dense 2L x 2L mask, logits of all places. `ar`: all rows left to right
under causal attention, logits of all places. The steps take turns; a table and JSON give medians and ratios, in seconds on a
GPU and in CPU-seconds elsewhere, and the peak memory of a process that makes two steps of one kind (on a GPU, what is
allocated). Ours and the reference must have the same loss.

options: `plain`, `recompute` (blocks computed again in backward), `compile` (blocks compiled), `graphs` (and replayed as CUDA
graphs); baselines are timed with `plain`, and all options must have its loss after some steps.
MFU = model FLOPs / (seconds x peak), by CPU-seconds on a CPU, where model FLOPs are `model/size.py:flops_per_token` x tokens
of the data: what the method needs, without recomputation, spare mask places, or norms. The parts of a step (attention, MLP,
head and loss, optimizer, data) are timed by themselves, forward and backward, on tensors of the step's shapes; `rest` is
what they leave.
On a GPU the sizes are 124m, 1.7b and a slice of 7b with as many layers as fit, in bf16 with fp32 master weights; elsewhere
mid. Exits with 1 where a number is below its bar (with --bars; on a CPU always).
"""

import argparse
import contextlib
import gc
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from esolm_megatron.config import ModelConfig, ObjectiveConfig
from esolm_megatron.model import flash
from esolm_megatron.model.layers import PlainLinears
from esolm_megatron.model.size import flops_per_token, layer_parameters, mask_capacity, num_parameters
from esolm_megatron.model.transformer import EsoLM, initialise
from esolm_megatron.objective.esolm import (
    Noised,
    OrderedRows,
    draw_diffusion,
    draw_sequential,
    draw_step,
    mean_loss,
    part_sums,
)
from esolm_megatron.train.metrics import peak_flops

MODERN = {"norm": "rmsnorm", "activation": "swiglu", "mlp_bias": False, "output_bias": False, "qk_norm": True,
          "seq_length": 2048, "vocab_size": 50258}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "seq_length": 32, "vocab_size": 97},
    "mid": {"hidden_size": 256, "num_layers": 6, "num_heads": 4, "seq_length": 512, "vocab_size": 8192},
    "124m": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "seq_length": 1024, "vocab_size": 50258},
    "1.7b": {**MODERN, "hidden_size": 2176, "num_layers": 28, "num_heads": 17, "ffn_hidden_size": 5824,
             "tied_embeddings": True},
    "7b": {**MODERN, "hidden_size": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8,
           "ffn_hidden_size": 12288},
}  # fmt: skip
"""Shapes of configs/paper and configs/scale; 7b with fewer layers where they do not fit."""
ROWS = {"124m": 32, "1.7b": 8, "7b": 4}
BARS = {1.0: 1.3, 0.5: 1.6, 0.25: 1.35, 0.0: 1.3}
"""Least ratio of the reference's time to ours, at the size `mid` on a CPU."""
GPU_BARS = {("124m", 1.0): ("tokens_per_second", 500e3), ("124m", 0.25): ("tokens_per_second", 380e3),
            ("1.7b", 1.0): ("mfu", 0.5)}  # fmt: skip
"""Least tokens/s and MFU on one H200, of the best of the options."""
KINDS = ("ours", "reference", "ar")
OPTIONS = ("plain", "recompute", "compile", "graphs")
PARTS = ("attention", "mlp", "head_loss", "optimizer", "data")
WARMUP = 1


class Dense:
    """Attention of rows of `length` tokens under one dense mask, or under a causal one."""

    def __init__(self, length: int, seen: Tensor | None):
        self.length, self.seen = length, seen

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(T, N, D) each -> (T, N, D)."""
        q, k, v = (x.view(-1, self.length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        times = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(times, 1) if times > 1 else x for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.seen, is_causal=self.seen is None)
        return out.transpose(1, 2).flatten(0, 1)


class Steps:
    """Training steps of one network, in any of the ways."""

    def __init__(self, size: str, alpha_0: float, rows: int, device: torch.device):
        self.shape, self.rows, self.device, self.step = fitting(size, device), rows, device, 0
        gpu = device.type == "cuda"
        self.model = EsoLM(self.shape, PlainLinears(torch.bfloat16 if gpu else torch.float32, device))
        if gpu:
            for name, parameter in self.model.named_parameters():
                parameter.data.normal_(0, 0.02) if parameter.dim() > 1 else parameter.data.fill_("norm" in name)
        else:
            initialise(self.model, 0)
        own = list(self.model.parameters())
        self.masters = [p.detach().float() for p in own] if gpu else own
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, fused=True)  # as the trainer
        length = self.shape.seq_length
        order = torch.arange(length, device=device)
        clean, masks = order[:, None] >= order, order[:, None] > order
        eye = torch.eye(length, dtype=torch.bool, device=device)
        self.seen = torch.cat([torch.cat([clean, ~(clean | True)], 1), torch.cat([masks, eye], 1)])
        self.tokens = np.random.default_rng(0).integers(0, self.shape.mask_id, (64, rows, length))
        self.made: dict[str, Any] = {}
        self.choose(alpha_0)

    def choose(self, alpha_0: float, *, recompute: bool = False) -> None:
        """What the next steps are of."""
        self.objective, self.model.recompute_blocks = ObjectiveConfig(alpha_0=alpha_0), recompute
        self.capacity, self.made = mask_capacity(self.shape.seq_length, alpha_0), {}

    def prepare(self, kind: str) -> None:
        """Draw what the next step of this kind needs, as the trainer does ahead of it."""
        tokens, key, self.made = self.tokens[self.step % len(self.tokens)], (0, self.step), {}
        if kind == "ours":
            self.made[kind] = self.noised(tokens, key)
        if kind == "reference":
            self.made[kind] = self.drawn(tokens, key)

    def run(self, kind: str) -> float:
        """One optimizer step; returns its loss."""
        tokens = self.tokens[self.step % len(self.tokens)]
        loss: Tensor = getattr(self, kind)(tokens, (0, self.step))
        loss.backward()
        self.update()
        return loss.item()

    def update(self) -> None:
        """One step of the optimizer, by fp32 master weights where the weights are bf16."""
        own = list(self.model.parameters())
        if self.masters[0] is not own[0]:
            for master, parameter in zip(self.masters, own, strict=True):
                master.grad = None if parameter.grad is None else parameter.grad.float()
        self.optimizer.step()
        if self.masters[0] is not own[0]:
            with torch.no_grad():
                torch._foreach_copy_(own, self.masters)
        self.optimizer.zero_grad()
        self.model.zero_grad()

    def noised(self, tokens: np.ndarray, key: tuple[int, int]) -> Noised:
        """The rows as the trainer draws and packs them."""
        noised = draw_step(
            tokens, np.ones_like(tokens, bool), np.arange(self.rows), self.objective, mask_id=self.shape.mask_id,
            global_batch_size=self.rows, num_micro_batches=1, capacity=self.capacity, key=key,
        )  # fmt: skip
        if self.device.type == "cuda":
            noised.micro_batches[0] = noised.micro_batches[0].pinned()
        return noised

    def drawn(self, tokens: np.ndarray, key: tuple[int, int]) -> tuple[OrderedRows | None, OrderedRows | None]:
        """The same rows, not packed: diffusion ones, sequential ones."""
        count, everywhere, rows = (
            round(self.rows * self.objective.fraction),
            np.ones_like(tokens, bool),
            np.arange(self.rows),
        )
        first, rest, options = slice(0, count), slice(count, None), (self.objective.alpha_0, self.capacity)
        diffusion = sequential = None
        if count:
            diffusion = draw_diffusion(tokens[first], everywhere[first], rows[first], count, self.objective, *key)
        if count < self.rows:
            sequential = draw_sequential(tokens[rest], everywhere[rest], rows[rest], *options, *key)
        return diffusion, sequential

    def ours(self, tokens: np.ndarray, key: tuple[int, int]) -> Tensor:
        """The loss as the trainer computes it."""
        noised = self.made.pop("ours", None) or self.noised(tokens, key)
        batch = noised.micro_batches[0].to(self.device)
        losses = self.model(
            batch.tokens, batch.positions, batch.attend, targets=batch.targets, dropout_ids=None, last=batch.last
        )
        return mean_loss(part_sums(losses, batch), noised.num_valid.to(self.device))

    def reference(self, tokens: np.ndarray, key: tuple[int, int]) -> Tensor:
        """The same loss from 2L tokens, a dense mask and all logits."""
        length, total = self.shape.seq_length, torch.zeros((), device=self.device)
        diffusion, drawn = self.made.pop("reference", None) or self.drawn(tokens, key)
        if diffusion is not None:
            fed = np.where(diffusion.masked, self.shape.mask_id, diffusion.tokens)
            total = total + self._all_places([fed], diffusion, Dense(length, None), (len(fed), length))
        if drawn is not None:
            masks = np.where(drawn.masked, self.shape.mask_id, drawn.tokens)
            shape = (len(masks), 2 * length)
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

    def parts(self) -> dict[str, Callable[[], Any]]:
        """Work of the parts of one step of ours, all blocks of it, on random tensors of its shapes."""
        key, model, blocks = (0, 0), self.model, self.shape.num_layers
        batch = self.noised(self.tokens[0], key).micro_batches[0].to(self.device)
        weight = next(model.parameters())
        heads, width, hidden = self.shape.num_heads, self.shape.head_dim, self.shape.hidden_size
        tokens, fed, last = len(batch.tokens), len(batch.last.fed), model.layers[str(blocks - 1)]

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=weight.dtype, device=self.device, requires_grad=True)

        q, (k, v) = random(tokens, heads, width), (random(tokens, self.shape.kv_heads, width) for _ in range(2))
        some, x, y = random(fed, heads, width), random(tokens, 1, hidden), random(fed, 1, hidden)
        z = random(len(batch.places), hidden)
        grads = [torch.randn_like(t) for t in (q, some, x, y)]

        def attention() -> None:
            for block in range(blocks):
                attend, queries, grad = (
                    (batch.attend, q, grads[0]) if block < blocks - 1 else (batch.last, some, grads[1])
                )
                torch.autograd.backward(attend(block, queries, k, v), grad)

        def mlp() -> None:
            for block in model.layers.values():
                fed_to, grad = (x, grads[2]) if block is not last else (y, grads[3])
                torch.autograd.backward(block.mlp(fed_to), grad)

        def head_loss() -> None:
            tied = model.embedding.weight if model.head.weight is None else None
            model.head(z, tied, batch.targets).sum().backward()

        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        data = partial(self.noised, self.tokens[0], key)
        return dict(zip(PARTS, (attention, mlp, head_loss, self._update_again, data), strict=True))

    def _update_again(self) -> None:
        self.update()
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)


def fitting(size: str, device: torch.device) -> ModelConfig:
    """The shape of a size; on a GPU with as many layers as leave half of its memory to activations.

    A parameter takes 22 bytes: bf16 weight and gradient, fp32 master weight, its gradient, and two moments.
    """
    shape = ModelConfig(**SIZES[size])
    if device.type != "cuda":
        return shape
    room = torch.cuda.get_device_properties(device).total_memory // 2 - 22 * num_parameters(shape)
    layers = shape.num_layers + min(0, room // (22 * layer_parameters(shape)))
    return shape.model_copy(update={"num_layers": max(layers, 1)})


def seconds_of(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """(seconds of the clock, CPU-seconds) that `work` takes; on a GPU twice those of its events."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        end.synchronize()
        return (start.elapsed_time(end) / 1000,) * 2
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - cpu


def peak_of(size: str, alpha_0: float, rows: int, kind: str) -> float:
    """MiB that a process holds at most that makes two steps of a kind."""
    words = [f"--sizes={size}", f"--alphas={alpha_0}", f"--rows={rows}", f"--peak-of={kind}"]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return float(done.stdout)


def peak_here(size: str, alpha_0: float, rows: int, kind: str) -> float:
    """The same of this process, less what it held before."""
    before = resident("VmRSS")
    steps = Steps(size, alpha_0, rows, torch.device("cpu"))
    for _ in range(2):
        steps.run(kind)
    return resident("VmHWM") - before


def resident(name: str) -> float:
    """MiB of this process's memory now (VmRSS) or at most (VmHWM); unlike getrusage's, without what its parent had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 2**10


def check_losses(steps: Steps) -> float:
    """Ours, which must be the reference's."""
    with torch.no_grad():
        losses = [steps.ours(steps.tokens[0], (0, 0)).item(), steps.reference(steps.tokens[0], (0, 0)).item()]
    if abs(losses[0] - losses[1]) > (1e-5 if steps.device.type == "cpu" else 2e-2) * losses[1]:
        raise SystemExit(
            f"alpha_0 = {steps.objective.alpha_0:g}: loss {losses[0]:.7f}, the reference's way {losses[1]:.7f}"
        )
    return losses[0]


def check_compiled(steps: Steps, times: int = 4) -> None:
    """The loss and every gradient of several batches must be those without compilation, also where graphs are replayed."""
    most = 1e-3 if steps.device.type == "cpu" else 5e-2

    def loss_and_gradients(step: int) -> tuple[float, dict[str, Tensor]]:
        loss = steps.ours(steps.tokens[step], (0, step))
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in steps.model.named_parameters() if p.grad is not None}
        steps.model.zero_grad()
        return loss.item(), gradients

    for step in range(times):
        with torch.compiler.set_stance("force_eager"):
            wanted, plain = loss_and_gradients(step)
        loss, gradients = loss_and_gradients(step)
        wrong = [
            n for n, g in gradients.items() if (g - plain[n]).float().norm() > most * plain[n].float().norm() + 1e-8
        ]
        if wrong or abs(loss - wanted) > most * wanted:
            raise SystemExit(f"compiled, step {step}: loss {loss:.6f} for {wanted:.6f}; other gradients: {wrong[:5]}")


def time_of(steps: Steps, kinds: Sequence[str], count: int) -> dict[str, dict[str, float]]:
    """Medians of each kind that fits into memory; the kinds take turns."""
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    peaks: dict[str, float] = {}
    for number in range(WARMUP + count):
        steps.step = number
        for kind in [kind for kind in kinds if kind in seconds]:
            if steps.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                steps.prepare(kind)
            try:
                took = seconds_of(partial(steps.run, kind), steps.device)
            except torch.OutOfMemoryError:
                del seconds[kind]
                steps.model.zero_grad()
                gc.collect()
                continue
            if number >= WARMUP:
                seconds[kind].append(took)
            if steps.device.type == "cuda":
                peaks[kind] = torch.cuda.max_memory_allocated() / 2**20
    out = {}
    for kind, found in seconds.items():
        clock, cpu = (statistics.median(x) for x in zip(*found, strict=True))
        out[kind] = {"seconds": clock, "cpu_seconds": cpu, "peak_mib": peaks.get(kind, 0.0)}
    return out


def measure(steps: Steps, size: str, option: str, args: argparse.Namespace, peak: float) -> dict[str, Any]:
    """Medians of one size, alpha_0 and option."""
    alpha_0, on_cpu = steps.objective.alpha_0, steps.device.type == "cpu"
    out: dict[str, Any] = {"size": size, "layers": steps.shape.num_layers, "alpha_0": alpha_0, "option": option}
    out |= {"rows": steps.rows, "capacity": steps.capacity}
    if option in ("compile", "graphs"):
        with contextlib.suppress(torch.OutOfMemoryError):
            check_compiled(steps)
    if option == "plain":
        try:
            out["loss"] = check_losses(steps)
        except torch.OutOfMemoryError:
            out["loss"] = None  # the reference's way does not fit
    timed = time_of(steps, KINDS if option == "plain" else KINDS[:1], args.steps)
    if "ours" not in timed:
        return out
    for kind, found in timed.items():
        if on_cpu and option == "plain" and not args.no_peaks:
            found["peak_mib"] = round(peak_of(size, alpha_0, steps.rows, kind), 1)
        out[kind] = found
    count, seconds = steps.rows * steps.shape.seq_length, timed["ours"]["seconds"]
    flops = count * flops_per_token(steps.shape, steps.objective)
    out["tokens_per_second"] = count / seconds
    if on_cpu:  # what others take of a shared machine is not the step's
        seconds = timed["ours"]["cpu_seconds"] / torch.get_num_threads()
    out |= {"tflops": flops / seconds / 1e12, "mfu": flops / seconds / peak}
    for kind in timed.keys() - {"ours"}:
        out[f"{kind}_over_ours"] = timed[kind]["cpu_seconds"] / timed["ours"]["cpu_seconds"]
    if option == "plain":
        found = {}
        for name, work in steps.parts().items():
            work()
            found[name] = statistics.median(seconds_of(work, steps.device)[1] for _ in range(args.steps))
        steps.model.zero_grad()
        found["rest"] = max(timed["ours"]["cpu_seconds"] - sum(found.values()), 0.0)
        out["parts"] = found
    return out


def table_of(found: list[dict[str, Any]], title: str) -> Table:
    """The medians, and ratios to ours."""
    table = Table(title=title)
    names = ("size", "alpha_0", "option", "ours s", "tokens/s", "TFLOP/s", "MFU", "MiB", "reference /", "MiB", "ar /")
    for name in (*names, *PARTS, "rest"):
        table.add_column(name, justify="right")
    for row in [row for row in found if "ours" in row]:
        cells = [
            f"{row['size']} ({row['layers']})",
            f"{row['alpha_0']:g}",
            row["option"],
            f"{row['ours']['cpu_seconds']:.3f}",
        ]
        cells += [f"{row['tokens_per_second']:,.0f}", f"{row['tflops']:.2f}", f"{row['mfu']:.1%}"]
        cells += [f"{row['ours']['peak_mib']:.0f}", f"{row.get('reference_over_ours', 0):.2f}"]
        cells += [f"{row.get('reference', {}).get('peak_mib', 0):.0f}", f"{row.get('ar_over_ours', 0):.2f}"]
        cells += [f"{seconds / row['ours']['cpu_seconds']:.0%}" for seconds in row.get("parts", {}).values()]
        table.add_row(*cells)
    return table


def draw(found: list[dict[str, Any]], picture: Path, title: str) -> None:
    """Shares of a step's time, and MFU, by size and alpha_0."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in found if "parts" in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.2 + 0.5 * max(len(rows), len(found))))
    names, start = [f"{row['size']}, {row['alpha_0']:g}" for row in rows], np.zeros(len(rows))
    for part in (*PARTS, "rest"):
        share = np.array([row["parts"][part] / row["ours"]["cpu_seconds"] for row in rows])
        left.barh(names, share, left=start, label=part.replace("_", ", "))
        start += share
    left.set(title="share of a step, by size and alpha_0", xlabel="parts timed by themselves")
    left.invert_yaxis()
    left.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.25), ncols=3)
    done = [row for row in found if "mfu" in row]
    right.barh(
        [f"{row['size']}, {row['alpha_0']:g}, {row['option']}" for row in done], [100 * row["mfu"] for row in done]
    )
    right.set(title="MFU in percent", xlabel=title)
    right.invert_yaxis()
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def below_bars(found: list[dict[str, Any]], device: torch.device) -> list[str]:
    """A line for each number that misses its bar."""
    out = []
    if device.type == "cpu":
        for row in found:
            if row["size"] == "mid" and row["option"] == "plain" and (bar := BARS.get(row["alpha_0"])):
                if row["reference_over_ours"] < bar:
                    out.append(f"alpha_0 = {row['alpha_0']:g}: {row['reference_over_ours']:.2f} is below {bar}")
                if row["ours"]["peak_mib"] > row["reference"]["peak_mib"]:
                    out.append(f"alpha_0 = {row['alpha_0']:g}: more memory than the reference's way")
        return out
    for (size, alpha_0), (name, bar) in GPU_BARS.items():
        best = max((row.get(name, 0) for row in found if (row["size"], row["alpha_0"]) == (size, alpha_0)), default=bar)
        if best < bar:
            out.append(f"{size}, alpha_0 = {alpha_0:g}: {name} {best:,.3g} is below {bar:,.3g}")
    return out


def peak_of_device(tflops: float | None, device: torch.device) -> float:
    """FLOP/s: as given, by a GPU's name, or the best of a large matrix product on this CPU, by CPU-seconds as all else."""
    if tflops is not None or device.type == "cuda":
        return peak_flops(SimpleNamespace(train=SimpleNamespace(peak_tflops=tflops)), device)  # type: ignore[arg-type]
    a = torch.randn(2048, 2048)
    best = min(seconds_of(lambda: a @ a, device)[1] for _ in range(6))
    return 2 * 2048**3 / best * torch.get_num_threads()


def roofline(sizes: str, alphas: str, peak: float, bandwidth: float) -> Table:
    """The least time of a step of each size: its arithmetic at peak, and its bytes at the memory's speed.

    Bytes: 34 for a parameter (fp32 master weight and two moments read and written, gradient read twice and written once more
    in fp32, weight written), and for each token of a block what its operators outside of matrix products read and write in
    bf16: norms, residuals and rotary embedding 24 H, attention 4 H, the MLP's activation 3 F; three times, for backward.
    """
    table = Table(title=f"peak {peak / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.1f} TB/s")
    names = (
        "size",
        "parameters",
        "alpha_0",
        "rows",
        "TFLOP",
        "of which head",
        "ms at peak",
        "GB",
        "ms of bytes",
        "tokens/s at peak",
    )
    for name in names:
        table.add_column(name, justify="right")
    for size, alpha_0 in itertools.product(sizes.split(","), map(float, alphas.split(","))):
        shape, objective, rows = ModelConfig(**SIZES[size]), ObjectiveConfig(alpha_0=alpha_0), ROWS.get(size, 8)
        tokens, packed = (
            rows * shape.seq_length,
            rows * shape.seq_length * (1 + (1 - objective.fraction) * (1 - alpha_0)),
        )
        flops = tokens * flops_per_token(shape, objective)
        without = shape.model_copy(update={"vocab_size": 2})
        head = flops - tokens * flops_per_token(without, objective)
        moved = 34 * num_parameters(shape)
        moved += 3 * 2 * packed * shape.num_layers * (28 * shape.hidden_size + 3 * shape.ffn_size)
        cells = [
            size,
            f"{num_parameters(shape) / 1e6:.0f}M",
            f"{alpha_0:g}",
            str(rows),
            f"{flops / 1e12:.2f}",
            f"{head / flops:.0%}",
        ]
        cells += [f"{1e3 * flops / peak:.1f}", f"{moved / 1e9:.1f}", f"{1e3 * moved / bandwidth:.1f}"]
        table.add_row(*cells, f"{tokens * peak / flops:,.0f}")
    return table


def matrix(args: argparse.Namespace, device: torch.device, peak: float) -> Iterator[dict[str, Any]]:
    """All sizes, options and alpha_0, compiled ones last."""
    alphas = [float(x) for x in args.alphas.split(",")]
    for size in args.sizes.split(","):
        steps = Steps(size, alphas[0], args.rows or ROWS.get(size, 8), device)
        for option in [option for option in OPTIONS if option in args.options.split(",")]:
            if option in ("compile", "graphs"):
                torch._dynamo.reset()  # blocks of all sizes share their code, and the number of graphs for one is limited
                steps.model.compile_blocks(cuda_graphs=option == "graphs")
            for alpha_0 in alphas:
                if time.monotonic() > args.until:
                    sys.stderr.write(f"{size} {option} {alpha_0:g}: left out, the budget is spent\n")
                    continue
                steps.choose(alpha_0, recompute=option == "recompute")
                row = measure(steps, size, option, args, peak)
                sys.stderr.write(f"{size} {option} {alpha_0:g}: {row.get('tokens_per_second', 0):,.0f} tokens/s\n")
                yield row
        del steps
        gc.collect()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--sizes", default="124m,1.7b,7b" if gpu else "mid", help=f"of {', '.join(SIZES)}")
    parser.add_argument(
        "--alphas", default="1,0.25,0" if gpu else "1,0.5,0.25,0", help="alpha_0 of each line of the table"
    )
    parser.add_argument(
        "--options", default="plain,recompute,compile,graphs" if gpu else "plain", help=f"of {', '.join(OPTIONS)}"
    )
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each kind (default: 5)")
    parser.add_argument("--rows", type=int, help="rows in a step (default: by size)")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--peak-tflops", type=float, help="of the device (default: by name, or measured on a CPU)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--picture", type=Path, help="draw the parts of a step and MFU into this PNG")
    parser.add_argument(
        "--roofline", action="store_true", help="print the floor of a step on an H200, and measure nothing"
    )
    parser.add_argument("--bars", action="store_true", help="judge the bars of an H200")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which nothing more is begun")
    parser.add_argument("--no-peaks", action="store_true", help="leave out the memory of a CPU's steps")
    parser.add_argument("--peak-of", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.until = time.monotonic() + args.budget
    if args.peak_of:
        print(peak_here(args.sizes, float(args.alphas), args.rows, args.peak_of))
        return 0
    if args.roofline:
        Console(width=140).print(roofline(args.sizes, args.alphas, 989e12, 4.8e12))
        return 0
    device = torch.device(args.device)
    kernels = flash.choose(device)
    peak = peak_of_device(args.peak_tflops, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"{name}, peak {peak / 1e12:.3g} TFLOP/s, medians of {args.steps}"
    out: dict[str, Any] = {
        "device": name,
        "peak_tflops": peak / 1e12,
        "steps": args.steps,
        "torch": torch.__version__,
        "kernels": kernels,
    }
    out["runs"] = []
    for row in matrix(args, device, peak):
        out["runs"].append(row)
        if args.json:  # as it grows: a run that is cut off leaves what it has
            args.json.write_text(json.dumps(out, indent=1) + "\n")
    Console(stderr=True, width=170).print(table_of(out["runs"], title))
    print(json.dumps(out, indent=1))
    if args.picture:
        draw(out["runs"], args.picture, title)
    low = below_bars(out["runs"], device) if args.bars or (device.type == "cpu" and not args.no_peaks) else []
    sys.stderr.writelines(line + "\n" for line in low)
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main())
