"""Transformer Engine's linears and norms, by a stand-in made from its documentation: it cannot be built where there is no GPU."""

import sys
import types
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from test_float8 import MODEL, fp8, steps
from truth import make_config

from esolm_megatron.config import ConfigError
from esolm_megatron.errors import UserError
from esolm_megatron.parallel.float8 import product

CALLS = {"linear": 0, "norm": 0}
FACTOR = [1.0]


class Linear(torch.nn.Module):
    """transformer_engine.pytorch.Linear(in_features, out_features, bias=True, ..., params_dtype=None, device="cuda")."""

    fp8 = False

    def __init__(self, in_features, out_features, bias=True, *, params_dtype=None, device="cuda"):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        assert not bias

    def forward(self, inp, is_first_microbatch=None, fp8_output=False):
        CALLS["linear"] += 1
        assert Linear.fp8, "outside of autocast it would multiply in bf16"
        return product("tensorwise", "cpu", False)(inp, self.weight, None) * FACTOR[0]


class Norm(torch.nn.Module):
    """transformer_engine.pytorch.RMSNorm and LayerNorm(normalized_shape, eps=1e-5, *, device, dtype)."""

    def __init__(self, normalized_shape, eps=1e-5, *, device, dtype):
        super().__init__()
        self.shape, self.eps = (normalized_shape,), eps
        self.weight = torch.nn.Parameter(torch.empty(normalized_shape, device=device, dtype=dtype))
        if type(self) is LayerNorm:
            self.bias = torch.nn.Parameter(torch.empty(normalized_shape, device=device, dtype=dtype))

    def forward(self, x):
        CALLS["norm"] += 1
        if type(self) is LayerNorm:
            return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)
        return F.rms_norm(x, self.shape, self.weight, self.eps)


class RMSNorm(Norm):
    pass


class LayerNorm(Norm):
    pass


class Float8CurrentScaling:
    """transformer_engine.common.recipe.Float8CurrentScaling(fp8_format=HYBRID): e4m3 forward, e5m2 for gradients."""


@contextmanager
def autocast(enabled=True, calibrating=False, recipe=None, group=None):
    assert isinstance(recipe, Float8CurrentScaling)
    Linear.fp8 = enabled
    yield
    Linear.fp8 = False


def is_fp8_available(return_reason=False):
    return (True, "") if return_reason else True


def documented():
    """Put the stand-in where the package would be."""
    names = {}
    for name in ("", ".pytorch", ".common", ".common.recipe"):
        names[name] = sys.modules[f"transformer_engine{name}"] = types.ModuleType(f"transformer_engine{name}")
    for thing in (Linear, RMSNorm, LayerNorm, autocast, is_fp8_available):
        setattr(names[".pytorch"], thing.__name__, thing)
    names[".common.recipe"].Float8CurrentScaling = Float8CurrentScaling


def with_te(config, factor=1.0):
    """One rank: losses and gradient of three steps, what was called in them, and what the table says."""
    from esolm_megatron.parallel import nvidia_te
    from esolm_megatron.parallel.engine import Engine

    documented()
    FACTOR[0] = factor
    tried, before = nvidia_te.tried, {}

    def counted(*args):
        said = tried(*args)
        before.update(CALLS)
        return said

    nvidia_te.tried = counted
    made, build = [], Engine.__init__
    Engine.__init__ = lambda self, *args: (build(self, *args), made.append(self))[0]
    try:
        losses, gradient = steps(config)
    except UserError as error:
        return str(error)
    calls = {name: CALLS[name] - before.get(name, 0) for name in CALLS}
    probe = made[0].probe()["logits_weight"]
    assert {name: CALLS[name] - before.get(name, 0) for name in CALLS} == calls, "without a gradient it is torch"
    return losses, gradient, calls, made[0].providers, probe


@pytest.mark.gloo
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_blocks_multiply_and_normalise_by_it(norm):
    """With the stand-in's arithmetic, which is torchao's and torch's, a run is theirs to the last bit."""
    model = {"norm": norm}
    ((losses, gradient, calls, table, probe),) = run_ranks(
        with_te, 1, fp8(model=model, kernels={"linears": "te", "norms": "te"})
    )
    ((theirs, right),) = run_ranks(steps, 1, fp8(model=model))
    assert losses == theirs
    assert (gradient == right).all()
    passes = 3 * 4  # steps, micro-batches
    assert calls == {"linear": passes * 2 * 4, "norm": passes * 4 * 2}, "matrices of blocks 1 and 2, norms of all four"
    assert "Transformer Engine's fp8 (relative error 0.0" in table["linears"]
    assert "ms at 64 wide), in blocks 1 to 2; megatron-core" in table["linears"]
    assert table["norms"].startswith("Transformer Engine's in blocks (relative error ")
    assert probe is not None


@pytest.mark.gloo
def test_it_goes_with_tensor_ranks_recomputation_and_a_compiler():
    kernels = {"linears": "te", "norms": "te"}
    whole = run_ranks(with_te, 1, fp8(kernels=kernels))[0][0]
    split = {"tensor_size": 2, "sequence_parallel": True, "recompute": "full"}
    for losses, *_ in run_ranks(with_te, 2, fp8("tensorwise", split, kernels=kernels)):
        assert losses == pytest.approx(whole, rel=2**-3 * 0.1)
    ((losses, _, calls, table, _),) = run_ranks(with_te, 1, fp8(kernels=kernels, compile=True))
    assert losses == pytest.approx(whole, rel=1e-2)
    assert calls["norm"] > 0
    assert calls["linear"] > 0
    assert "torch, compiled, for the others" in table["norms"]


@pytest.mark.gloo
def test_what_is_wrong_or_not_there_ends_the_run():
    (said,) = run_ranks(with_te, 1, fp8(kernels={"linears": "te"}), 1.2)
    assert said.startswith("train.kernels.linears = te: relative error 0.2")
    (said,) = run_ranks(refused, 1, fp8(kernels={"norms": "te"}))
    assert said.startswith(
        "train.kernels.norms = te: Transformer Engine cannot be imported (No module named 'transformer_engine')"
    )


def refused(config):
    try:
        steps(config)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"precision": "bf16", "kernels": {"linears": "te"}}, "train.kernels.linears = te: is for products in fp8"),
        (
            {"precision": "bf16", "kernels": {"linears": "torchao"}},
            "train.kernels.linears = torchao: is for products in fp8",
        ),
        ({"precision": "bf16", "fp8": "rowwise", "kernels": {"linears": "te"}}, "has one scale a tensor"),
        ({"precision": "fp32", "kernels": {"norms": "te"}}, "train.kernels.norms = te: is for bf16 runs"),
    ],
)
def test_what_does_not_go_together_is_refused(train, words):
    with pytest.raises(ConfigError, match=words):
        make_config(MODEL, train=train)
