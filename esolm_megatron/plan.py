"""What a run will cost before it starts: parameters, memory of each stage's ranks, FLOPs, days. No torch.

Memory is an estimate, meant to be somewhat high: the largest layout of a micro-batch, all its places with loss.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table
from rich.text import Text

from esolm_megatron.config import Config, ConfigError, ModelConfig, with_values, world_problems
from esolm_megatron.model.size import (
    LOGITS_PER_CHUNK,
    flops_per_step,
    layers_of_stages,
    num_parameters,
    run_capacity,
    stage_parameters,
)
from esolm_megatron.topology import Topology, layers_of_chunk, padded_vocab

GPT2_VOCAB = 50258
"""Vocabulary assumed where the data decides: GPT-2's, and the mask token."""

GIB = 2**30
FP32 = 4


@dataclass(frozen=True)
class Device:
    """A kind of accelerator: peak of dense bf16 matrix products, and memory."""

    peak_tflops: float
    memory_gib: float


DEVICES = {
    "A100": Device(312, 80),
    "H100": Device(989, 80),
    "H200": Device(989, 139),
    "B200": Device(2250, 178),
}
"""From the makers' data sheets (SXM boards); memory as a job sees it."""


@dataclass(frozen=True)
class StagePlan:
    """What one rank of a pipeline stage holds; memory in bytes.

    layers: first and last + 1 of each chunk. parameters: of the rank, its share of the tensor split.
    """

    stage: int
    layers: tuple[tuple[int, int], ...]
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    buckets: int
    activations: int
    logits: int
    micro_batches_in_flight: float

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.buckets + self.activations + self.logits


@dataclass(frozen=True)
class Plan:
    """The cost of a run. notes: what was assumed, and what will not fit."""

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
    notes: tuple[str, ...]

    @property
    def memory_per_rank(self) -> int:
        """Bytes on the fullest rank."""
        return max(stage.total for stage in self.stages)

    @property
    def seconds_per_step(self) -> float:
        """At the assumed share of the devices' peak."""
        return self.flops_per_step / (self.topology.world_size * self.peak_tflops * 1e12 * self.mfu)

    @property
    def days(self) -> float:
        """All steps."""
        return self.num_steps * self.seconds_per_step / 86400

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.tokens_per_step / self.seconds_per_step

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        derived = ("memory_per_rank", "seconds_per_step", "days", "tokens_per_second")
        out = {**asdict(self), **{name: getattr(self, name) for name in derived}}
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
            ("assumed", f"{self.mfu:.0%} of {self.peak_tflops:g} TFLOP/s of {self.device}"),
        )
        for row in rows:
            facts.add_row(*row)
        return Group(facts, self._memory_table(), *(Text(f"- {note}") for note in self.notes))

    def _memory_table(self) -> Table:
        names = ("weights", "gradients", "optimizer", "buckets", "activations", "logits", "total")
        headings = ("stage", "layers", "params", "weights", "grads", "optim", "buckets", "activ", "logits", "total")
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


def plan(
    config: Config,
    world_size: int | None = None,
    *,
    device: str = "H100",
    peak_tflops: float | None = None,
    mfu: float = 0.4,
) -> Plan:
    """The cost of `config` on `world_size` processes; None means one replica of the model.

    device: a name in DEVICES. peak_tflops: of one device; None takes train.peak_tflops, or the table's.

    Raises:
        ConfigError: the world size does not fit the configuration, or the device is not in the table.
    """
    notes = []
    if device not in DEVICES:
        raise ConfigError(
            f"device = {device!r}: not in the table; use one of {', '.join(DEVICES)} and give peak_tflops"
        )
    if not 0 < mfu <= 1:
        raise ConfigError(f"mfu = {mfu}: must lie in 0 to 1, as 0.4 for 40 percent")
    if config.model.vocab_size is None:
        config = with_values(config, model={"vocab_size": GPT2_VOCAB})
        notes.append(f"model.vocab_size is null: the data decides it; {GPT2_VOCAB} is assumed here")
    p, t = config.parallel, config.train
    if world_size is None:
        world_size = p.tensor_size * p.context_size * p.pipeline_size
        notes.append(f"no world size given: one replica of the model, {world_size} processes")
    if problems := world_problems(config, world_size, t.device):
        raise ConfigError("\n".join(problems))
    grid = Topology(0, world_size, p.tensor_size, p.pipeline_size, p.context_size)
    num_micro_batches = t.global_batch_size // (t.micro_batch_size * grid.data_size)
    stages = tuple(_stage_plan(config, grid, stage, num_micro_batches) for stage in range(p.pipeline_size))
    if t.precision == "fp32":
        notes.append("train.precision = fp32: the table's peak is that of bf16; give peak_tflops")
    fullest = max(stage.total for stage in stages) / GIB
    if fullest > 0.9 * DEVICES[device].memory_gib:
        notes.append(
            f"{fullest:.0f} GiB will not fit on {device} ({DEVICES[device].memory_gib:g} GiB, a tenth kept free): lower "
            "train.micro_batch_size, raise parallel.recompute, tensor_size or pipeline_size, or use more processes"
        )
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
        peak_tflops=peak_tflops or t.peak_tflops or DEVICES[device].peak_tflops,
        mfu=mfu,
        notes=tuple(notes),
    )


def packed_tokens(config: Config) -> int:
    """Tokens of a packed micro-batch: plain rows, clean streams and mask streams (see model/attention.py)."""
    return config.train.micro_batch_size * config.model.seq_length + _mask_places(config)


def _mask_places(config: Config) -> int:
    """Tokens in the mask streams of a micro-batch."""
    diffusion, sequential = _rows(config)
    length, objective = config.model.seq_length, config.objective
    places = sequential * run_capacity(config)
    return places + (diffusion * length if objective.diffusion_loss == "any_order" else 0)


def _rows(config: Config) -> tuple[int, int]:
    diffusion = round(config.train.micro_batch_size * config.objective.fraction)
    return diffusion, config.train.micro_batch_size - diffusion


def _stage_plan(config: Config, grid: Topology, stage: int, num_micro_batches: int) -> StagePlan:
    m, p = config.model, config.parallel
    first, last = stage == 0, stage == grid.pipeline_size - 1
    chunks = p.virtual_pipeline_size
    layers = [layers_of_chunk(layers_of_stages(config), stage, i, chunks) for i in range(chunks)]
    count = sum(map(len, layers))
    parameters = stage_parameters(m, count, first=first, last=last, tensor_size=p.tensor_size)
    in_flight = micro_batches_in_flight(stage, p.pipeline_size, chunks, num_micro_batches)
    working = FP32 if config.train.precision == "fp32" else 2
    sharers = grid.data_size * grid.context_size
    gradients, optimizer = (-(-parameters // sharers) if p.zero_stage >= cut else parameters for cut in (2, 1))
    weights = -(-parameters // sharers) if p.zero_stage == 3 else parameters
    states = optimizer * (4 if config.optim.ema_decay else 3)
    if (
        config.optim.name == "muon"
    ):  # one moment of blocks, where AdamW has two; their few vectors are counted with them
        blocks = stage_parameters(m, count, first=False, last=False, tensor_size=p.tensor_size)
        states -= round(optimizer * blocks / parameters)
    return StagePlan(
        stage=stage,
        layers=tuple((x.start, x.stop) for x in layers),
        parameters=parameters,
        weights=0 if p.offload_parameters else weights * working,
        gradients=gradients * FP32,
        optimizer=0 if p.offload_optimizer else states * FP32,
        buckets=2 * min(p.reduce_bucket_elements, parameters) * FP32 if sharers > 1 else 0,
        activations=_activation_bytes(config, count, first, in_flight, working),
        logits=_logits_bytes(config) if last else 0,
        micro_batches_in_flight=in_flight,
    )


def micro_batches_in_flight(stage: int, num_stages: int, num_chunks: int, num_micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds at most, counted over all its layers.

    1F1B: one for each stage from this one to the last. Interleaved: 2 (stages after this one) + (chunks - 1) stages + 1
    chunks, each 1 / chunks of the stage's layers.
    """
    if num_chunks == 1:
        return min(num_stages - stage, num_micro_batches)
    chunks = 2 * (num_stages - stage - 1) + (num_chunks - 1) * num_stages + 1
    return min(chunks, num_micro_batches * num_chunks) / num_chunks


def _activation_bytes(config: Config, num_layers: int, first: bool, in_flight: float, working: int) -> int:
    p = config.parallel
    kept = channels_per_token(config.model, p.recompute, p.tensor_size, p.sequence_parallel)
    per_token = num_layers * kept * in_flight
    if p.offload_activations:  # of the blocks' inputs, that of the one at work and that on its way to the host are here
        per_token = min(per_token, 2 * kept)
    if p.recompute == "full":  # the block that is being computed again keeps everything for a moment
        per_token += channels_per_token(config.model, "none", p.tensor_size, p.sequence_parallel)
    elif p.recompute == "selective":
        per_token += channels_per_token(config.model, "none", p.tensor_size, p.sequence_parallel) - kept
    if first and config.model.dropout:
        per_token += config.model.hidden_size * in_flight
    return round(per_token * packed_tokens(config) / p.context_size * working)


def channels_per_token(model: ModelConfig, recompute: str, tensor_size: int, sequence_parallel: bool) -> float:
    """Numbers that one block keeps for backward, per packed token and tensor rank.

    Between the matrices (cut by sequence parallelism): inputs of both norms and of the first matrices after them (4 H),
    and with dropout two masks (2 H). Inside (cut by tensor parallelism): q, k, v, the attention's output, and its copy
    in packed order (5 N D, key-value heads being repeated, over context ranks too), and two numbers per inner channel of
    the MLP, four with swiglu. `selective` drops the MLP's and the input of its first matrix, `full` keeps only the block's
    input.
    """
    h, f = model.hidden_size, model.ffn_size
    outside = h * (4 + (2 if model.dropout else 0))
    attention = 5 * model.num_heads * model.head_dim
    mlp = f * (4 if model.activation == "swiglu" else 2)
    if recompute == "full":
        outside, attention, mlp = h, 0, 0
    elif recompute == "selective":
        outside, mlp = outside - h, 0
    return outside / (tensor_size if sequence_parallel else 1) + (attention + mlp) / tensor_size


def _logits_bytes(config: Config) -> int:
    """A chunk of logits in fp32 and its gradient, were every place masked, the head's gradient, in fp32 where there are several
    chunks, and that of what the head is fed (model/loss.py).
    """
    diffusion, _ = _rows(config)
    plain = 0 if config.objective.diffusion_loss == "any_order" else diffusion * config.model.seq_length
    places, tensor_size = plain + _mask_places(config), config.parallel.tensor_size
    vocab = padded_vocab(config.model.vocab, tensor_size) // tensor_size
    whole, hidden = -(-places // config.parallel.context_size) * vocab, config.model.hidden_size
    width = 2 if config.train.precision == "bf16" else FP32
    held = (FP32 + width) * min(whole, LOGITS_PER_CHUNK) + width * -(-places // config.parallel.context_size) * hidden
    return held + (FP32 if whole > LOGITS_PER_CHUNK else 0) * vocab * hidden + width * vocab * hidden
