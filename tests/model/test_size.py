"""Formulas against the real network, against counting token by token, and against published FLOP ratios."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from esolm_megatron.config import ModelConfig, ObjectiveConfig
from esolm_megatron.model import size
from esolm_megatron.model.layers import PlainLinears
from esolm_megatron.model.transformer import EsoLM
from esolm_megatron.objective import esolm

SHAPES = [
    {},
    {"norm": "rmsnorm", "activation": "swiglu", "mlp_bias": False, "output_bias": False},
    {"activation": "swiglu", "num_kv_heads": 5, "qk_norm": True, "ffn_hidden_size": 35},
    {"num_kv_heads": 1, "tied_embeddings": True, "output_bias": False, "ffn_hidden_size": 37},
    {"norm": "rmsnorm", "mlp_bias": False, "qk_norm": True, "tied_embeddings": True, "output_bias": False},
    {"qkv_bias": True, "head_size": 14, "num_kv_heads": 5},
]


def model(**values):
    numbers = {"num_layers": 3, "hidden_size": 60, "num_heads": 10, "vocab_size": 101, "seq_length": 29}
    return ModelConfig(**{**numbers, **values})


@pytest.mark.parametrize("values", SHAPES)
def test_parameters_are_those_of_the_real_network(values):
    real = EsoLM(model(**values), PlainLinears(device="meta"))
    assert size.num_parameters(model(**values)) == sum(p.numel() for p in real.parameters())


@pytest.mark.parametrize("values", SHAPES)
@pytest.mark.parametrize(
    ("layers", "first", "last"), [(range(2), True, False), (range(1, 2), False, False), (range(2, 3), False, True)]
)
def test_parameters_of_a_stage_are_those_of_the_real_stage(values, layers, first, last):
    linears = PlainLinears(device="meta", pad_vocab=True)
    real = EsoLM(model(**values), linears, layers=layers, first=first, last=last)
    count = size.stage_parameters(model(**values), len(layers), first=first, last=last)
    assert count == sum(p.numel() for p in real.parameters())


@pytest.mark.parametrize("values", SHAPES[:3])
def test_a_tensor_rank_holds_the_cut_parts_and_the_whole_ones(values):
    shape = model(**values)
    whole, part = size.stage_parameters(shape, 3), size.stage_parameters(shape, 3, tensor_size=5)
    vectors = {"layernorm": 2, "rmsnorm": 1}[shape.norm] * 60 * 7 + (3 * 60 if shape.mlp_bias else 0)
    vectors += 3 * 12 if shape.qk_norm else 0
    padding = 4 * 128 * (2 * 60 + shape.output_bias)  # 101 rows become 128 of one rank, and of each of five
    assert 5 * part == whole + 4 * vectors + padding
    assert whole == size.num_parameters(shape) + 27 * (2 * 60 + shape.output_bias)


def test_capacity_holds_six_deviations_and_fits_the_layout():
    for length, alpha_0, multiple in itertools.product((29, 1024, 4096), (0, 0.125, 0.25, 0.5, 0.9), (64, 7)):
        capacity, deviation = size.mask_capacity(length, alpha_0, multiple), (length * alpha_0 * (1 - alpha_0)) ** 0.5
        needed = length * (1 - alpha_0) + 6 * deviation
        assert capacity == length or (capacity % multiple == 0 and needed <= capacity < needed + multiple + 1)
        assert capacity <= length


def drawn_flops(shape, objective, rows=4000):
    """(diffusion, sequential) FLOPs of a row, counted place by place from orders that the objective draws."""
    length = shape.seq_length
    tokens = np.zeros((rows, length), dtype=np.int64)
    ids, valid = np.arange(rows), np.ones((rows, length), dtype=bool)
    diffusion = esolm.draw_diffusion(tokens, valid, ids, rows, objective, 3, 5)
    sequential = esolm.draw_sequential(tokens, valid, ids, objective.alpha_0, length, 3, 5)
    h, kv = shape.hidden_size, shape.kv_heads * shape.head_dim
    keys, rest = 4 * h * kv, 4 * h * h + 2 * (3 if shape.activation == "swiglu" else 2) * h * shape.ffn_size
    seen = np.arange(1, length + 1) * 4 * h  # the k-th in the order sees k keys
    out = []
    for drawn, two_streams in ((diffusion, False), (sequential, True)):
        masked = np.take_along_axis(drawn.weights > 0, drawn.order, 1)
        feeds = np.ones(length) + masked if two_streams else np.ones((rows, length))
        before = (shape.num_layers - 1) * (feeds * (keys + rest + seen)).sum(1)
        last = (feeds * keys + masked * (rest + seen + 2 * h * shape.vocab)).sum(1)
        out.append((before + last).mean())
    return out


@pytest.mark.parametrize("alpha_0", [0.25, 0.7])
@pytest.mark.parametrize("values", SHAPES[:3])
def test_flops_are_those_counted_on_drawn_rows(values, alpha_0):
    shape, objective = model(**values), ObjectiveConfig(alpha_0=alpha_0)
    diffusion, sequential = drawn_flops(shape, objective)
    assert size.diffusion_row_flops(shape, objective) == pytest.approx(diffusion, rel=2e-3)
    assert size.sequential_row_flops(shape, objective) == pytest.approx(sequential, rel=2e-3)


def test_any_order_loss_at_alpha_1_costs_what_the_sequential_loss_costs_at_alpha_0():
    any_order = ObjectiveConfig(alpha_0=1, diffusion_loss="any_order")
    assert size.diffusion_row_flops(model(), any_order) == size.sequential_row_flops(
        model(), ObjectiveConfig(alpha_0=0)
    )


def reference_flops(shape, objective):
    """Per token: the reference feeds L or 2L tokens through everything, head included."""
    h, length, layers = shape.hidden_size, shape.seq_length, shape.num_layers
    token = layers * (8 * h * h + 4 * h * shape.ffn_size + 4 * h * (length + 1) / 2) + 2 * h * shape.vocab
    return 3 * token * (objective.fraction + 2 * (1 - objective.fraction))


PUBLISHED = {  # docs/method.md: FLOPs of the reference over this way
    (12, 768, 12, 1024, 50258): {1: 1.20, 0.5: 1.44, 0.25: 1.26, 0.125: 1.19, 0: 1.21},
    (32, 4096, 32, 4096, 32001): {1: 1.02, 0.5: 1.22, 0.25: 1.11, 0.125: 1.06, 0: 1.03},
}


@pytest.mark.parametrize(("shape", "ratios"), PUBLISHED.items())
def test_flops_reproduce_the_ratios_to_the_reference(shape, ratios):
    layers, hidden, heads, length, vocab = shape
    network = ModelConfig(num_layers=layers, hidden_size=hidden, num_heads=heads, vocab_size=vocab, seq_length=length)
    for alpha_0, ratio in ratios.items():
        objective = ObjectiveConfig(alpha_0=alpha_0)
        ours = size.flops_per_token(network, objective)
        assert reference_flops(network, objective) / ours == pytest.approx(ratio, abs=0.011)


def test_matrix_flops_are_those_that_torch_counts():
    shape = model(num_layers=1, num_kv_heads=5)
    with FlopCounterMode(display=False) as counter:
        network = EsoLM(shape, PlainLinears(device="meta"))
        tokens = torch.zeros(29, dtype=torch.int64, device="meta")
        network(tokens, tokens, lambda layer, q, k, v: q)
    expected = 29 * (size.token_flops(shape) + size._head_flops(shape))
    assert counter.get_total_flops() == expected
