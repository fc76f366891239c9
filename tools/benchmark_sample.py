r"""Sampling against three baselines in one run: how many tokens a second, and CPU-seconds.

    python tools/benchmark_sample.py                         # 124M on a CPU, some minutes
    python tools/benchmark_sample.py --shape toy --batch 1 16 --length 256 --steps 16 one
    python tools/benchmark_sample.py --device cuda --dtype bf16 --bars --batch --budget 80

Baselines, of the same random weights, written here:

    loop      the reference's loop: keys concatenated, eager attention under a materialised mask, the head on every fed
              row, fp64 noise of (batch, k, V), one schedule for the batch
    uncached  diffusion without a cache: the whole row in each pass, attention in both directions; two passes are timed
    ar        the same network left to right, one fed row a token, with our cache, products and draws

And two more ways of ours: `int8_cache`, and `proposals`, verified ones, as many as pay, of one token a pass.

Steps: T diffusion steps of the paper's schedule, or "one": one token a pass. All methods draw from the whole distribution.
On a CPU methods take turns, and the best of --repeats counts; on a GPU ours comes first, in all cells, called twice in each
because shapes are recorded in the first call, and a baseline that has taken 4 times ours is stopped: its cost is then a lower
bound. --budget: seconds after which no cell is begun. --bars: first the cells that have a bar, without `uncached`; exits with
1 where one is missed. --bar-cells: the same cells, not judged. --profile: tables of the kernels of ours instead, of a mean pass
of each cell.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from profiled import kernel_rows, kernel_table, parts_of, shortened
from rich.console import Console
from rich.table import Table
from torch import Tensor

from esolm_megatron.config import ModelConfig
from esolm_megatron.inference import SampleRequest, sample
from esolm_megatron.inference.decoding.cuda_graphs import RecordedPasses, Recorder, Size
from esolm_megatron.inference.decoding.draw import draw_tokens, fused_draw
from esolm_megatron.inference.decoding.scheduler import plan_rows
from esolm_megatron.model.cache import KVCache
from esolm_megatron.model.layers import PlainLinears
from esolm_megatron.model.products import FastProducts
from esolm_megatron.model.transformer import EsoLM, initialise

SHAPES = {
    "124m": {"num_layers": 12, "hidden_size": 768, "num_heads": 12, "vocab_size": 50258},
    "tiny": {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "vocab_size": 97},
    "toy": {"num_layers": 4, "hidden_size": 256, "num_heads": 4, "vocab_size": 50258},
}


# (batch, length, steps) -> least tokens/s or most ms of a pass on one H200 at 124M, or least times that a baseline costs
GPU_BARS = {
    (512, 1024, "16"): {"tokens/s": 800e3, "loop": 3.0},
    (1, 1024, "one"): {"ms": 0.30, "ar": 1.0, "loop": 3.0},
    (512, 1024, "128"): {"tokens/s": 350e3, "loop": 3.0},
    (1, 8192, "one"): {"ms": 0.40, "ar": 1.0, "loop": 3.0},
    (512, 1024, "1024"): {"tokens/s": 100e3, "loop": 3.0},
}
MOST_FIRST = 3.0
"""Seconds that the first call of ours may take longer than the second, on a GPU."""
ENOUGH = 4.0
"""Times ours after which a baseline is stopped on a GPU."""
CPU_BARS = {
    (1, 256, "16"): {"loop": 1.25},
    (1, 256, "one"): {"loop": 1.25, "ar": 1 / 1.15},
    (16, 256, "16"): {"loop": 1.6},
    (16, 256, "one"): {"loop": 1.6},
}
TOY_BARS = {(16, 256, "16"): {"loop": 2.5}, (16, 256, "one"): {"loop": 2.5}}


class ReferenceAttention:
    """Keys grow by concatenation; scores and mask are whole tensors."""

    def __init__(self, layers: int, batch: int):
        self.batch, self.mask = batch, torch.empty(0)
        self.kept: list = [None] * layers
        self.fed: list = [None] * layers

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mixed values."""
        q, k, v = (x.view(self.batch, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        if self.kept[layer] is not None:
            k, v = (torch.cat([a, b], 2) for a, b in zip(self.kept[layer], (k, v), strict=True))
        self.fed[layer] = k, v
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        out = scores.masked_fill(~self.mask, float("-inf")).softmax(-1) @ v
        return out.transpose(1, 2).reshape(-1, out.shape[1], out.shape[3])

    def keep(self, count: int) -> None:
        """Forget all but the first tokens."""
        self.kept = [(k[:, :, :count], v[:, :, :count]) for k, v in self.fed]


class Stopped(Exception):
    """A baseline has taken long enough."""


def stop_after(seconds: float, device: torch.device) -> Callable[[int], None]:
    """What a loop calls with the number of each pass; now and then, so that passes are not waited for one by one."""
    until = time.perf_counter() + seconds

    def check(number: int) -> None:
        if number % 32 == 31 and until < float("inf"):
            if device.type == "cuda":
                torch.cuda.synchronize()
            if time.perf_counter() > until:
                raise Stopped

    return check


@torch.no_grad()
def reference_loop(model: EsoLM, orders: Tensor, ks: list[int], check: Callable[[int], None]) -> Tensor:
    batch = len(orders)
    attend = ReferenceAttention(model.shape.num_layers, batch)
    fed, cached, done = torch.full_like(orders, model.shape.mask_id), 0, 0
    for number, k in enumerate(ks):
        check(number)
        end = done + k
        tokens = fed[:, cached:end]
        seen = torch.arange(end)[None] <= torch.arange(cached, end)[:, None]
        attend.mask = seen.to(orders.device).expand(batch, 1, -1, -1)
        logits = model(tokens.flatten(), orders[:, cached:end].flatten(), attend).view(batch, end - cached, -1)
        p = logits[:, done - cached :].double().softmax(-1)
        noise = 1e-10 - (torch.rand_like(p) + 1e-10).log()
        fed[:, done:end] = (p / noise).argmax(-1)
        attend.keep(done)
        cached, done = done, end
    return fed


@torch.no_grad()
def uncached(model: EsoLM, orders: Tensor, ks: list[int]) -> Tensor:
    batch, length = orders.shape
    fed, done = torch.full_like(orders, model.shape.mask_id), 0

    def both_ways(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(batch, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch * length, *q.shape[1::2])

    for k in ks:
        at = (torch.arange(batch)[:, None] * length + torch.arange(done, done + k)).flatten().to(orders.device)
        logits = model(fed.flatten(), orders.flatten(), both_ways, places=at)
        raw = torch.randint(2**62, (len(logits),), device=fed.device)
        fed[:, done : done + k] = draw_tokens(logits, raw)[0].view(batch, k)
        done += k
    return fed


@torch.inference_mode()
def left_to_right(
    model: EsoLM, batch: int, length: int, device: torch.device, fixed_shapes: bool | None = None
) -> Tensor:
    """Tokens (batch, length). fixed_shapes: passes as a GPU records them, there by default."""
    fed = torch.zeros(
        batch + 1, length + 2, dtype=torch.int64, device=device
    )  # the first token is given, the last is spare
    order = torch.arange(length + 2, device=device).expand(batch + 1, -1)
    raw = torch.randint(2**62, fed.shape).to(device)
    cache = KVCache(model.shape, batch, length + 2, model.embedding.weight.dtype, device)
    kinds = torch.tensor([[1.0, 1.0, 0.0, 1.0]], dtype=torch.float64, device=device).expand(batch + 1, -1).contiguous()
    rows, products, kernel = np.arange(batch), FastProducts(model), fused_draw(torch.empty(0, device=device))

    def choose(logits: Tensor, at: Tensor, places: Tensor) -> Tensor:
        words = raw[at, places]
        return draw_tokens(logits, words)[0] if kernel is None else kernel(logits, words, at, kinds, None)[0]

    if device.type == "cuda" if fixed_shapes is None else fixed_shapes:
        passes = RecordedPasses(model, cache, fed, order, Recorder(device.type == "cuda"), ahead=1)
        passes.plan(rows, np.tile(np.arange(length + 2), (batch, 1)))
        passes.at_work(rows)
        for _ in range(length):
            passes(Size.around(batch, 1, 1, batch), choose)
        return fed[:-1, 1:-1]
    own = torch.from_numpy(rows)
    for place in range(length):
        cache.begin_step(own, own * 0 + place, own)
        with products:
            logits = model(fed[:-1, place], order[:-1, place], cache)
        fed[:-1, place + 1] = choose(logits, own, own * 0 + place + 1)
    return fed[:-1, 1:-1]


def timed(action: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Wall seconds and CPU-seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def kind_of(steps: str) -> dict:
    """How `sample` is told the passes."""
    return (
        {"schedule": "first_hitting", "steps": 1} if steps == "one" else {"schedule": "binomial", "steps": int(steps)}
    )


def cell(
    model: EsoLM, batch: int, length: int, steps: str, methods: list[str], repeats: int, ours: float
) -> list[dict]:
    """A row for each method. ours: seconds of ours where they are known, after a few times which baselines are stopped."""
    device, kind = model.embedding.weight.device, kind_of(steps)
    plans = plan_rows(SampleRequest(batch, length, alpha_0=1.0, **kind), model.shape.mask_id)
    orders, ks = torch.from_numpy(np.stack([p.order for p in plans])).to(device), plans[0].ks
    ways = {
        "ours": lambda: sample(model, batch, length, alpha_0=1.0, **kind),
        "int8_cache": lambda: sample(model, batch, length, alpha_0=1.0, cache="int8", **kind),
        "proposals": lambda: sample(model, batch, length, alpha_0=1.0, propose="auto", **kind),
        "loop": lambda: reference_loop(model, orders, ks, stop_after(ENOUGH * ours, device)),
        "ar": lambda: left_to_right(model, batch, length, device),
        "uncached": lambda: uncached(model, orders, ks[:2]),
    }
    took: dict[str, list[tuple[float, float]]] = {}
    recorded, proposed = (0, 0.0), 0
    stopped = set()
    for _ in range(repeats):
        for name in methods:
            if name in ("ar", "proposals") and steps != "one":
                continue
            began = time.perf_counter(), time.process_time()
            try:
                made: list = []
                found = timed(lambda way=ways[name], made=made: made.append(way()), device)
                recorded = made[0].recorded if name == "ours" else recorded
                proposed = made[0].num_forward_passes if name == "proposals" else proposed
            except torch.OutOfMemoryError:
                gc.collect()
                torch.cuda.empty_cache()
                continue
            except Stopped:
                stopped.add(name)
                found = time.perf_counter() - began[0], time.process_time() - began[1]
            scale = len(ks) / len(ks[:2]) if name == "uncached" else 1
            took.setdefault(name, []).append((found[0] * scale, found[1] * scale))
    facts = {"batch": batch, "length": length, "steps": steps, "passes": len(ks)}
    rows = []
    for name, found in took.items():
        wall, cpu = (min(x) for x in zip(*found, strict=True))
        row = {**facts, "method": name, "wall_s": wall, "cpu_s": cpu, "tokens_per_s": batch * length / wall}
        if name == "ours":
            row |= {"shapes": recorded[0], "recording_s": recorded[1]}
        passes = proposed if name == "proposals" else len(ks)
        row |= {"passes": passes, "ms_per_pass": 1e3 * wall / passes}
        rows.append(row | {"first_s": found[0][0], "stopped": name in stopped})
    return rows


def key_of(row: dict) -> tuple[int, int, str]:
    """The cell of a row."""
    return row["batch"], row["length"], row["steps"]


def with_costs(rows: list[dict], device: torch.device) -> list[dict]:
    """The rows with what each costs where ours costs 1: seconds of the clock on a GPU, CPU-seconds elsewhere."""
    field = "cpu_s" if device.type == "cpu" else "wall_s"
    ours = {key_of(row): row[field] for row in rows if row["method"] == "ours"}
    return [row | {"times_ours": row[field] / ours[key_of(row)] if key_of(row) in ours else None} for row in rows]


def missed(rows: list[dict], bars: dict, device: torch.device) -> list[str]:
    """A line for each bar that a cell misses, or that was not measured."""
    out = []
    for key, wanted in bars.items():
        found = {row["method"]: row for row in rows if key_of(row) == key}
        ours, where = found.get("ours"), "batch {}, L {}, T {}".format(*key)
        for name, bar in wanted.items():
            row, field = found.get(name), "times_ours"
            if name in ("tokens/s", "ms"):
                row, field = ours, {"tokens/s": "tokens_per_s", "ms": "ms_per_pass"}[name]
            value = None if row is None else row[field]
            if value is None:
                out.append(f"{where}: {name} was not measured (memory, or the budget)")
            elif value < bar if name != "ms" else value > bar:
                out.append(f"{where}: {name} {value:,.2f} is {'above' if name == 'ms' else 'below'} {bar:,.2f}")
        if device.type == "cuda" and ours and ours["first_s"] - ours["wall_s"] > MOST_FIRST:
            later = ours["first_s"] - ours["wall_s"]
            out.append(f"{where}: the first call took {later:.1f} s longer than the best, more than {MOST_FIRST:g}")
    return out


def profiled(model: EsoLM, batch: int, length: int, steps: str, top: int) -> dict:
    """The kernels of a mean pass of ours, when its shapes are known from a call before."""
    device = model.embedding.weight.device
    _, passes = (sample(model, batch, length, alpha_0=1.0, **kind_of(steps)).num_forward_passes for _ in range(2))
    table = kernel_table(lambda: sample(model, batch, length, alpha_0=1.0, **kind_of(steps)), device, passes)
    out = {"what": f"pass of batch {batch}, L {length}, T {steps}", "passes": passes, "parts": parts_of(table)}
    return out | {"ms": sum(row["ms"] for row in table), "kernels": shortened(table, top)}


def rows_of(args: argparse.Namespace, model: EsoLM, cells: dict) -> Iterator[dict]:
    """Rows as they are measured."""
    begun, device, ours = time.monotonic(), model.embedding.weight.device, {}
    turns = [(key, methods, args.repeats) for key, methods in cells.items()]
    if device.type == "cuda":
        record = ("ours", "int8_cache", "proposals")
        turns = [(key, [m for m in methods if m in record], max(args.repeats, 2)) for key, methods in cells.items()]
        turns += [(key, [m for m in methods if m not in record], 1) for key, methods in cells.items()]
    for (batch, length, steps), methods, repeats in turns:
        if time.monotonic() - begun > args.budget or (steps != "one" and int(steps) > length):
            continue
        if args.profile:
            if "ours" in methods:
                yield profiled(model, batch, length, steps, args.top)
            continue
        most = ours.get((batch, length, steps), float("inf"))
        for row in cell(model, batch, length, steps, methods, repeats, most):
            if row["method"] == "ours" and device.type == "cuda":
                ours[key_of(row)] = row["wall_s"]
            yield row


def main() -> int:
    grammar = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    grammar.add_argument("--shape", choices=SHAPES, default="124m")
    grammar.add_argument("--device", default="cpu")
    grammar.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    grammar.add_argument("--batch", type=int, nargs="*", default=[1, 16])
    grammar.add_argument("--length", type=int, nargs="+", default=[256])
    grammar.add_argument("--steps", nargs="+", default=["16", "one"])
    grammar.add_argument("--methods", nargs="+", default=["ours", "loop", "ar", "uncached"])
    grammar.add_argument("--repeats", type=int, default=1)
    grammar.add_argument("--budget", type=float, default=1e9)
    grammar.add_argument("--bars", action="store_true")
    grammar.add_argument("--bar-cells", action="store_true")
    grammar.add_argument("--json", type=Path)
    grammar.add_argument("--profile", action="store_true")
    grammar.add_argument("--top", type=int, default=40, help="kernels of a table in the JSON (default: 40)")
    args = grammar.parse_args()
    device = torch.device(args.device)
    bars = GPU_BARS if device.type == "cuda" else TOY_BARS if args.shape == "toy" else CPU_BARS
    cells = {key: ["ours", "loop", "ar"] for key in bars} if args.bars or args.bar_cells else {}
    for key in [(b, n, t) for n in args.length for b in args.batch for t in args.steps]:
        cells.setdefault(key, args.methods)
    config = ModelConfig(seq_length=max(key[1] for key in cells), **SHAPES[args.shape])
    model = EsoLM(config, PlainLinears({"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype], device))
    initialise(model, 0)
    sample(model, 1, 8, alpha_0=1.0, steps=2)  # what is done once
    facts = {"shape": args.shape, "device": str(device), "dtype": args.dtype, "threads": torch.get_num_threads()}
    rows: list[dict] = []

    def keep(**more: object) -> None:
        if args.json:  # as it grows: a run that is cut off leaves what it has
            args.json.write_text(json.dumps({**facts, "rows": rows, **more}, indent=1) + "\n")

    for row in rows_of(args, model, cells):
        rows.append(row)
        if not args.profile:
            rows = with_costs(rows, device)
        keep()
    if args.profile:
        for found in rows:
            Console(width=130).print(kernel_rows(found))
        return 0
    columns = (
        "batch",
        "length",
        "steps",
        "passes",
        "method",
        "wall s",
        "CPU-s",
        "tokens/s",
        "ms a pass",
        "cost, ours = 1",
    )
    table = Table(*columns)
    for row in rows:
        numbers = [
            f"{row['wall_s']:.2f}",
            f"{row['cpu_s']:.2f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['ms_per_pass']:.2f}",
        ]
        times = "" if row["times_ours"] is None else f"{'>' * row['stopped']}{row['times_ours']:.2f}"
        table.add_row(*(str(row[x]) for x in ("batch", "length", "steps", "passes", "method")), *numbers, times)
    Console(width=120).print(table)
    low = missed(rows, bars, device) if args.bars else []
    keep(missed=low)
    for line in low:
        print(line)
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main())
