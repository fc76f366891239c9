"""How long a step takes, from what is multiplied, moved and sent. No torch.

Each time is bytes or FLOPs over a peak times the share of it that was measured. What is not modelled: the host, kernels too
small to fill a GPU, stragglers, other jobs on the network. So it is a plan, best for comparing layouts; docs/scale.md says how
far it was from what was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from esolm_megatron.config import Config
from esolm_megatron.model.size import BACKWARD, layers_of_stages, packed_row, token_flops
from esolm_megatron.plan.devices import Device, Fabric
from esolm_megatron.plan.memory import StagePlan, packed_tokens
from esolm_megatron.plan.timeline import Span, play
from esolm_megatron.topology import Topology, layers_of_chunk

_MOST_PLAYED = 2
"""Micro-batches for each stage that are played through; more add as many times the slowest stage's."""


@dataclass(frozen=True)
class Times:
    """Seconds of a step. step: all of it. stages: (forward, backward) of a micro-batch by stage, all chunks.

    compute: of the slowest stage, alone. tensor, context: its collectives between ranks that share matrices, or a row.
    bubble: it waits for other stages. data: of gradients and weights between replicas, what is not hidden; data_whole: all.
    optimizer: its update. spans: the step played through, of the first micro-batches.
    """

    step: float
    compute: float
    tensor: float
    context: float
    bubble: float
    data: float
    data_whole: float
    optimizer: float
    stages: tuple[tuple[float, float], ...]
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Reliability:
    """What failures and checkpoints cost. mtbf_h: of the whole run. checkpoint_s: that a checkpoint stops it; write_s: until it is
    on the file system. best_interval_s: between checkpoints (Young, Daly). goodput: share of time that trains, then.
    """

    mtbf_h: float
    checkpoint_s: float
    write_s: float
    best_interval_s: float
    goodput: float


def step_times(
    config: Config,
    grid: Topology,
    device: Device,
    fabric: Fabric,
    stages: tuple[StagePlan, ...],
    num_micro_batches: int,
) -> Times:
    """The times of one step of `config` on a grid of such devices."""
    m, p, chunks = config.model, config.parallel, config.parallel.virtual_pipeline_size
    peak, memory = device.peak_tflops * 1e12, device.tbytes * 1e12 * device.copies
    tokens = packed_tokens(config) / p.context_size
    _, pairs, places = packed_row(m, config.objective)
    rows, split = config.train.micro_batch_size, p.tensor_size * p.context_size
    # a layer, forward
    fp8 = (
        1.0
        if config.train.fp8 == "none"
        else 1 + (device.fp8 - 1) * (1 - 2 * config.train.fp8_skip_blocks / m.num_layers)
    )
    width = min(m.hidden_size, m.ffn_size // p.tensor_size)
    reached = peak * device.products * width / (width + device.narrow)
    products = tokens * token_flops(m) / p.tensor_size / (reached * fp8)
    scores = 4 * m.num_heads * m.head_dim * pairs * rows / split
    mixing = [scores / (peak * share) for share in device.attention]
    moved = _moved_bytes(config, tokens) / memory
    send = _Sender(device, fabric, grid)
    volume = tokens * m.hidden_size * 2
    tensor = 2 * send.all_reduce(volume, p.tensor_size, 1)  # with sequence parallelism as two halves
    heads = tokens * (m.num_heads + 2 * m.kv_heads + m.num_heads) * m.head_dim * 2 / p.tensor_size
    context = send.all_to_all(heads, p.context_size, p.tensor_size)
    there = products + mixing[0] + moved
    back = BACKWARD * products + 2.5 * mixing[1] + 2 * moved  # scores are made again: five products for two
    first = 2 * m.hidden_size * m.ffn_size * (2 if m.activation == "swiglu" else 1) / token_flops(m)
    again = {"none": 0.0, "selective": first * products + 0.4 * moved, "full": there}[p.recompute]
    sent, sent_back = tensor + context, tensor * (2 if p.recompute == "full" else 1) + context
    head = 2 * m.hidden_size * m.vocab * places * rows / split
    head_time = head / reached + 10 * places * rows * m.vocab / split / memory
    forward, backward, alone = [], [], []
    for stage in range(grid.pipeline_size):
        counts = [len(layers_of_chunk(layers_of_stages(config), stage, chunk, chunks)) for chunk in range(chunks)]
        last = [stage == grid.pipeline_size - 1 and chunk == chunks - 1 for chunk in range(chunks)]
        forward.append([n * (there + sent) + at_end * head_time for n, at_end in zip(counts, last, strict=True)])
        backward.append(
            [n * (back + again + sent_back) + at_end * 2 * head_time for n, at_end in zip(counts, last, strict=True)]
        )
        alone.append((sum(counts) * (there + back + again) + any(last) * 3 * head_time, sum(counts)))
    message = send.message(volume / (p.tensor_size if p.sequence_parallel else 1)) if grid.pipeline_size > 1 else 0.0
    each = [sum(f) + sum(b) for f, b in zip(forward, backward, strict=True)]
    played = min(num_micro_batches, _MOST_PLAYED * grid.pipeline_size)
    spans = play(forward, backward, played, message)
    passes = max(span.end for span in spans) + (num_micro_batches - played) * max(each)
    slowest = max(range(len(each)), key=each.__getitem__)
    work, layers = alone[slowest]
    data_whole, data = _data_times(config, grid, stages[slowest], send, forward, backward, num_micro_batches)
    held = stages[slowest].optimizer or stages[slowest].parameters * 16
    optimizer = 2.2 * held / memory  # read and written, and gradients read
    n = num_micro_batches
    return Times(
        step=passes + data + optimizer,
        compute=n * work,
        tensor=n * layers * (tensor * (3 if p.recompute == "full" else 2)),
        context=n * layers * 2 * context,
        bubble=passes - n * each[slowest],
        data=data,
        data_whole=data_whole,
        optimizer=optimizer,
        stages=tuple((sum(f), sum(b)) for f, b in zip(forward, backward, strict=True)),
        spans=tuple(spans),
    )


def _moved_bytes(config: Config, tokens: float) -> float:
    """What the kernels between the products of a block read and write in a forward pass, in 16 bits.

    Two norms (4 H), two residuals (6 H), rotation and copies of queries, keys, values and output (4 of each), activation.
    """
    m, p = config.model, config.parallel
    outside = 10 * m.hidden_size / (p.tensor_size if p.sequence_parallel else 1)
    inside = 4 * (2 * m.num_heads + 2 * m.kv_heads) * m.head_dim + (3 if m.activation == "swiglu" else 2) * m.ffn_size
    return 2 * tokens * (outside + inside / p.tensor_size)


def _data_times(
    config: Config,
    grid: Topology,
    stage: StagePlan,
    send: _Sender,
    forward: list[list[float]],
    backward: list[list[float]],
    num_micro_batches: int,
) -> tuple[float, float]:
    """Seconds of what replicas tell each other in a step: all of it, and what no work hides."""
    p, sharers = config.parallel, grid.data_size * grid.context_size
    if sharers == 1:
        return 0.0, 0.0
    within, wide = p.tensor_size, 2 if config.train.precision == "bf16" else 4
    overlap = p.zero_stage == 1 and config.train.precision == "bf16" and p.overlap is not False
    gradients = stage.parameters * (wide if overlap else 4)
    weights = stage.parameters * wide
    if p.zero_stage == 0:
        whole = send.all_reduce(gradients, sharers, within)
        return whole, whole
    reduce, gather = send.half(gradients, sharers, within), send.half(weights, sharers, within)
    if p.zero_stage >= 2:  # gradients are cut with each micro-batch
        reduce *= num_micro_batches
    if p.zero_stage == 3:  # weights come and go with each pass
        gather *= 2 * num_micro_batches
    passes = (
        num_micro_batches if p.zero_stage >= 2 else 1
    )  # that they hide behind: all, or the last backward and first forward
    hidden_back, hidden_there = passes * max(map(sum, backward)), passes * max(map(sum, forward))
    if overlap or p.zero_stage >= 2:
        return reduce + gather, max(0.0, reduce - hidden_back) + max(0.0, gather - hidden_there)
    return reduce + gather, reduce + gather


@dataclass(frozen=True)
class _Sender:
    """Collectives of ranks that lie `within` apart, tensor ranks being neighbours: inside a node while they fit there."""

    device: Device
    fabric: Fabric
    grid: Topology

    def _rate(self, size: int, apart: int) -> tuple[float, float]:
        """Bytes/s of a rank, and the latency of a collective."""
        f = self.fabric
        link = (f.link_gbytes or self.device.link_gbytes) * 1e9 * f.reached
        latency = f.latency_us * 1e-6
        if size * apart <= f.gpus_per_node:
            return link, latency
        # rings through nodes: all GPUs of a node that are in one share its ports
        together = max(1, f.gpus_per_node // apart)
        return min(link, f.network_gbytes * 1e9 * f.reached * together), latency * (
            1 + math.log2(max(2, size / together))
        )

    def half(self, volume: float, size: int, apart: int) -> float:
        """A reduce-scatter or an all-gather of `volume` bytes."""
        if size == 1:
            return 0.0
        rate, latency = self._rate(size, apart)
        return volume * (size - 1) / size / rate + latency

    def all_reduce(self, volume: float, size: int, apart: int) -> float:
        """Both of them."""
        return 2 * self.half(volume, size, apart)

    def all_to_all(self, volume: float, size: int, apart: int) -> float:
        """Each rank sends a share of its `volume` to each other one."""
        if size == 1:
            return 0.0
        rate, latency = self._rate(size, apart)
        if size * apart > self.fabric.gpus_per_node:
            rate = self.fabric.network_gbytes * 1e9 * self.fabric.reached
        return volume * (size - 1) / size / rate + latency

    def message(self, volume: float) -> float:
        """From one pipeline stage to the next, which lies in another node where stages are larger than one."""
        f, size = self.fabric, self.grid.world_size // self.grid.pipeline_size
        inside = 2 * size <= f.gpus_per_node
        rate = (f.link_gbytes or self.device.link_gbytes) if inside else f.network_gbytes
        return volume / (rate * 1e9 * f.reached) + f.latency_us * 1e-6


def reliability(fabric: Fabric, world_size: int, stages: tuple[StagePlan, ...], sharers: int) -> Reliability:
    """Failures, the interval between checkpoints that costs least (J. Young 1974, J. Daly 2006), and what is left."""
    nodes = -(-world_size // fabric.gpus_per_node)
    mtbf = fabric.node_mtbf_days * 86400 / nodes
    state = sum((s.optimizer or s.parameters * 16) + s.parameters * 2 / sharers for s in stages) / len(stages)
    stall = state / (fabric.host_gbytes * 1e9)
    write = state * min(fabric.gpus_per_node, world_size) / (fabric.storage_gbytes * 1e9)
    interval = max(math.sqrt(2 * stall * mtbf), write)
    lost = stall / interval + (interval / 2 + fabric.restart_s) / mtbf
    return Reliability(mtbf / 3600, stall, write, interval, max(0.0, 1 - lost))
