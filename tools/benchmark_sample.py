r"""Sampling against three baselines in one run: how many tokens a second, and CPU-seconds.

    python tools/benchmark_sample.py                         # 124M on a CPU, some minutes
    python tools/benchmark_sample.py --shape toy --batch 1 16 --length 256 --steps 16 one
    python tools/benchmark_sample.py --device cuda --dtype bf16 --bars --batch 1 16 128 512 --length 256 1024 8192 \
        --steps 16 64 256 one --budget 400                   # under 8 minutes

Baselines, of the same random weights, written here:

    loop      the reference's loop: keys concatenated, eager attention under a materialised mask, the head on every fed
              row, fp64 noise of (batch, k, V), one schedule for the batch
    uncached  diffusion without a cache: the whole row in each pass, attention in both directions; two passes are timed
    ar        the same network left to right, one fed row a token, with our cache, products and draws

Steps: T diffusion steps of the paper's schedule, or "one": one token a pass. All methods draw from the whole distribution.
Methods take turns, the best of --repeats counts. --budget: seconds after which no cell is begun. --bars: first the cells that
have a bar, without `uncached`; exits with 1 where one is missed.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from esolm_megatron.config import ModelConfig
from esolm_megatron.inference import SampleRequest, sample
from esolm_megatron.inference.decoding.cuda_graphs import RecordedPasses
from esolm_megatron.inference.decoding.draw import draw_tokens
from esolm_megatron.inference.decoding.scheduler import plan_rows
from esolm_megatron.model.cache import KVCache
from esolm_megatron.model.layers import PlainLinears
from esolm_megatron.model.products import FastProducts
from esolm_megatron.model.transformer import EsoLM, initialise

SHAPES = {
    "124m": {"num_layers": 12, "hidden_size": 768, "num_heads": 12, "vocab_size": 50258},
    "toy": {"num_layers": 4, "hidden_size": 256, "num_heads": 4, "vocab_size": 50258},
}


# (batch, length, steps) -> least tokens/s on one H200 at 124M, or least times that a baseline costs
GPU_BARS = {
    (512, 1024, "16"): {"tokens/s": 600e3},
    (512, 1024, "128"): {"tokens/s": 300e3},
    (512, 1024, "one"): {"tokens/s": 80e3},
    (1, 8192, "one"): {"loop": 3.0, "ar": 0.95},
}
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


@torch.no_grad()
def reference_loop(model: EsoLM, orders: Tensor, ks: list[int]) -> Tensor:
    batch = len(orders)
    attend = ReferenceAttention(model.shape.num_layers, batch)
    fed, cached, done = torch.full_like(orders, model.shape.mask_id), 0, 0
    for k in ks:
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
def left_to_right(model: EsoLM, batch: int, length: int, device: torch.device) -> Tensor:
    cache = KVCache(model.shape, batch, length + 1, model.embedding.weight.dtype, device)
    fed = torch.zeros(batch, length + 1, dtype=torch.int64, device=device)
    order = torch.arange(length + 1, device=device).expand(batch, -1)
    recorded = RecordedPasses(model, cache, fed, order, True, None) if device.type == "cuda" else None
    products, rows = FastProducts(model), np.arange(batch)
    for place in range(length):
        at = np.full(batch, place)
        logits = None if recorded is None else recorded(rows, at, rows, rows)
        if logits is None:
            cache.begin_step(*(torch.from_numpy(x) for x in (rows, at, rows)))
            with products:
                logits = model(fed[:, place], order[:, place], cache)
        fed[:, place + 1] = draw_tokens(logits, torch.randint(2**62, (batch,), device=device))[0]
    return fed


def timed(action: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Wall seconds and CPU-seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def cell(model: EsoLM, batch: int, length: int, steps: str, methods: list[str], repeats: int) -> list[dict]:
    device = model.embedding.weight.device
    kind = (
        {"schedule": "first_hitting", "steps": 1} if steps == "one" else {"schedule": "binomial", "steps": int(steps)}
    )
    plans = plan_rows(SampleRequest(batch, length, alpha_0=1.0, **kind), model.shape.mask_id)
    orders, ks = torch.from_numpy(np.stack([p.order for p in plans])).to(device), plans[0].ks
    ways = {
        "ours": lambda: sample(model, batch, length, alpha_0=1.0, **kind),
        "loop": lambda: reference_loop(model, orders, ks),
        "ar": lambda: left_to_right(model, batch, length, device),
        "uncached": lambda: uncached(model, orders, ks[:2]),
    }
    best: dict[str, tuple[float, float]] = {}
    for _ in range(repeats):
        for name in methods:
            if name == "ar" and steps != "one":
                continue
            try:
                wall, cpu = timed(ways[name], device)
            except torch.OutOfMemoryError:
                gc.collect()
                torch.cuda.empty_cache()
                continue
            scale = len(ks) / len(ks[:2]) if name == "uncached" else 1
            before = best.get(name, (np.inf, np.inf))
            best[name] = min(before[0], wall * scale), min(before[1], cpu * scale)
    facts = {"batch": batch, "length": length, "steps": steps, "passes": len(ks)}
    which = 1 if device.type == "cpu" else 0
    return [
        {
            **facts, "method": name, "wall_s": wall, "cpu_s": cpu, "tokens_per_s": batch * length / wall,
            "times_ours": best[name][which] / best["ours"][which] if "ours" in best else None,
        }
        for name, (wall, cpu) in best.items()
    ]  # fmt: skip


def missed(rows: list[dict], bars: dict) -> list[str]:
    """A line for each bar that a cell misses, or that was not measured."""
    out = []
    for (batch, length, steps), wanted in bars.items():
        found = {r["method"]: r for r in rows if (r["batch"], r["length"], r["steps"]) == (batch, length, steps)}
        for name, least in wanted.items():
            row, field = found.get(name), "times_ours"
            if name == "tokens/s":
                row, field = found.get("ours"), "tokens_per_s"
            value = None if row is None else row[field]
            if value is None or value < least:
                said = (
                    "was not measured (memory, or the budget)"
                    if value is None
                    else f"{value:,.2f} is below {least:,.2f}"
                )
                out.append(f"batch {batch}, L {length}, T {steps}: {name} {said}")
    return out


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
    grammar.add_argument("--json", type=Path)
    args = grammar.parse_args()
    begun, device = time.monotonic(), torch.device(args.device)
    bars = GPU_BARS if device.type == "cuda" else TOY_BARS if args.shape == "toy" else CPU_BARS
    cells = {key: ["ours", "loop", "ar"] for key in bars} if args.bars else {}
    for key in [(b, n, t) for n in args.length for b in args.batch for t in args.steps]:
        cells.setdefault(key, args.methods)
    config = ModelConfig(seq_length=max(key[1] for key in cells), **SHAPES[args.shape])
    model = EsoLM(config, PlainLinears({"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype], device))
    initialise(model, 0)
    sample(model, 1, 8, alpha_0=1.0, steps=2)  # what is done once
    columns = ("batch", "length", "steps", "passes", "method", "wall s", "CPU-s", "tokens/s", "cost, ours = 1")
    table, rows = Table(*columns), []
    for (batch, length, steps), methods in cells.items():
        if time.monotonic() - begun > args.budget or (steps != "one" and int(steps) > length):
            continue
        for row in cell(model, batch, length, steps, methods, args.repeats):
            rows.append(row)
            numbers = (f"{row['wall_s']:.2f}", f"{row['cpu_s']:.2f}", f"{row['tokens_per_s']:.0f}")
            times = "" if row["times_ours"] is None else f"{row['times_ours']:.2f}"
            table.add_row(*(str(row[x]) for x in ("batch", "length", "steps", "passes", "method")), *numbers, times)
        if args.json:  # as it grows: a run that is cut off leaves what it has
            facts = {
                "shape": args.shape,
                "device": str(device),
                "dtype": args.dtype,
                "threads": torch.get_num_threads(),
            }
            args.json.write_text(json.dumps({**facts, "rows": rows}, indent=1))
    Console(width=110).print(table)
    low = missed(rows, bars) if args.bars else []
    for line in low:
        print(line)
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main())
