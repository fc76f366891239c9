"""What a run will cost before it starts: parameters, memory of each stage's ranks, FLOPs, time, failures. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table
from rich.text import Text

from esolm_megatron.config import Config, ConfigError, with_values, world_problems
from esolm_megatron.errors import of_setting
from esolm_megatron.model.size import flops_per_step, layer_parameters, num_parameters
from esolm_megatron.plan.devices import Fabric, device_named
from esolm_megatron.plan.memory import GIB, StagePlan, packed_tokens, stage_plan
from esolm_megatron.plan.timing import Reliability, Times, reliability, step_times
from esolm_megatron.topology import Topology

GPT2_VOCAB = 50258
"""Vocabulary assumed where the data decides: GPT-2's, and the mask token."""


class DoesNotFit(Exception):
    """A rank takes so many bytes."""

    def __init__(self, taken: int):
        super().__init__(f"a rank takes {taken / GIB:.1f} GiB")
        self.taken = taken


@dataclass(frozen=True)
class Plan:
    """The cost of a run. notes: what was assumed, and what will not fit.

    mfu: share of the peak that the method's FLOPs take, predicted by `times`, or assumed, and then there are no times.
    """

    name: str
    device: str
    parameters: int
    topology: Topology
    num_micro_batches: int
    packed_tokens: int
    stages: tuple[StagePlan, ...]
    tokens_per_step: int
    flops_per_step: float
    num_steps: int
    peak_tflops: float
    mfu: float
    times: Times | None
    reliability: Reliability
    loss: float | None
    notes: tuple[str, ...]

    @property
    def memory_per_rank(self) -> int:
        """Bytes on the fullest rank."""
        return max(stage.total for stage in self.stages)

    @property
    def seconds_per_step(self) -> float:
        """Without checkpoints and failures."""
        return self.flops_per_step / (self.topology.world_size * self.peak_tflops * 1e12 * self.mfu)

    @property
    def days(self) -> float:
        """All steps, without failures."""
        return self.num_steps * self.seconds_per_step / 86400

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.tokens_per_step / self.seconds_per_step

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        derived = ("memory_per_rank", "seconds_per_step", "days", "tokens_per_second")
        out = {**asdict(self), **{name: getattr(self, name) for name in derived}}
        if out["times"] is not None:
            del out["times"]["spans"]
        out["topology"]["data_size"] = self.topology.data_size
        for stage, plan in zip(out["stages"], self.stages, strict=True):
            stage["total"] = plan.total
        return out

    def __rich__(self) -> Group:
        grid = self.topology
        facts = Table(title=f"plan of {self.name}", show_header=False, title_justify="left")
        context = f" x context {grid.context_size}" if grid.context_size > 1 else ""
        rows = (
            ("parameters", f"{self.parameters:,}"),
            (
                "processes",
                f"{grid.world_size} = pipeline {grid.pipeline_size} x data {grid.data_size}{context} x tensor {grid.tensor_size}",
            ),
            ("micro-batches of a rank", f"{self.num_micro_batches} of {self.packed_tokens:,} packed tokens"),
            ("tokens", f"{self.tokens_per_step:,} a step, {self.num_steps * self.tokens_per_step:.3g} in all"),
            ("model FLOPs", f"{self.flops_per_step:.3g} a step, {self.num_steps * self.flops_per_step:.3g} in all"),
            (
                "time",
                f"{_duration(self.days)}: {self.seconds_per_step:.3g} s a step, {self.tokens_per_second:,.0f} tokens/s",
            ),
            (
                "assumed" if self.times is None else "predicted",
                f"{self.mfu:.0%} of {self.peak_tflops:g} TFLOP/s of {self.device}",
            ),
            *self._parts_of_time(),
            *([] if self.loss is None else [("loss", f"{self.loss:.4f} nats per token (bound), by the law")]),
        )
        for row in rows:
            facts.add_row(*row)
        return Group(facts, self._memory_table(), *(Text(f"- {note}") for note in self.notes))

    def _parts_of_time(self) -> list[tuple[str, str]]:
        r = self.reliability
        failures = (
            f"one in {_duration(r.mtbf_h / 24)}; a checkpoint each {_duration(r.best_interval_s / 86400)} (stops the run "
            f"{r.checkpoint_s:.2g} s) leaves {r.goodput:.1%} of the time: {_duration(self.days / max(r.goodput, 1e-9))} in all"
        )
        if self.times is None:
            return [("failures", failures)]
        t = self.times
        parts = ("compute", "tensor", "context", "bubble", "data", "optimizer")
        shares = ", ".join(f"{name} {getattr(t, name) / t.step:.1%}" for name in parts if getattr(t, name))
        return [("of a step", shares), ("failures", failures)]

    def _memory_table(self) -> Table:
        names = ("weights", "gradients", "optimizer", "buckets", "activations", "working", "total")
        headings = ("stage", "layers", "params", "weights", "grads", "optim", "buckets", "activ", "working", "total")
        title = "GiB on each rank of a stage (estimate)"
        table = Table(*headings, title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
        for column in table.columns:
            column.justify, column.no_wrap = "right", column.header != "layers"
        for stage in self.stages:
            layers = " ".join(f"{a}-{b - 1}" for a, b in stage.layers)
            sizes = [f"{getattr(stage, name) / GIB:.2f}" for name in names]
            table.add_row(str(stage.stage), layers, f"{stage.parameters / 1e6:.0f}M", *sizes)
        return table


def _duration(days: float) -> str:
    for unit, size in (("days", 1.0), ("hours", 24.0), ("minutes", 1440.0)):
        if days * size >= 1:
            return f"{days * size:.3g} {unit}"
    return f"{days * 86400:.3g} seconds"


def with_vocabulary(config: Config) -> Config:
    """The configuration with GPT-2's vocabulary, where the data would decide."""
    return config if config.model.vocab_size else with_values(config, model={"vocab_size": GPT2_VOCAB})


def plan(
    config: Config,
    world_size: int | None = None,
    *,
    device: str = "H100",
    peak_tflops: float | None = None,
    mfu: float | None = None,
    fabric: Fabric | None = None,
    most_bytes: float | None = None,
    law: str | None = None,
) -> Plan:
    """The cost of `config` on `world_size` processes; None means one replica of the model.

    device: a name in DEVICES. peak_tflops: of one device; None takes train.peak_tflops, or the table's. mfu: assume this share
    of it, rather than predict times. fabric: what connects the devices. law: a JSON file of tools/study.py, by which the loss
    is predicted.

    Raises:
        ConfigError: the world size does not fit the configuration, or the device is not in the table.
        DoesNotFit: a rank takes more than `most_bytes`; no time is planned then.
    """
    notes = []
    gpu = device_named(device)
    if mfu is not None and not 0 < mfu <= 1:
        raise ConfigError(f"mfu = {mfu}: must lie in 0 to 1, as 0.4 for 40 percent")
    if config.model.vocab_size is None:
        config = with_vocabulary(config)
        notes.append(f"model.vocab_size is null: the data decides it; {GPT2_VOCAB} is assumed here")
    p, t = config.parallel, config.train
    if world_size is None:
        world_size = p.tensor_size * p.context_size * p.pipeline_size
        notes.append(f"no world size given: one replica of the model, {world_size} processes")
    if problems := world_problems(config, world_size, t.device):
        raise ConfigError("\n".join(problems))
    grid = Topology(0, world_size, p.tensor_size, p.pipeline_size, p.context_size)
    num_micro_batches = t.global_batch_size // (t.micro_batch_size * grid.data_size)
    stages = tuple(stage_plan(config, grid, stage, num_micro_batches) for stage in range(p.pipeline_size))
    if most_bytes is not None and max(stage.total for stage in stages) > most_bytes:
        raise DoesNotFit(max(stage.total for stage in stages))
    if t.precision == "fp32":
        notes.append("train.precision = fp32: the table's peak is that of bf16; give peak_tflops")
    fullest = max(stage.total for stage in stages) / GIB
    if fullest > 0.9 * gpu.memory_gib:
        notes.append(
            f"{fullest:.0f} GiB will not fit on {device} ({gpu.memory_gib:g} GiB, a tenth kept free): lower "
            "train.micro_batch_size, raise parallel.recompute, tensor_size or pipeline_size, or use more processes"
        )
    peak, fabric = peak_tflops or t.peak_tflops or gpu.peak_tflops, fabric or Fabric()
    times = None
    if mfu is None:
        times = step_times(config, grid, replace(gpu, peak_tflops=peak), fabric, stages, num_micro_batches)
        mfu = flops_per_step(config) / (world_size * peak * 1e12 * times.step)
        notes.append(f"times are predicted from shares of the device's peaks: {gpu.measured}")
    return Plan(
        name=config.name,
        device=device,
        parameters=num_parameters(config.model),
        topology=grid,
        num_micro_batches=num_micro_batches,
        packed_tokens=packed_tokens(config),
        stages=stages,
        tokens_per_step=t.global_batch_size * config.model.seq_length,
        flops_per_step=flops_per_step(config),
        num_steps=t.num_steps,
        peak_tflops=peak,
        mfu=mfu,
        times=times,
        loss=None if law is None else _loss(law, config, notes),
        reliability=reliability(fabric, world_size, stages, grid.data_size * grid.context_size),
        notes=tuple(notes),
    )


def _loss(law: str, config: Config, notes: list[str]) -> float:
    with of_setting("--law", law):
        text = Path(law).read_text(encoding="utf-8")
    try:
        tree = json.loads(text)
        tree = tree.get("scaling", tree)
        floor, scale, power = (float(tree["law"][name]) for name in ("floor", "scale", "power"))
        seen, sizes = tree["tokens"], [x["parameters"] for x in tree["sizes"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--law {law}: is no file of tools/study.py --parts scaling ({error!r})") from error
    mine = config.model.num_layers * layer_parameters(config.model)
    notes.append(
        f"the law: models of {min(sizes):,} to {max(sizes):,} parameters in blocks, {seen:,} tokens of one text; "
        f"this run: {mine:,} parameters, and tokens and text of its own"
    )
    return floor + scale * mine**-power
