"""How large the network is and how much arithmetic training it takes, counted by formula. No torch.

Letters: H hidden_size, N and G query and key-value heads of width D (N D = H), F ffn_size, f matrices in the MLP (3 with
swiglu, else 2), V vocabulary, L seq_length, n the clean tokens of a row, M = L - n its masked ones.
"""

from __future__ import annotations

import math

from esolm_megatron.config import Config, ModelConfig, ObjectiveConfig
from esolm_megatron.topology import balanced_stages, padded_vocab

BACKWARD = 2
"""A backward pass multiplies two matrices for each one of the forward pass."""

LOGITS_PER_CHUNK = 2**27
"""Logits that the loss makes at once (model/loss.py): half a GiB, and half of that for their gradient in 16 bits."""


CAPACITY_MULTIPLE = 16
"""What the places of a mask stream are a multiple of: rows of packed tokens then start where matrix kernels like it."""


def layer_parameters(model: ModelConfig, tensor_size: int = 1) -> int:
    """Parameters of one block that a tensor rank holds.

    H (N + 2G) D for queries, keys and values, N D H for the output, f H F for the MLP, all cut over the ranks, and with
    them the biases of queries, keys and values and of the MLP's first matrix. Its second bias (H), two norms (H, or 2H with
    layernorm) and the norms of queries and keys (D each) are whole on every rank.
    """
    h, f = model.hidden_size, model.ffn_size
    width = model.num_heads * model.head_dim
    gated = 2 if model.activation == "swiglu" else 1
    cut = h * (width + 2 * model.kv_heads * model.head_dim) + width * h + (gated + 1) * h * f
    whole = 2 * _norm_parameters(model)
    if model.qkv_bias:
        cut += width + 2 * model.kv_heads * model.head_dim
    if model.mlp_bias:
        cut, whole = cut + gated * f, whole + h
    if model.qk_norm:
        whole += 2 * model.head_dim
    return cut // tensor_size + whole


def _norm_parameters(model: ModelConfig) -> int:
    return model.hidden_size * (2 if model.norm == "layernorm" else 1)


def stage_parameters(
    model: ModelConfig, num_layers: int, *, first: bool = True, last: bool = True, tensor_size: int = 1
) -> int:
    """Parameters that a rank of a pipeline stage holds: its layers, the embedding, the final norm and the head.

    The vocabulary is padded (`padded_vocab`). A tied head on another stage than the embedding is a copy.
    """
    rows = padded_vocab(model.vocab, tensor_size) // tensor_size
    return _stage_parameters(model, num_layers, rows, first, last, tensor_size)


def _stage_parameters(model: ModelConfig, num_layers: int, rows: int, first: bool, last: bool, tensor_size: int) -> int:
    total = num_layers * layer_parameters(model, tensor_size)
    if first:
        total += rows * model.hidden_size
    if last:
        total += _norm_parameters(model)
        total += 0 if model.tied_embeddings and first else rows * model.hidden_size
        total += rows if model.output_bias else 0
    return total


def num_parameters(model: ModelConfig) -> int:
    """Parameters of the whole network, a tied embedding counted once: V H (twice if untied) + blocks + final norm + V."""
    return _stage_parameters(model, model.num_layers, model.vocab, True, True, 1)


def mask_capacity(seq_length: int, alpha_0: float, multiple: int = CAPACITY_MULTIPLE) -> int:
    """Places of a sequential row's mask stream: mean plus six standard deviations of the number of masks, rounded up."""
    mean = seq_length * (1 - alpha_0)
    bound = mean + 6 * math.sqrt(mean * alpha_0)
    return min(seq_length, -(-math.ceil(bound) // multiple) * multiple)


def run_capacity(config: Config) -> int:
    """`mask_capacity` of a run: every rank gets as many packed tokens, so they divide over tensor and context ranks."""
    ranks = config.parallel.tensor_size * config.parallel.context_size
    return mask_capacity(config.model.seq_length, config.objective.alpha_0, math.lcm(CAPACITY_MULTIPLE, ranks))


def masked_share(objective: ObjectiveConfig) -> float:
    """Expected share of a diffusion row's places that carry loss: E[1 - alpha(t)], t uniform in [eps, 1].

    With the any-order loss it is alpha_0, the places that diffusion generates.
    """
    if objective.diffusion_loss == "any_order":
        return objective.alpha_0
    return 1 - objective.alpha_0 * _mean_clean(objective.time_epsilon)[0]


def _mean_clean(epsilon: float) -> tuple[float, float]:
    """E[u] and E[u^2] for u = 1 - (1 - eps) t, which is uniform between eps and 1 - eps (1 - eps)."""
    low, high = epsilon, 1 - epsilon * (1 - epsilon)
    return (low + high) / 2, (low * low + low * high + high * high) / 3


def diffusion_row_flops(model: ModelConfig, objective: ObjectiveConfig) -> float:
    """Expected FLOPs of the forward pass of one row on the diffusion loss.

    L tokens through all blocks but the last, which needs queries and MLP at the M masked places only, as the head does.
    Query k of the order sees k keys: L (L + 1) / 2 pairs; those of the masked places are that less n (n + 1) / 2.
    The any-order loss needs two streams of its alpha_0 L places: see `sequential_row_flops`.
    """
    length, a = model.seq_length, objective.alpha_0
    if objective.diffusion_loss == "any_order":
        places, pairs = a * length, _pairs_of_binomial(length, a)
        return _two_stream_flops(model, places, pairs, places, pairs)
    first, second = _mean_clean(objective.time_epsilon)
    # n given t is binomial: E[n^2] = E[(L c)^2 + L c (1 - c)] with c = alpha_0 u
    square = (length**2 - length) * a * a * second + length * a * first
    masked_pairs = _pairs(length) - (square + length * a * first) / 2
    masked = length * masked_share(objective)
    before = (model.num_layers - 1) * (length * token_flops(model) + _pairs(length) * _pair_flops(model))
    last = length * _kv_flops(model) + masked * _query_flops(model) + masked_pairs * _pair_flops(model)
    return before + last + masked * _head_flops(model)


def sequential_row_flops(model: ModelConfig, objective: ObjectiveConfig) -> float:
    """Expected FLOPs of the forward pass of one row on the sequential loss.

    L clean tokens and M masks, M ~ Binomial(L, 1 - alpha_0), through all blocks but the last, where clean tokens give
    only keys and values. The mask at place k sees k - 1 clean keys and itself, k pairs like a clean token there.
    """
    length, a = model.seq_length, objective.alpha_0
    return _two_stream_flops(
        model, length, _pairs(length), length * (1 - a), _pairs(length) - _pairs_of_binomial(length, a)
    )


def _two_stream_flops(model: ModelConfig, clean: float, clean_pairs: float, masks: float, mask_pairs: float) -> float:
    tokens, pairs = clean + masks, clean_pairs + mask_pairs
    before = (model.num_layers - 1) * (tokens * token_flops(model) + pairs * _pair_flops(model))
    last = tokens * _kv_flops(model) + masks * _query_flops(model) + mask_pairs * _pair_flops(model)
    return before + last + masks * _head_flops(model)


def _pairs(length: float) -> float:
    return length * (length + 1) / 2


def _pairs_of_binomial(length: int, share: float) -> float:
    """E[n (n + 1) / 2] for n ~ Binomial(length, share)."""
    mean = length * share
    return (mean * mean + mean * (1 - share) + mean) / 2


def _kv_flops(model: ModelConfig) -> float:
    """Keys and values of a token: 4 H G D."""
    return 4 * model.hidden_size * model.kv_heads * model.head_dim


def _query_flops(model: ModelConfig) -> float:
    """Query, output projection and MLP of a token: 4 H N D + 2 f H F."""
    matrices = 3 if model.activation == "swiglu" else 2
    width = model.num_heads * model.head_dim
    return 4 * model.hidden_size * width + 2 * matrices * model.hidden_size * model.ffn_size


def token_flops(model: ModelConfig) -> float:
    """All products of a block for a token, forward."""
    return _kv_flops(model) + _query_flops(model)


def _pair_flops(model: ModelConfig) -> float:
    """Score and weighted value of one query and key, all heads: 4 N D."""
    return 4 * model.num_heads * model.head_dim


def _head_flops(model: ModelConfig) -> float:
    """Logits of a place: 2 H V."""
    return 2 * model.hidden_size * model.vocab


def flops_per_token(model: ModelConfig, objective: ObjectiveConfig) -> float:
    """Model FLOPs of training, forward and backward, for one token of the data; a mask stream's masks are no data.

    (1 + 2) (q diffusion_row_flops + (1 - q) sequential_row_flops) / L, q the share of rows on the diffusion loss.
    Only what the method needs is counted: no recomputation, no spare capacity of the mask stream, no norms.
    """
    q, row = objective.fraction, 0.0
    if q > 0:
        row += q * diffusion_row_flops(model, objective)
    if q < 1:
        row += (1 - q) * sequential_row_flops(model, objective)
    return (1 + BACKWARD) * row / model.seq_length


def flops_per_step(config: Config) -> float:
    """Model FLOPs of one optimizer step: `flops_per_token` times global_batch_size times seq_length."""
    tokens = config.train.global_batch_size * config.model.seq_length
    return tokens * flops_per_token(config.model, config.objective)


def layers_of_stages(config: Config) -> tuple[int, ...]:
    """Layers of each pipeline stage: parallel.layers_per_stage, or the split that balances arithmetic.

    The head counts as 2 H V FLOPs for each place with loss, the embedding as 2 H for each token (it is read and added
    to), a layer as all its products for all packed tokens, less in the last one what only places with loss need.
    """
    m, p = config.model, config.parallel
    if p.layers_per_stage is not None:
        return tuple(p.layers_per_stage)
    if p.pipeline_size == 1:
        return (m.num_layers,)
    tokens, pairs, places = packed_row(m, config.objective)
    layer = tokens * token_flops(m) + pairs * _pair_flops(m)
    return balanced_stages(
        m.num_layers,
        p.pipeline_size,
        p.virtual_pipeline_size,
        first_load=tokens * 2 * m.hidden_size / layer,
        last_load=places * (_head_flops(m) + _query_flops(m)) / layer - tokens * _query_flops(m) / layer,
    )


def packed_row(model: ModelConfig, objective: ObjectiveConfig) -> tuple[float, float, float]:
    """Tokens, pairs of query and key, and places with loss that an average row brings to a micro-batch."""
    length, a, q = model.seq_length, objective.alpha_0, objective.fraction
    sequential = (length * (2 - a), 2 * _pairs(length) - _pairs_of_binomial(length, a), length * (1 - a))
    diffusion = (float(length), _pairs(length), length * masked_share(objective))
    if objective.diffusion_loss == "any_order":
        diffusion = (2.0 * length, 2 * _pairs(length), a * length)
    tokens, pairs, places = (q * d + (1 - q) * s for d, s in zip(diffusion, sequential, strict=True))
    return tokens, pairs, places
