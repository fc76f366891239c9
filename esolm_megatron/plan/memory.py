"""What each rank of a pipeline stage holds in memory, by part. No torch.

Counted from what autograd keeps, for the largest layout of a micro-batch; tests compare it with simulated ranks, within 5
percent, and with a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from esolm_megatron.config import Config
from esolm_megatron.model.size import LOGITS_PER_CHUNK, layers_of_stages, run_capacity, stage_parameters
from esolm_megatron.topology import Topology, layers_of_chunk, padded_vocab

GIB = 2**30
FP32 = 4
LIVE_PARAMETERS = 10**9
"""That DeepSpeed keeps gathered under ZeRO 3, its `stage3_max_live_parameters`."""


@dataclass(frozen=True)
class StagePlan:
    """What one rank of a pipeline stage holds; memory in bytes.

    layers: first and last + 1 of each chunk. parameters: of the rank, its share of the tensor split. buckets: of reductions, and
    the weights that ZeRO 3 has gathered. working: what comes and goes, in the loss or while backward is in a block.
    """

    stage: int
    layers: tuple[tuple[int, int], ...]
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    buckets: int
    activations: int
    working: int
    micro_batches_in_flight: float

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.buckets + self.activations + self.working


def packed_tokens(config: Config) -> int:
    """Tokens of a packed micro-batch: plain rows, clean streams and mask streams (see model/attention.py)."""
    return config.train.micro_batch_size * config.model.seq_length + _mask_places(config)


def _mask_places(config: Config) -> int:
    """Tokens in the mask streams of a micro-batch."""
    diffusion, sequential = rows_of_parts(config)
    length, objective = config.model.seq_length, config.objective
    places = sequential * run_capacity(config)
    return places + (diffusion * length if objective.diffusion_loss == "any_order" else 0)


def rows_of_parts(config: Config) -> tuple[int, int]:
    """Rows of a micro-batch on the diffusion loss, and on the sequential one."""
    diffusion = round(config.train.micro_batch_size * config.objective.fraction)
    return diffusion, config.train.micro_batch_size - diffusion


def stage_plan(config: Config, grid: Topology, stage: int, num_micro_batches: int) -> StagePlan:
    """The memory of a rank of a stage."""
    m, p = config.model, config.parallel
    first, last = stage == 0, stage == grid.pipeline_size - 1
    chunks = p.virtual_pipeline_size
    layers = [layers_of_chunk(layers_of_stages(config), stage, i, chunks) for i in range(chunks)]
    count = sum(map(len, layers))
    parameters = stage_parameters(m, count, first=first, last=last, tensor_size=p.tensor_size)
    in_flight = micro_batches_in_flight(stage, p.pipeline_size, chunks, num_micro_batches)
    blocks_in_flight = layers_in_flight(tuple(map(len, layers)), stage, p.pipeline_size, num_micro_batches)
    working = FP32 if config.train.precision == "fp32" else 2
    sharers = grid.data_size * grid.context_size
    gradients, optimizer = (-(-parameters // sharers) if p.zero_stage >= cut else parameters for cut in (2, 1))
    weights = -(-parameters // sharers) if p.zero_stage == 3 else parameters
    states = optimizer * (4 if config.optim.ema_decay else 3)
    if config.optim.name == "muon":
        # one moment of blocks, where AdamW has two; their few vectors are counted with them
        blocks = stage_parameters(m, count, first=False, last=False, tensor_size=p.tensor_size)
        states -= round(optimizer * blocks / parameters)
    buckets = 0 if sharers == 1 else _bucket_bytes(config, parameters, last, working)
    logits = 0 if not last else _logits_bytes(config) - (buckets if p.zero_stage == 2 else 0)
    return StagePlan(
        stage=stage,
        layers=tuple((x.start, x.stop) for x in layers),
        parameters=parameters,
        weights=0 if p.offload_parameters else weights * working,
        gradients=gradients * FP32,
        optimizer=0 if p.offload_optimizer else states * FP32,
        buckets=buckets,
        activations=_activation_bytes(config, blocks_in_flight, in_flight * chunks, last, working),
        working=max(_block_bytes(config, working), logits),
        micro_batches_in_flight=in_flight,
    )


def _bucket_bytes(config: Config, parameters: int, last: bool, working: int) -> int:
    """Of reductions, and what ZeRO 3 has gathered. ZeRO 1 reduces in bf16 where gradients are, and in fp32 after backward."""
    m, p = config.model, config.parallel
    bucket = min(p.reduce_bucket_elements, parameters)
    if p.zero_stage < 2:
        return 0
    if p.zero_stage == 3:
        return bucket * FP32 + min(LIVE_PARAMETERS, parameters) * working
    # two are filled in turn; one is widened when it is full, and then blocks whose gradients are in it have let go
    whole, one = (stage_parameters(m, n, first=False, last=last, tensor_size=p.tensor_size) for n in (0, 1))
    blocks = (bucket - (whole if whole < bucket else 0)) / (one - whole)
    kept = blocks * sum(channels_per_token(config, p.recompute)) * packed_tokens(config) / p.context_size * working
    return 2 * bucket * working + (max(0, round(bucket * FP32 - kept)) if working < FP32 else 0)


def micro_batches_in_flight(stage: int, num_stages: int, num_chunks: int, num_micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds at most, counted over all its layers.

    1F1B: one for each stage from this one to the last. Interleaved: 2 (stages after this one) + (chunks - 1) stages + 1
    chunks, each 1 / chunks of the stage's layers.
    """
    if num_chunks == 1:
        return min(num_stages - stage, num_micro_batches)
    chunks = 2 * (num_stages - stage - 1) + (num_chunks - 1) * num_stages + 1
    return min(chunks, num_micro_batches * num_chunks) / num_chunks


@cache
def layers_in_flight(sizes: tuple[int, ...], stage: int, num_stages: int, num_micro_batches: int) -> float:
    """Blocks whose activations a stage holds at most, each counted once a micro-batch; sizes: blocks in each chunk.

    Chunks that differ are played through, as megatron-core's schedule goes: each in turn for as many micro-batches as there
    are stages, and back from the last one.
    """
    chunks = len(sizes)
    if len(set(sizes)) == 1:
        return sum(sizes) * micro_batches_in_flight(stage, num_stages, chunks, num_micro_batches)
    total = min(num_micro_batches, 4 * num_stages) * chunks  # from then on it repeats itself
    warm_up = min(2 * (num_stages - stage - 1) + (chunks - 1) * num_stages, total)
    chunk = [step // num_stages % chunks for step in range(total)]
    alive = most = sum(sizes[i] for i in chunk[:warm_up])
    for forward, backward in zip(chunk[warm_up:], chunk, strict=False):
        alive += sizes[forward]
        most = max(most, alive)
        alive -= sizes[chunks - 1 - backward]
    return most


def compiled(config: Config) -> bool:
    """Whether what is between products is compiled, as it is on GPUs where nothing is said of it."""
    t = config.train
    return t.compile if t.compile is not None else t.device != "cpu"


def _activation_bytes(config: Config, in_flight: float, passes: float, last: bool, working: int) -> int:
    """What forward passes keep for backward: of `in_flight` blocks, and what `passes` of chunks have sent."""
    p, tokens = config.parallel, packed_tokens(config)
    before, after = channels_per_token(config, p.recompute)
    numbers = in_flight * (before + after) * tokens
    if p.pipeline_size > 1 and not p.deallocate_pipeline_outputs:
        numbers += passes * config.model.hidden_size / (p.tensor_size if p.sequence_parallel else 1) * tokens
    if p.offload_activations:  # of the blocks' inputs, that of the one at work and that on its way to the host are here
        numbers = min(numbers, 2 * before * tokens)
    elif last and p.recompute != "full":  # after the last attention there are only the tokens that carry loss
        heads = 2 * (config.model.num_heads + config.model.kv_heads) * config.model.head_dim / p.tensor_size
        numbers += places_with_loss(config) * (after + heads) - tokens * after
    return round(numbers / p.context_size * working)


def _block_bytes(config: Config, working: int) -> int:
    """What comes and goes while backward is in a block: what it computes again, and gradients between the MLP's products."""
    model, p = config.model, config.parallel
    again = sum(channels_per_token(config, "none")) - sum(channels_per_token(config, p.recompute))
    inner = (3 if model.activation == "swiglu" else 2) * model.ffn_size / p.tensor_size
    numbers = (again + inner + 2 * model.hidden_size) * packed_tokens(config) / p.context_size
    return round(numbers * working)


def channels_per_token(config: Config, recompute: str) -> tuple[float, float]:
    """Numbers that one block keeps for backward, per packed token and tensor rank: up to attention, and after it.

    Between the matrices (cut by sequence parallelism): inputs of both norms, and of the first matrices after them (H each).
    Inside (cut by tensor parallelism): the product that values are a part of ((N + 2 G) D), rotated queries and keys, what
    attention gives (N D) and its log-sum-exp in fp32, and the MLP's numbers before and after its activation. Not compiled,
    SwiGLU has one more for each channel, and dropout two masks of numbers (2 H), where a compiler keeps one of bytes.
    Context ranks have copies of what they exchange; then only norms want the product.
    `selective` drops the MLP's and the input of its first matrix, `full` keeps only the block's input.
    """
    model, p, lean = config.model, config.parallel, compiled(config)
    h, width, shared = model.hidden_size, model.num_heads * model.head_dim, model.kv_heads * model.head_dim
    around = p.tensor_size if p.sequence_parallel else 1
    if recompute == "full":
        return h / around, 0
    mixed = width + 2 * model.num_heads
    if p.context_size > 1:
        sent = max(shared, p.tensor_size * p.context_size * model.head_dim)
        inside, mixed = width + 2 * sent + (width + 2 * shared if model.qk_norm else 0), mixed + width
    else:
        inside = 2 * width + 3 * shared
    if model.qk_norm:  # what divides them, in fp32
        inside += 2 * (model.num_heads + model.kv_heads)
    after = h * (2 if not model.dropout else 2.5 if lean else 4)
    mlp = model.ffn_size * (2 if model.activation == "gelu" else 3 if lean else 4)
    if recompute == "selective":
        after, mlp = after - h, 0
    return 2 * h / around + inside / p.tensor_size, after / around + (mixed + mlp) / p.tensor_size


def places_with_loss(config: Config) -> int:
    """Tokens of a micro-batch whose losses count, at most: two standard deviations more than the mean of draws."""
    diffusion, _ = rows_of_parts(config)
    if config.objective.diffusion_loss == "any_order":
        return _mask_places(config)
    alpha_0, rows = config.objective.alpha_0, max(diffusion, 1)
    share = min(1 - alpha_0 / 2 + 2 * alpha_0 / math.sqrt(12 * rows), 1)  # of a row, uniform between 1 - alpha_0 and 1
    return round(diffusion * config.model.seq_length * share) + _mask_places(config)


def _logits_bytes(config: Config) -> int:
    """A chunk of logits in fp32 and its gradient, the head's gradient, in fp32 where there are several chunks, and that of what
    the head is fed (model/loss.py); or in backward, the head's gradient in fp32 between two in the working type.
    """
    p, hidden = config.parallel, config.model.hidden_size
    places, vocab = (
        -(-places_with_loss(config) // p.context_size),
        padded_vocab(config.model.vocab, p.tensor_size) // p.tensor_size,
    )
    width = 2 if config.train.precision == "bf16" else FP32
    wide = FP32 if places * vocab > LOGITS_PER_CHUNK else 0
    chunk = (FP32 + width) * min(places * vocab, LOGITS_PER_CHUNK) + (wide + width) * vocab * hidden
    return max(chunk, (FP32 + 2 * width) * vocab * hidden) + width * places * hidden
