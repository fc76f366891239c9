"""Products in fp8, emulated: how they round, which are made so, on every layout, and that training follows bf16."""

import numpy as np
import pytest
import torch
from ranks import run_ranks
from truth import MODERN, make_config, share_of_step

from esolm_megatron.config import ConfigError
from esolm_megatron.parallel.float8 import matrices, product

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MODEL = MODERN | {
    "num_layers": 4,
    "hidden_size": 64,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_size": 32,
    "ffn_hidden_size": 96,
    "seq_length": 32,
    "init_std": 0.02,
}
ROUNDING = {"tensorwise": 2**-3, "rowwise": 2**-4}
"""Half a place of the last bit, relative: two bits of a gradient's mantissa in e5m2, three of e4m3's."""


def rounded(x, kind, dim):
    """x as fp8 holds it, with one scale, or one along `dim` that is a power of two."""
    amax = x.double().abs().amax() if dim is None else x.double().abs().amax(dim, keepdim=True)
    scale = torch.finfo(kind).max / amax
    scale = scale if dim is None else torch.exp2(torch.floor(torch.log2(scale)))
    return (x.double() * scale).float().to(kind).double() / scale


@pytest.mark.parametrize("recipe", ROUNDING)
def test_a_product_rounds_its_factors_and_nothing_else(recipe):
    torch.manual_seed(0)
    x, w, g = (torch.randn(n, m).bfloat16() for n, m in ((48, 32), (80, 32), (48, 80)))
    x[5] *= 30  # rows of another size, which a scale for each row serves better
    x, w = x.requires_grad_(), w.requires_grad_()
    y = product(recipe, "cpu", False)(x, w, None)
    y.backward(g)
    rows, kind = recipe == "rowwise", E4M3 if recipe == "rowwise" else E5M2

    def along(dim):
        return dim if rows else None

    expected = {
        "y": (y, rounded(x, E4M3, along(1)) @ rounded(w, E4M3, along(1)).t()),
        "dx": (x.grad, rounded(g, kind, along(1)) @ rounded(w, E4M3, along(0))),
        "dw": (w.grad, rounded(g, kind, along(0)).t() @ rounded(x, E4M3, along(0))),
    }
    for name, (found, exact) in expected.items():
        assert (found.double() - exact).abs().max() < 2**-7 * exact.abs().max(), f"{name}: bf16 rounds once"
    bf16 = x.detach().double() @ w.detach().double().t()
    assert 1e-3 < (y - bf16).norm() / bf16.norm() < ROUNDING[recipe]


def steps(config, count=3, skewed=False):
    """One rank: losses, and the gradient of the first step."""
    from esolm_megatron.parallel.engine import Engine

    engine = Engine(config)
    top, losses, gradient = engine.topology, [], None
    for step in range(count):
        share = share_of_step(config, step, top.data_rank, top.data_size, skewed=skewed)
        losses.append(float(engine.forward_backward(share)[0]))
        if step == 0 and config.parallel.zero_stage < 2:
            found = engine.state.gradients()
            gradient = torch.cat([found[o.parameter].float().flatten() for o in engine.owned]).numpy()
        engine.state.step(1e-3)
    return losses, gradient


def fp8(recipe="tensorwise", parallel=None, model=None, **train):
    return make_config(
        MODEL | (model or {}), parallel=parallel or {}, train={"precision": "bf16", "fp8": recipe} | train
    )


@pytest.mark.gloo
@pytest.mark.parametrize(("recipe", "least"), [("tensorwise", 0.998), ("rowwise", 0.999)])
def test_gradients_point_where_those_of_bf16_do(recipe, least):
    """tensorwise rounds gradients to two bits after the leading one, 5 percent rms: 0.9987 is all that leaves of a cosine."""
    wide = {"hidden_size": 128, "seq_length": 128}
    (low, mine), (high, theirs) = (run_ranks(steps, 1, fp8(kind, model=wide), 1)[0] for kind in (recipe, "none"))
    cosine = mine @ theirs / np.linalg.norm(mine) / np.linalg.norm(theirs)
    assert least < cosine < 1 - 1e-5, cosine
    assert low == pytest.approx(high, rel=1e-3)


@pytest.mark.gloo
def test_fifty_steps_stay_within_a_percent_of_bf16():
    low, high = (run_ranks(steps, 1, fp8(recipe, num_steps=50), 50, True)[0][0] for recipe in ("rowwise", "none"))
    assert high[-1] < 0.9 * high[0], "something is learnt"
    np.testing.assert_allclose(low, high, rtol=1e-2)


LAYOUTS = [
    (2, {"tensor_size": 2}, {}),
    (2, {"tensor_size": 2, "sequence_parallel": True, "recompute": "full"}, {}),
    (2, {"context_size": 2}, {}),
    (2, {"pipeline_size": 2}, {}),
    (2, {"zero_stage": 2}, {}),
    (1, {"recompute": "selective"}, {"compile": True}),
]


@pytest.mark.gloo
@pytest.mark.parametrize(("world", "parallel", "train"), LAYOUTS, ids=str)
@pytest.mark.parametrize("recipe", ["rowwise"])
def test_layouts_agree_to_the_rounding_of_fp8(world, parallel, train, recipe):
    """A tensor rank scales by its own part; a rounding apart in one factor is 2^-4 of it, and loss averages over tokens."""
    whole = run_ranks(steps, 1, fp8(recipe))[0][0]
    for losses, _ in run_ranks(steps, world, fp8(recipe, parallel, **train)):
        assert losses == pytest.approx(whole, rel=2**-4 * 0.1)


def made_so(config):
    """One rank: which matrices multiply in fp8 in a step, and the probe's logits."""
    from esolm_megatron.parallel.engine import Engine

    engine, called = Engine(config), []
    for block in engine.chunks[0].layers.values():
        for number, layer in enumerate(matrices(block)):
            if layer.fp8 is not None:
                layer.fp8 = lambda *args, n=number, b=block, f=layer.fp8: called.append((b.layer, n)) or f(*args)
    probe = engine.probe()["logits_weight"]
    assert not called, "what an export must reproduce is in bf16"
    engine.forward_backward(share_of_step(config, 0))
    return sorted(set(called)), probe


@pytest.mark.gloo
def test_first_and_last_blocks_and_all_else_than_blocks_stay_in_bf16():
    ((called, probe),) = run_ranks(made_so, 1, fp8())
    assert called == [(layer, matrix) for layer in (1, 2) for matrix in range(4)]
    ((called, plain),) = run_ranks(made_so, 1, fp8("none"))
    assert called == []
    assert torch.equal(probe, plain)


@pytest.mark.parametrize(
    ("model", "parallel", "train", "words"),
    [
        ({}, {}, {"precision": "fp32"}, "train.fp8 = tensorwise: its weights are bf16; set train.precision=bf16"),
        ({}, {"zero_stage": 3}, {}, "use parallel.zero_stage=1 or 2"),
        ({}, {}, {"fp8_skip_blocks": 2}, "leaves none of model.num_layers = 4"),
        ({"hidden_size": 72}, {}, {}, "model.hidden_size = 72: fp8 products take multiples of 16"),
        ({"ffn_hidden_size": 48}, {"tensor_size": 2}, {}, "model.ffn_hidden_size = 48: .* 16 x tensor_size = 32"),
    ],
)
def test_what_does_not_go_together_is_refused(model, parallel, train, words):
    options = {"precision": "bf16", "fp8": "tensorwise"} | train
    with pytest.raises(ConfigError, match=words):
        make_config(MODEL | model, parallel=parallel, train=options)
