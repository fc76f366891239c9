"""Matrices of 8 bits: what they give, how it is worked out on each device, and what a model with them says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity import random_model

from esolm_megatron import load_pretrained
from esolm_megatron.model import kernels
from esolm_megatron.model.int8 import FEW_ROWS, Int8Linear, with_int8_weights
from esolm_megatron.model.pretrained import save_model

INTERPRETED = """
import torch
from esolm_megatron.model.int8_triton import few_rows
generator = torch.Generator().manual_seed(0)
for rows, width, height, dtype in ((1, 256, 16, torch.float32), (16, 300, 37, torch.float32), (3, 64, 130, torch.bfloat16)):
    x = torch.randn(rows, width, generator=generator).to(dtype)
    matrix = torch.randint(-127, 128, (height, width), generator=generator, dtype=torch.int8)
    scale = torch.rand(height, generator=generator).to(dtype)
    wanted = (x.double() @ matrix.double().t()) * scale.double()
    found = few_rows(x, matrix, scale).double()
    assert ((found - wanted).norm() / wanted.norm()) < (1e-6 if dtype == torch.float32 else 4e-3), (rows, width, height)
print("right")
"""


def test_the_triton_kernel_under_its_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "right\n", done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 4, 5, FEW_ROWS + 1])
@pytest.mark.parametrize("width", [48, 40])
def test_a_product_is_that_of_the_rounded_matrix(dtype, rows, width):
    """Whoever multiplies: torch's kernel for few rows of bf16, or a widened matrix."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(width, 24, dtype=dtype)
    linear.weight.data[3] = 0
    narrow = Int8Linear(linear)
    x = torch.randn(2, rows, width).to(dtype)[:, :, :] if rows > 1 else torch.randn(1, 1, width).to(dtype)
    rounded = narrow.matrix.double() * narrow.scale.double()[:, None]
    wanted = x.double() @ rounded.t() + linear.bias.double()
    exact = x.double() @ linear.weight.double().t() + linear.bias.double()
    found = narrow(x).double()
    assert found.shape == (*x.shape[:-1], 24)
    assert (found - wanted).norm() < {torch.bfloat16: 1e-2}.get(dtype, 1e-6) * wanted.norm()
    assert 0 < (wanted - exact).norm() < 0.012 * exact.norm()


def test_torch_has_a_kernel_for_few_rows_of_bf16():
    x = torch.randn(4, 48).bfloat16()
    assert kernels.int8_rows(x) is not None
    assert kernels.int8_rows(torch.randn(5, 48).bfloat16()) is None
    assert kernels.int8_rows(x.float()) is None


def test_a_model_of_8_bits_is_smaller_and_says_nearly_the_same(tmp_path):
    model = random_model(torch.float32, spread=0.5, num_layers=3)
    save_model(tmp_path / "model", model.shape, 0.5, model.named_parameters(), dtype=torch.float32)
    whole = load_pretrained(Path(tmp_path / "model"))
    narrow = load_pretrained(Path(tmp_path / "model"), weights="int8")
    tokens = torch.randint(0, 22, (16, 13))
    order = torch.arange(13).expand(16, 13)
    a, b = (m.log_likelihood(tokens, order).mean().item() for m in (whole, narrow))
    assert a == pytest.approx(b, rel=0.01)
    assert a != b
    matrices = [m for m in narrow.model.layers.modules() if isinstance(m, Int8Linear)]
    assert len(matrices) == 4 * 3
    assert all(m.matrix.dtype == torch.int8 for m in matrices)
    assert sum(p.numel() for p in narrow.model.layers.parameters() if p.dim() > 1) == 0
    made = narrow.sample(2, 13, steps=4, seed=1)
    assert torch.isfinite(made[1]).all()
    assert with_int8_weights(narrow.model) is narrow.model
