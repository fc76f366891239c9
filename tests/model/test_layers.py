"""The matrix product of inference against the plain one."""

import pytest
import torch
import torch.nn.functional as F

from esolm_megatron.model.layers import matmul


@pytest.mark.parametrize("rows", [(3,), (4,), (11, 1), (2, 5), (96,), (97,)])
@pytest.mark.parametrize("bias", [None, torch.randn(13, dtype=torch.float64)])
def test_few_rows_give_what_linear_gives(rows, bias):
    x, weight = torch.randn(*rows, 7, dtype=torch.float64), torch.randn(13, 7, dtype=torch.float64)
    with torch.inference_mode():
        found = matmul(x, weight, bias)
    assert found.shape == (*rows, 13)
    assert torch.allclose(found, F.linear(x, weight, bias), atol=1e-13)


def test_training_and_narrow_types_are_left_alone():
    x, weight = torch.randn(8, 7), torch.randn(13, 7)
    assert torch.equal(matmul(x, weight), F.linear(x, weight))
    with torch.inference_mode():
        narrow = matmul(x.bfloat16(), weight.bfloat16())
    assert torch.equal(narrow, F.linear(x.bfloat16(), weight.bfloat16()))
