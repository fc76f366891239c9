"""What each rank of a pipeline stage holds in memory, by part. No torch.

An estimate, meant to be somewhat high: the largest layout of a micro-batch, all its places with loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from esolm_megatron.config import Config, ModelConfig
from esolm_megatron.model.size import LOGITS_PER_CHUNK, layers_of_stages, run_capacity, stage_parameters
from esolm_megatron.topology import Topology, layers_of_chunk, padded_vocab

GIB = 2**30
FP32 = 4


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
    diffusion, _ = rows_of_parts(config)
    plain = 0 if config.objective.diffusion_loss == "any_order" else diffusion * config.model.seq_length
    places, tensor_size = plain + _mask_places(config), config.parallel.tensor_size
    vocab = padded_vocab(config.model.vocab, tensor_size) // tensor_size
    whole, hidden = -(-places // config.parallel.context_size) * vocab, config.model.hidden_size
    width = 2 if config.train.precision == "bf16" else FP32
    held = (FP32 + width) * min(whole, LOGITS_PER_CHUNK) + width * -(-places // config.parallel.context_size) * hidden
    return held + (FP32 if whole > LOGITS_PER_CHUNK else 0) * vocab * hidden + width * vocab * hidden
