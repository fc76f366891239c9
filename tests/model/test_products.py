"""Products of a few rows by oneDNN against the plain ones, and what decides which are made."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from esolm_megatron.config import ModelConfig
from esolm_megatron.inference import sample
from esolm_megatron.model import products
from esolm_megatron.model.layers import PlainLinears
from esolm_megatron.model.products import FastProducts, has_onednn, matmul
from esolm_megatron.model.transformer import EsoLM, initialise

onednn = pytest.mark.skipif(not has_onednn(), reason="torch was built without oneDNN")
BY_ONEDNN, COPY = "mkldnn::_linear_pointwise", "mkldnn::_reorder_linear_weight"


def layer(out_features=31, in_features=17, dtype=torch.float32, bias=True):
    return nn.Linear(in_features, out_features, bias=bias, dtype=dtype)


def calls(action):
    """How often each operator ran."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        action()
    return {event.key: event.count for event in seen.key_averages()}


def small_model(dtype=torch.float32, seed=0):
    shape = ModelConfig(num_layers=2, hidden_size=24, num_heads=2, vocab_size=37, seq_length=48)
    model = EsoLM(shape, PlainLinears(dtype))
    initialise(model, seed)
    return model


@onednn
@pytest.mark.parametrize("entered", [1, products._COPY_AFTER + 1], ids=["as they are", "copied"])
@pytest.mark.parametrize("rows", [(1,), (2,), (2, 1), (3,), (5, 1), (256,), (257,)])
@pytest.mark.parametrize("shape", [(31, 17), (17, 31)])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_give_what_linear_gives(rows, shape, bias, entered):
    one, x = layer(*shape, bias=bias), torch.randn(*rows, shape[1])
    fast = FastProducts(one)
    with torch.inference_mode():
        for _ in range(entered):
            with fast:
                found = matmul(x, one.weight, one.bias)
        assert found.shape == (*rows, shape[0])
        assert torch.allclose(found, F.linear(x, one.weight, one.bias), atol=1e-5)


@onednn
def test_which_library_multiplies():
    one, more = layer(), layer()
    fast = FastProducts(one)

    def product(rows, which=one):
        with torch.inference_mode(), fast:
            matmul(torch.randn(rows, 17), which.weight, which.bias)

    assert calls(lambda: product(3))[BY_ONEDNN] == 1
    assert BY_ONEDNN not in calls(lambda: product(257)), "many rows are what F.linear is for"
    assert BY_ONEDNN not in calls(lambda: product(2)), "two rows are fastest from the right"
    assert BY_ONEDNN not in calls(lambda: product(3, more)), "a matrix of another model"
    assert BY_ONEDNN not in calls(lambda: matmul(torch.randn(3, 17), one.weight)), "outside of it nothing changes"


@onednn
def test_copies_are_made_once_and_only_when_they_pay(monkeypatch):
    model = small_model()
    few = calls(lambda: sample(model, 2, products._COPY_AFTER, alpha_0=0.0, steps=1))
    assert few[BY_ONEDNN]
    assert COPY not in few
    many = calls(lambda: sample(model, 2, products._COPY_AFTER + 3, alpha_0=0.0, steps=1))
    assert many[COPY] == sum(p.dim() == 2 for p in model.parameters())
    monkeypatch.setattr(products, "_MOST_BYTES", 1000)
    assert COPY not in calls(lambda: sample(model, 2, products._COPY_AFTER + 3, alpha_0=0.0, steps=1))


@onednn
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_alone(dtype):
    assert BY_ONEDNN not in calls(lambda: sample(small_model(dtype), 2, 40, alpha_0=0.0, steps=1))


def test_a_sample_sees_the_weights_as_they_are_now():
    """Also weights that were changed behind autograd's back, as optimizers of others do."""
    model, other = small_model(seed=0), small_model(seed=1)
    sample(model, 2, 40, alpha_0=0.0, steps=1)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    found, wanted = (sample(m, 2, 40, alpha_0=0.0, steps=1) for m in (model, other))
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
