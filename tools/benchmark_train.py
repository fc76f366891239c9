"""A training step of the product against the reference's way of computing it, and against a plain autoregressive step.

    python tools/benchmark_train.py [--sizes mid] [--alphas 1,0.5,0.25,0] [--options plain] [--steps 5] [--rows 8]
                                    [--json FILE] [--picture FILE] [--bars]

`ours` is what `esolm train` does in a step: rows drawn, noised, packed and pinned one step ahead by the trainer's thread,
`Engine.try_step` with DeepSpeed's ZeRO-1, gradient clipping, AdamW and the moving average; of a configuration in configs/ with
one micro-batch a step, on random tokens. The baselines are written here, on the same network, rows, noise and step of the
optimizer. `reference`: diffusion rows under causal attention, sequential rows as 2L tokens under a dense 2L x 2L mask, logits
of all places. `ar`: all rows left to right under causal attention, logits of all places.

Medians are in seconds of the clock on a GPU, where one kind follows the other, and in CPU-seconds elsewhere, where they take
turns. Peak memory: of a process that makes two steps of one kind; on a GPU, what is allocated. Losses and gradient norms of
ours, under every option, and of the reference must agree, or nothing is compared.

options, joined by +: `plain`, `recompute` (blocks computed again in backward), `compile` (blocks compiled), `graphs` (and
replayed as CUDA graphs), `dropout` (the paper's 0.1; the network draws it, so its losses are not compared),
`fp8` (matrices of blocks multiplied in fp8, which rounds otherwise, so neither are these).
MFU = model FLOPs / (seconds x peak), by CPU-seconds on a CPU, where model FLOPs are `model/size.py:flops_per_token` x tokens
of the data: what the method needs, without recomputation, spare mask places, or norms. Parts are shares of one step of
ours by its profile. On a GPU the sizes are 124m, 1.7b and a slice of 7b with as many layers as fit, in bf16 with fp32 master
weights; elsewhere mid. --profile: tables of kernels instead. Exits with 1 where losses differ or, with --bars, a bar is missed.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from profiled import PARTS, kernel_rows, kernel_table, parts_of, shortened
from rich.console import Console
from rich.table import Table
from torch import Tensor

from esolm_megatron.config import Config, ConfigError, load, with_values
from esolm_megatron.data.stream import Batch
from esolm_megatron.errors import UserError
from esolm_megatron.model.layers import PlainLinears
from esolm_megatron.model.size import flops_per_token, layer_parameters, num_parameters, run_capacity
from esolm_megatron.model.transformer import EsoLM, initialise
from esolm_megatron.objective.esolm import draw_diffusion, draw_sequential
from esolm_megatron.parallel import pipeline
from esolm_megatron.parallel.engine import Engine
from esolm_megatron.plan import plan
from esolm_megatron.train.collate import CollateAhead, noising
from esolm_megatron.train.metrics import peak_flops

CONFIGS = Path(__file__).parent.parent / "configs"
PAPER, V = "paper/124m_alpha0p25.yaml", "model.vocab_size=50258"


class Size(NamedTuple):
    """A file of configs/, rows in a step, and what differs from the file."""

    path: str
    rows: int
    words: tuple[str, ...]


def small(hidden: int, layers: int, heads: int, length: int, vocab: int) -> tuple[str, ...]:
    """The paper's shape, but smaller."""
    values = {
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "seq_length": length,
        "vocab_size": vocab,
    }
    return tuple(f"model.{name}={value}" for name, value in values.items())


SIZES = {
    "tiny": Size(PAPER, 4, small(32, 2, 2, 32, 97)),
    "mid": Size(PAPER, 8, small(256, 6, 4, 512, 8192)),
    "124m": Size(PAPER, 32, ()),
    "1.7b": Size("scale/1p7b.yaml", 8, (V,)),
    "7b": Size("scale/7b.yaml", 4, (V, "model.seq_length=2048", "parallel.tensor_size=1", "parallel.sequence_parallel=false")),
}  # fmt: skip
ALIKE = ("data.path=unread", "objective.diffusion_fraction=null", "optim.schedule=constant", "optim.warmup_steps=0",
         "parallel.zero_stage=1", "parallel.recompute=none", "train.compile=false", "model.dropout=0")  # fmt: skip
"""What the files differ in and the benchmark does not; an option sets some of it."""
OPTIONS = {"plain": (), "recompute": ("parallel.recompute=full",), "compile": ("train.compile=true",),
           "graphs": ("train.compile=true", "train.cuda_graphs=true"), "dropout": ("model.dropout=0.1",),
           "fp8": ("train.fp8=tensorwise",)}  # fmt: skip
KINDS = ("ours", "reference", "ar")
BARS = {1.0: 1.3, 0.5: 1.6, 0.25: 1.35, 0.0: 1.3}
"""Least ratio of the reference's time to ours, at the size `mid` on a CPU."""
GPU_BARS = {
    ("124m", 1.0, ""): ("tokens_per_second", 600e3),
    ("124m", 0.25, ""): ("tokens_per_second", 400e3),
    ("124m", 1.0, "dropout"): ("tokens_per_second", 570e3),
    ("124m", 0.25, "dropout"): ("tokens_per_second", 380e3),
    ("1.7b", 1.0, ""): ("mfu", 0.55),
    ("1.7b", 0.25, ""): ("mfu", 0.5),
    ("1.7b", 1.0, "fp8"): ("tokens_per_second", 65e3),
    ("7b", 1.0, ""): ("mfu", 0.55),
}
"""(size, alpha_0, what changes the numbers) -> least tokens/s and MFU on one H200, of the best of the options."""
BYTES_PER_PARAMETER = 26
"""bf16 weight and gradient, and in fp32 the gradient, master weight, two moments, and moving average, rounded up."""


def config_of(size: str, alpha_0: float, option: str, rows: int | None, device: torch.device) -> Config:
    """The run that is timed; on a GPU with as many layers as leave half of the memory to activations."""
    path, usual, words = SIZES[size]
    chosen = [word for name in option.split("+") for word in OPTIONS[name]]
    gpu, rows = device.type == "cuda", rows or usual
    words = (*words, f"objective.alpha_0={alpha_0:g}", f"train.global_batch_size={rows}", f"train.micro_batch_size={rows}",
             f"train.device={device.type}", f"train.precision={'bf16' if gpu else 'fp32'}")  # fmt: skip
    config = load(CONFIGS / path, [*ALIKE, *words, *chosen])
    if not gpu:
        return config
    room = torch.cuda.get_device_properties(device).total_memory // 2 - BYTES_PER_PARAMETER * num_parameters(
        config.model
    )
    layers = config.model.num_layers + min(0, room // (BYTES_PER_PARAMETER * layer_parameters(config.model)))
    return with_values(config, model={"num_layers": max(layers, 1)})


LARGE = 5e8
"""Parameters from which weights are drawn on the device: a run draws them on the host, which takes half a minute and more."""


@torch.no_grad()
def drawn_there(model: EsoLM, seed: int, width_ratio: float = 1.0) -> None:
    """Fill a model on its device, at any width alike; rows that pad the vocabulary stay 0."""
    generator = torch.Generator(model.embedding.weight.device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_("norm" in name and name.endswith("weight"))
            continue
        whole = parameter[: model.shape.vocab] if name in ("embedding.weight", "head.weight") else parameter
        parameter.zero_()
        whole.copy_(torch.randn(whole.shape, generator=generator, device=whole.device) * model.shape.init_std)


@contextlib.contextmanager
def filling(config: Config) -> Iterator[Callable[[EsoLM, int], None]]:
    """How a model is filled, ours and the baselines' alike."""
    fill = initialise if num_parameters(config.model) < LARGE else drawn_there
    with mock.patch.object(pipeline, "initialise", fill):
        yield fill


class RandomRows:
    """Batches of random tokens in the place of a run's feed: each a function of its number."""

    def __init__(self, config: Config):
        self.config, self.engine = config, SimpleNamespace(shares_rows=False)

    def batches(self, first: int) -> Iterator[tuple[int, Batch]]:
        """(number, batch) from number `first` on."""
        rows = np.arange(self.config.train.global_batch_size)
        for number in itertools.count(first):
            tokens = self.tokens(number, (len(rows), self.config.model.seq_length))
            yield number, Batch(tokens, np.ones_like(tokens, bool), rows, rows, [rows[:0]] * len(rows))

    def tokens(self, number: int, shape: tuple[int, int]) -> np.ndarray:
        """Those of one batch."""
        return np.random.default_rng(number).integers(0, self.config.model.mask_id, shape)

    def stop_reading(self) -> None:
        """Nothing is read."""


class Ours:
    """Steps as the trainer makes them."""

    def __init__(self, config: Config, kind: str = "ours"):
        self.config, self.count = config, 0
        with filling(config):
            self.engine = Engine(config)
        self.parameters = [owned.parameter for owned in self.engine.owned]
        make = noising(config, self.engine)
        feed: Any = RandomRows(config)
        self.ahead = CollateAhead(feed, 0, lambda batch, step: self.engine.stage(make(batch, step)))

    def step(self) -> tuple[float, float]:
        """Loss and gradient norm of the next optimizer step."""
        self.count += 1
        _, staged = self.ahead.next(self.count)
        result, _ = self.engine.try_step(staged, self.config.optim.lr, lambda loss, norm: None)
        return result.loss, result.grad_norm

    def close(self) -> None:
        """Leave the run, so that another engine can be made; DeepSpeed's hooks would keep the memory of this one."""
        self.ahead.__exit__(None, None, None)
        self.engine.deepspeed.destroy()
        self.engine.close()


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


class Streams(NamedTuple):
    """Rows as a baseline feeds them: tokens and positions (B, n L), n streams one behind the other, and of the last stream
    the targets and what each loss counts (B, L).
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor

    def pinned(self) -> "Streams":
        """A copy that a GPU can take beside other work."""
        return Streams(*(x.pin_memory() for x in self))

    def to(self, device: torch.device) -> "Streams":
        """A copy there."""
        return Streams(*(x.to(device, non_blocking=True) for x in self))


class Baseline:
    """Steps of the same network in another way, with torch's own fused optimizer, clipping and moving average."""

    def __init__(self, config: Config, kind: str):
        self.config, self.shape, self.count = config, config.model, 0
        gpu = config.train.device == "cuda"
        self.device = torch.device(config.train.device)
        with filling(config) as fill:
            self.model = EsoLM(self.shape, PlainLinears(torch.bfloat16 if gpu else torch.float32, self.device))
            fill(self.model, config.seed)
        self.parameters = list(self.model.parameters())
        self.masters = [p.detach().float() for p in self.parameters] if gpu else self.parameters
        self.average = [p.detach().float().clone() for p in self.masters]
        o = config.optim
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=True
        )
        length = self.shape.seq_length
        order = torch.arange(length, device=self.device)
        clean, masks = order[:, None] >= order, order[:, None] > order
        eye = torch.eye(length, dtype=torch.bool, device=self.device)
        self.seen = torch.cat([torch.cat([clean, ~(clean | True)], 1), torch.cat([masks, eye], 1)])
        make, feed = getattr(self, kind), cast(Any, RandomRows(config))

        def made(batch: Batch, step: int) -> list[Streams]:
            return [x.pinned() if gpu else x for x in make(batch, step)]

        self.ahead = CollateAhead(feed, 0, made)

    def step(self) -> tuple[float, float]:
        """Loss and gradient norm of the next optimizer step."""
        self.count += 1
        total = torch.zeros((), device=self.device)
        for made in self.ahead.next(self.count)[1]:
            total = total + self.loss(made.to(self.device))
        total.backward()
        return total.item(), self.update().item()

    @torch.no_grad()
    def update(self) -> Tensor:
        """Clip, update, and average; returns the norm of the gradients."""
        o, own = self.config.optim, self.parameters
        if self.masters[0] is not own[0]:
            for master, parameter in zip(self.masters, own, strict=True):
                master.grad = None if parameter.grad is None else parameter.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(self.masters, o.clip_grad)
        self.optimizer.step()
        if self.masters[0] is not own[0]:
            torch._foreach_copy_(own, self.masters)
        torch._foreach_lerp_(self.average, self.masters, 1 - o.ema_decay)
        self.optimizer.zero_grad()
        self.model.zero_grad()
        return norm

    def loss(self, made: Streams) -> Tensor:
        """Mean loss per token of the last stream; one stream is causal, two are under the dense mask."""
        streams = made.tokens.shape[1] // made.targets.shape[1]
        attend = Dense(made.tokens.shape[1], self.seen if streams == 2 else None)
        logits = self.model(made.tokens.flatten(), made.positions.flatten(), attend)
        logits = logits.view(*made.tokens.shape, -1)[:, -made.targets.shape[1] :].flatten(0, 1)
        losses = F.cross_entropy(logits, made.targets.flatten(), reduction="none")
        return (losses * made.weights.flatten().to(losses)).sum() / made.targets.numel()

    def reference(self, batch: Batch, step: int) -> list[Streams]:
        """The rows with the noise of ours, not packed: diffusion ones, and sequential ones as 2L tokens."""
        objective, key = self.config.objective, (self.config.seed, step)
        count, out = round(len(batch.rows) * objective.fraction), []
        first, rest = slice(0, count), slice(count, None)
        if count:
            drawn = draw_diffusion(batch.tokens[first], batch.valid[first], batch.rows[first], count, objective, *key)
            out.append(self.streams([np.where(drawn.masked, self.shape.mask_id, drawn.tokens)], drawn))
        if count < len(batch.rows):
            capacity = run_capacity(self.config)
            drawn = draw_sequential(
                batch.tokens[rest], batch.valid[rest], batch.rows[rest], objective.alpha_0, capacity, *key
            )
            out.append(self.streams([drawn.tokens, np.where(drawn.masked, self.shape.mask_id, drawn.tokens)], drawn))
        return out

    @staticmethod
    def streams(fed: list[np.ndarray], drawn: Any) -> Streams:
        """These streams, in the order of generation."""
        in_order = [np.take_along_axis(x, drawn.order, 1) for x in (*fed, drawn.tokens, drawn.weights)]
        positions = np.concatenate([drawn.order] * len(fed), 1)
        return Streams(
            *map(torch.from_numpy, (np.concatenate(in_order[: len(fed)], 1), positions, *in_order[len(fed) :]))
        )

    def ar(self, batch: Batch, step: int) -> list[Streams]:
        """All rows from left to right; as many targets as there are tokens."""
        positions = np.broadcast_to(np.arange(self.shape.seq_length), batch.tokens.shape).copy()
        fed, weights = np.roll(batch.tokens, 1, axis=1), np.ones(batch.tokens.shape)
        return [Streams(*map(torch.from_numpy, (fed, positions, batch.tokens, weights)))]

    def close(self) -> None:
        """End the thread that draws."""
        self.ahead.__exit__(None, None, None)


def steps_of(kind: str, config: Config) -> Ours | Baseline:
    """Steps of one kind, from the first one on."""
    return (Ours if kind == "ours" else Baseline)(config, kind)


def resident(name: str) -> float:
    """MiB of this process's memory now (VmRSS) or at most (VmHWM); unlike getrusage's, without what its parent had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 2**10


def peak_of(config: Config, kind: str) -> float:
    """MiB that another process holds at most, above what it began with, which makes two steps of a kind."""
    words = [sys.executable, __file__, "--peak-of", kind]
    done = subprocess.run(words, input=config.model_dump_json(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the process that measures the memory of {kind} failed:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def peak_here(config: Config, kind: str) -> float:
    """The same of this process."""
    before = resident("VmRSS")
    steps = steps_of(kind, config)
    steps.step(), steps.step()
    return resident("VmHWM") - before


class Case(NamedTuple):
    """What is timed together."""

    size: str
    alpha_0: float
    option: str
    kinds: tuple[str, ...]


def rows_of(case: Case, args: argparse.Namespace, peak: float) -> Iterator[dict[str, Any]]:
    """Medians of one case, a row for each kind: {size, layers, alpha_0, option, kind, rows, ...}; or why there are none."""
    device = torch.device(args.device)
    base = {"size": case.size, "alpha_0": case.alpha_0, "option": case.option}
    try:
        config = config_of(case.size, case.alpha_0, case.option, args.rows, device)
    except ConfigError as refusal:
        yield {**base, "kind": "ours", "refused": str(refusal)}
        return
    base |= {
        "layers": config.model.num_layers,
        "rows": config.train.global_batch_size,
        "capacity": run_capacity(config),
    }
    running: dict[str, Any] = {}
    took: dict[str, list[tuple[float, float, float, float]]] = {}
    free_memory(device)
    try:
        for kind in case.kinds:
            running[kind], took[kind] = steps_of(kind, config), []
        warmup = 3 if device.type == "cuda" else 1  # shapes that vary are compiled anew in the second step
        for _ in range(warmup + args.steps):
            for kind, steps in running.items():
                clock, cpu = time.perf_counter(), time.process_time()
                loss, norm = steps.step()  # both are read, so a GPU is done
                took[kind].append((time.perf_counter() - clock, time.process_time() - cpu, loss, norm))
        for kind in case.kinds:
            clocks, cpus, losses, norms = (list(x) for x in zip(*took[kind], strict=True))
            row = {**base, "kind": kind, "seconds": statistics.median(clocks[warmup:]), "first_seconds": clocks[0]}
            row |= {"cpu_seconds": statistics.median(cpus[warmup:]), "losses": losses, "grad_norms": norms}
            row["each"] = (clocks if device.type == "cuda" else cpus)[warmup:]
            if device.type == "cuda":
                row["peak_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
            elif not args.no_peaks:
                row["peak_mib"] = peak_of(config, kind)
            if isinstance(running[kind], Ours):
                row |= {
                    "planned_mib": plan(config, 1, mfu=0.4).memory_per_rank / 2**20,  # of a GPU
                    "parts": parts_of(kernel_table(running[kind].step, device)),
                    "providers": running[kind].engine.providers,
                }
            yield row | speed_of(row, config, peak)
    except (torch.OutOfMemoryError, UserError) as error:  # as torchao that is missing
        yield {**base, "kind": "+".join(case.kinds), "refused": str(error).splitlines()[0]}
    finally:
        for steps in running.values():
            steps.close()
        del running


def free_memory(device: torch.device) -> None:
    """Give back what closed steps held; what they compiled is not kept, because the number of graphs for one code is limited."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def speed_of(row: dict[str, Any], config: Config, peak: float) -> dict[str, float]:
    """Tokens of the data in a second of the clock, and, of ours, what the model's arithmetic makes of the device."""
    count, seconds = row["rows"] * config.model.seq_length, row["seconds"]
    out = {"tokens_per_second": count / seconds}
    if row["kind"] == "ours":
        if config.train.device == "cpu":  # what others take of a shared machine is not the step's
            seconds = row["cpu_seconds"] / torch.get_num_threads()
        flops = count * flops_per_token(config.model, config.objective)
        out |= {"tflops": flops / seconds / 1e12, "mfu": flops / seconds / peak}
    return out


def cost(row: dict[str, Any], device: torch.device) -> float:
    """What a step is judged by."""
    return row["seconds" if device.type == "cuda" else "cpu_seconds"]


def times(other: dict[str, Any], row: dict[str, Any], device: torch.device) -> float:
    """How many times `row` the other one costs; where both took turns, the median over turns, which a change of the machine's
    speed leaves alone.
    """
    if device.type == "cuda" or len(other["each"]) != len(row["each"]):
        return cost(other, device) / cost(row, device)
    return statistics.median(a / b for a, b in zip(other["each"], row["each"], strict=True))


def baseline(found: list[dict[str, Any]], row: dict[str, Any], kind: str) -> dict[str, Any] | None:
    """The row of a baseline for the same size and alpha_0, if it was timed."""
    same = [r for r in found if r["kind"] == kind and "seconds" in r]
    return next((r for r in same if (r["size"], r["alpha_0"]) == (row["size"], row["alpha_0"])), None)


def other_numbers(option: str) -> str:
    """What makes the losses of an option others than those of the reference; empty where nothing does."""
    return next((name for name in ("dropout", "fp8") if name in option.split("+")), "")


def differences(found: list[dict[str, Any]], device: torch.device) -> list[str]:
    """A line where losses or gradient norms of ours are not those of the reference, or of ours under another option."""
    out, most = [], (1e-5, 1e-3) if device.type == "cpu" else (2e-2, 5e-2)
    rows = [row for row in found if "losses" in row and row["kind"] != "ar" and not other_numbers(row["option"])]
    firsts: dict[tuple[str, float], dict[str, Any]] = {}
    for row in rows:
        first = firsts.setdefault((row["size"], row["alpha_0"]), row)
        for name, bound in zip(("losses", "grad_norms"), most, strict=True):
            for step, (a, b) in enumerate(zip(first[name], row[name], strict=False)):
                if not abs(a - b) <= bound * abs(a):
                    who = f"{first['kind']} {first['option']} {a:.7g}, {row['kind']} {row['option']} {b:.7g}"
                    out.append(f"{row['size']}, alpha_0 = {row['alpha_0']:g}, step {step}: {name}: {who}")
                    break
    return out


def table_of(found: list[dict[str, Any]], title: str, device: torch.device) -> Table:
    """The medians, and ratios to ours."""
    table = Table(title=title)
    names = ("size", "alpha_0", "option", "ours s", "tokens/s", "TFLOP/s", "MFU", "MiB", "reference /", "MiB", "ar /")
    for name in (*names, *PARTS, "rest"):
        table.add_column(name, justify="right")
    for row in [row for row in found if row["kind"] == "ours"]:
        cells = [f"{row['size']} ({row.get('layers', '')})", f"{row['alpha_0']:g}", row["option"]]
        if "refused" in row:
            table.add_row(*cells, "refused")
            continue
        cells += [f"{cost(row, device):.3f}", f"{row['tokens_per_second']:,.0f}", f"{row['tflops']:.2f}"]
        cells += [f"{row['mfu']:.1%}", f"{row.get('peak_mib', 0):.0f}"]
        for kind in KINDS[1:]:
            other = baseline(found, row, kind)
            cells += ["" if other is None else f"{times(other, row, device):.2f}"]
            if kind == "reference":
                cells += ["" if other is None else f"{other.get('peak_mib', 0):.0f}"]
        table.add_row(*cells, *(f"{share:.0%}" for share in row["parts"].values()))
    return table


def draw(found: list[dict[str, Any]], picture: Path, title: str) -> None:
    """Parts of a step's time, and MFU, by size and alpha_0."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in found if "parts" in row]
    names = [f"{row['size']}, {row['alpha_0']:g}, {row['option']}" for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.2 + 0.5 * max(len(rows), 1)))
    start = np.zeros(len(rows))
    for part in (*PARTS, "rest"):
        share = np.array([row["parts"][part] for row in rows])
        left.barh(names, share, left=start, label=part)
        start += share
    left.set(title="share of a step", xlabel="by its profile")
    left.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.25), ncols=3)
    right.barh(names, [100 * row["mfu"] for row in rows])
    right.set(title="MFU in percent", xlabel=title)
    for side in (left, right):
        side.invert_yaxis()
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def below_bars(found: list[dict[str, Any]], device: torch.device) -> list[str]:
    """A line for each bar that is missed, or was not measured."""
    out = []
    ours = [row for row in found if row["kind"] == "ours"]
    if device.type == "cpu":
        for alpha_0, bar in BARS.items():
            row = next((r for r in ours if (r["size"], r["alpha_0"], r["option"]) == ("mid", alpha_0, "plain")), None)
            other = row and baseline(found, row, "reference")
            if not row or not other:
                out.append(f"mid, alpha_0 = {alpha_0:g}: was not measured")
                continue
            ratio = times(other, row, device)
            if ratio < bar:
                out.append(f"mid, alpha_0 = {alpha_0:g}: reference / ours {ratio:.2f} is below {bar}")
            if row.get("peak_mib", 0) > other.get("peak_mib", 0):
                out.append(f"mid, alpha_0 = {alpha_0:g}: more memory than the reference's way")
        return out
    for (size, alpha_0, changed), (name, bar) in GPU_BARS.items():
        cells = [r for r in ours if (r["size"], r["alpha_0"], other_numbers(r["option"])) == (size, alpha_0, changed)]
        best = max((row[name] for row in cells if name in row), default=None)
        where = f"{size}, alpha_0 = {alpha_0:g}{changed and f', {changed}'}"
        if best is None:
            why = next((row["refused"] for row in cells if "refused" in row), "the budget was spent")
            out.append(f"{where}: {name} was not measured: {why}")
        elif best < bar:
            out.append(f"{where}: {name} {best:,.3g} is below {bar:,.3g}")
    return out


def peak_of_device(tflops: float | None, device: torch.device) -> float:
    """FLOP/s: as given, by a GPU's name, or the best of a large matrix product on this CPU, by CPU-seconds as all else."""
    if tflops is not None or device.type == "cuda":
        return peak_flops(SimpleNamespace(train=SimpleNamespace(peak_tflops=tflops)), device)  # type: ignore[arg-type]
    a, best = torch.randn(2048, 2048), float("inf")
    for _ in range(6):
        start = time.process_time()
        a @ a
        best = min(best, time.process_time() - start)
    return 2 * 2048**3 / best * torch.get_num_threads()


def roofline(sizes: str, alphas: str, peak: float, bandwidth: float) -> Table:
    """The least time of a step of each size: its arithmetic at peak, and its bytes at the memory's speed.

    Bytes: 34 for a parameter (fp32 master weight and two moments read and written, gradient read twice and written once more
    in fp32, weight written), and for each token of a block what its operators outside of matrix products read and write in
    bf16: norms, residuals and rotary embedding 24 H, attention 4 H, the MLP's activation 3 F; three times, for backward.
    """
    table = Table(title=f"peak {peak / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.1f} TB/s")
    names = ("size", "parameters", "alpha_0", "rows", "TFLOP", "of which head", "ms at peak", "GB", "ms of bytes")
    for name in (*names, "tokens/s at peak"):
        table.add_column(name, justify="right")
    for size, alpha_0 in itertools.product(sizes.split(","), map(float, alphas.split(","))):
        config = config_of(size, alpha_0, "plain", None, torch.device("cpu"))
        shape, objective, rows = config.model, config.objective, config.train.global_batch_size
        tokens = rows * shape.seq_length
        packed = tokens * (1 + (1 - objective.fraction) * (1 - alpha_0))
        flops = tokens * flops_per_token(shape, objective)
        head = flops - tokens * flops_per_token(shape.model_copy(update={"vocab_size": 2}), objective)
        moved = 34 * num_parameters(shape)
        moved += 3 * 2 * packed * shape.num_layers * (28 * shape.hidden_size + 3 * shape.ffn_size)
        cells = [size, f"{num_parameters(shape) / 1e6:.0f}M", f"{alpha_0:g}", str(rows), f"{flops / 1e12:.2f}"]
        cells += [f"{head / flops:.0%}", f"{1e3 * flops / peak:.1f}", f"{moved / 1e9:.1f}"]
        table.add_row(*cells, f"{1e3 * moved / bandwidth:.1f}", f"{tokens * peak / flops:,.0f}")
    return table


def cases_of(args: argparse.Namespace) -> list[Case]:
    """All sizes, alpha_0 and options; on a GPU those with a bar first, and baselines, alone, after all of ours."""
    alphas, sizes, options = map(float, args.alphas.split(",")), args.sizes.split(","), args.options.split(",")
    wanted = list(itertools.product(alphas, sizes, options))
    if torch.device(args.device).type == "cpu":  # turns, because a shared machine's speed varies
        return [Case(s, a, o, KINDS if o == options[0] else KINDS[:1]) for a, s, o in wanted]
    wanted.sort(key=lambda case: (case[1], case[0], other_numbers(case[2])) not in GPU_BARS)
    ours = [Case(s, a, o, KINDS[:1]) for a, s, o in wanted]
    others = [Case(s, a, "plain", (kind,)) for kind in KINDS[1:] for a, s, o in wanted if o == options[0]]
    return ours + others


def profiles(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The kernels of one step of ours, of each case."""
    device = torch.device(args.device)
    for case in [case for case in cases_of(args) if "ours" in case.kinds]:
        free_memory(device)
        steps = Ours(config_of(case.size, case.alpha_0, case.option, args.rows, device))
        for _ in range(3):
            steps.step()
        table = kernel_table(steps.step, device)
        steps.close()
        out = {"what": f"step {case.size}, alpha_0 = {case.alpha_0:g}, {case.option}", "parts": parts_of(table)}
        yield out | {"ms": sum(r["ms"] for r in table), "kernels": shortened(table, args.top)}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()

    def names(known: Any) -> Callable[[str], str]:
        def checked(text: str) -> str:
            for name in text.replace("+", ",").split(","):
                if name not in known:
                    raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
            return text

        return checked

    parser.add_argument("--sizes", type=names(SIZES), default="124m,1.7b,7b" if gpu else "mid", help=", ".join(SIZES))
    parser.add_argument("--alphas", default="1,0.25,0" if gpu else "1,0.5,0.25,0", help="alpha_0 of each line")
    usual = "compile,compile+dropout,compile+fp8" if gpu else "plain"
    parser.add_argument("--options", type=names(OPTIONS), default=usual, help=f"of {', '.join(OPTIONS)}; a+b is both")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each kind (default: 5)")
    parser.add_argument("--rows", type=int, help="rows in a step (default: by size)")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--peak-tflops", type=float, help="of the device (default: by name, or measured on a CPU)")
    parser.add_argument("--json", type=Path, help="also write the numbers here, as they come")
    parser.add_argument("--picture", type=Path, help="draw the parts of a step and MFU into this PNG")
    parser.add_argument("--roofline", action="store_true", help="print the floor of a step on an H200, measure nothing")
    parser.add_argument("--profile", action="store_true", help="tables of the kernels of a step of ours, instead")
    parser.add_argument("--top", type=int, default=40, help="kernels of a table in the JSON (default: 40)")
    parser.add_argument("--bars", action="store_true", help="judge the bars: of an H200, or of the size mid on a CPU")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which nothing more is begun")
    parser.add_argument("--no-peaks", action="store_true", help="leave out the memory of a CPU's steps")
    parser.add_argument("--peak-of", choices=KINDS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args, began = arguments(), time.monotonic()
    if args.peak_of:
        print(peak_here(Config.model_validate_json(sys.stdin.read()), args.peak_of))
        return 0
    if args.roofline:
        Console(width=140).print(roofline(args.sizes, args.alphas, 989e12, 4.8e12))
        return 0
    device, eye = torch.device(args.device), Console(stderr=True, width=170)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    out: dict[str, Any] = {"device": name, "steps": args.steps, "torch": torch.__version__, "rows": []}

    def keep(row: dict[str, Any]) -> None:
        out["rows"].append(row)
        if args.json:  # as it grows: a run that is cut off leaves what it has
            args.json.write_text(json.dumps(out, indent=1) + "\n")

    if args.profile:
        for found in profiles(args):
            keep(found)
            eye.print(kernel_rows(found))
        return 0
    peak = peak_of_device(args.peak_tflops, device)
    out["peak_tflops"] = peak / 1e12
    for case in cases_of(args):
        if time.monotonic() - began > args.budget:
            eye.print(f"{case}: left out, the budget is spent")
            continue
        for row in rows_of(case, args, peak):
            keep(row)
            said = row.get("refused") or f"{row['tokens_per_second']:,.0f} tokens/s"
            eye.print(f"{row['size']} {row['alpha_0']:g} {row['option']} {row['kind']}: {said}", highlight=False)
    title = f"{name}, peak {peak / 1e12:.3g} TFLOP/s, medians of {args.steps}"
    eye.print(table_of(out["rows"], title, device))
    wrong = differences(out["rows"], device)
    out["missed"] = [*wrong, *(below_bars(out["rows"], device) if args.bars else [])]
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")
    print(json.dumps(out, indent=1))
    if args.picture:
        draw(out["rows"], args.picture, title)
    sys.stderr.writelines(line + "\n" for line in out["missed"])
    return 1 if out["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
