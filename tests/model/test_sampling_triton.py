"""What a pass does between products, as kernels under Triton's interpreter, against the same in torch."""

import pytest
import torch
from cuda_rules import rounding

from esolm_megatron.config import ModelConfig
from esolm_megatron.model import between
from esolm_megatron.model.cache import KVCache
from esolm_megatron.model.rotary import rotary_tables

pytest.importorskip("triton")
from esolm_megatron.model import sampling_triton as kernels

CPU = torch.device("cpu")
SIZES = [(12, 1, 64), (3, 2, 16), (2, 4, 24), (1, 7, 128), (80, 1, 64), (30, 1, 96)]
"""Key-value heads, queries of each, channels."""


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def as_near(found, truth):
    """Arithmetic in fp32, rounded once."""
    step = 2.0**-8 if found.dtype == torch.bfloat16 else 0.0
    assert ((found.double() - truth).abs() <= step * truth.abs() + 4e-6 * truth.abs().max()).all()
    assert found.shape == truth.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_heads(sizes, norm, dtype):
    groups, queries, width = sizes
    y = numbers(5, 1, groups * (queries + 2) * width, dtype=dtype)
    norms = tuple(numbers(width, dtype=dtype, seed=i) for i in (1, 2)) if norm else None
    with torch.no_grad():
        rope = rotary_tables(torch.tensor([0, 3, 1, 900, 2]), width, 10000.0, dtype)
        eager = between.heads(y, rope, norms, sizes, 1e-5)
        wide = [None if x is None else [z.double() for z in x] for x in (rope, norms)]
        truth = between.heads(y.double(), wide[0], wide[1], sizes, 1e-5)
        with rounding():
            found = kernels.rotated(y, rope, norms, sizes, 1e-5)
    for ours, exact in zip(found[:2], truth[:2], strict=True):
        as_near(ours, exact)
        assert ours.dtype == dtype
        assert ours.is_contiguous()
    assert torch.equal(found[2], eager[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 3])
def test_the_cache_holds_what_torch_writes(kv_heads, int8, dtype):
    """To the last bit, also of 8 bits; values are a view of the product."""
    config = ModelConfig(
        vocab_size=32,
        seq_length=8,
        hidden_size=48 * kv_heads,
        num_layers=2,
        num_heads=2 * kv_heads,
        num_kv_heads=kv_heads,
    )
    width = config.head_dim
    y = numbers(4, 1, kv_heads * 4 * width, dtype=dtype) * 3
    y[1] = 0
    k, v = numbers(4, kv_heads, width, dtype=dtype, seed=1), y.view(4, kv_heads, 4, width)[:, :, -1]
    assert not v.is_contiguous()
    rows, slots = torch.tensor([0, 1, 1, 2]), torch.tensor([3, 0, 6, 8])
    theirs, ours = (KVCache(config, 3, 9, dtype, CPU, int8=int8) for _ in range(2))
    theirs.rows, theirs.slots = rows, slots
    theirs.store(1, k, v)
    kernels.store(k, v, ours.keys[1], ours.values[1], None if ours.scales is None else ours.scales[:, 1], rows, slots)
    assert theirs.keys[1].any()
    assert not ours.keys[0].any()
    for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values), (ours.scales, theirs.scales)):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("width", [48, 128])
def test_the_residual_stream_and_its_norm(width, kind, dtype):
    x, delta = (numbers(6, 1, width, dtype=dtype, seed=i) * 4 + 1 for i in (1, 2))
    weight, bias = (numbers(width, dtype=dtype, seed=i) for i in (3, 4))
    bias = bias if kind == "layernorm" else None
    with rounding():
        total, found = kernels.added(x, delta, weight, bias, 1e-5)
    assert torch.equal(total, x + delta)
    exact = [None if z is None else z.double() for z in (total, weight, bias)]
    as_near(found, between.normalise(*exact, 1e-5, kind))
    assert found.dtype == total.dtype == dtype
