"""The elementwise work of the loss (model/loss.py) as two Triton kernels: each reads the fp32 logits once.

The first takes the greatest logit, the sum and the target's logit of a row; the second writes the logits' gradient in the
type of the next products. Bias, mask token and padding cost no pass of their own. Under TRITON_INTERPRET=1 they run on CPU
tensors, which is how they are tested where there is no GPU.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esolm_megatron.model.kernels import Chunk

BLOCK = 4096


@triton.jit
def _top_and_sum(logits, bias, local, top, total, hit, stride, num_ids, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * stride
    greatest = -3.4028234663852886e38  # of a slice of padding: minus infinity would make its difference a NaN
    found = 0.0
    for start in range(0, num_ids, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        inside = ids < num_ids
        x = tl.load(base + ids, mask=inside, other=float("-inf"))
        if HAS_BIAS:
            x += tl.load(bias + ids, mask=inside, other=0.0).to(tl.float32)
        higher = tl.maximum(greatest, tl.max(x, 0))
        found = found * tl.exp(greatest - higher) + tl.sum(tl.exp(x - higher), 0)
        greatest = higher
    target = tl.load(local + row)
    at_target = tl.load(base + target)
    if HAS_BIAS:
        at_target += tl.load(bias + target).to(tl.float32)
    tl.store(top + row, greatest)
    tl.store(total + row, found)
    tl.store(hit + row, at_target)


@triton.jit
def _gradient(
    logits,
    bias,
    local,
    top,
    scale,
    minus,
    out,
    stride,
    out_stride,
    num_ids,
    width,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * stride + ids, mask=ids < num_ids, other=float("-inf"))
    if HAS_BIAS:
        x += tl.load(bias + ids, mask=ids < num_ids, other=0.0).to(tl.float32)
    d = tl.exp(x - tl.load(top + row)) * tl.load(scale + row)
    d = tl.where(ids == tl.load(local + row), d - tl.load(minus + row), d)
    tl.store(out + row.to(tl.int64) * out_stride + ids, d.to(out.dtype.element_ty), mask=ids < width)


class Fused:
    """`Elementwise` by these kernels; the logits stay as they are."""

    @staticmethod
    def top_and_sum(chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """One kernel, a row each program."""
        logits, bias, num_ids, local = chunk
        top, total, hit = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(3))
        _top_and_sum[(len(logits),)](
            logits, bias, local, top, total, hit, logits.stride(0), num_ids, HAS_BIAS=bias is not None, BLOCK=BLOCK,
            num_warps=8,
        )  # fmt: skip
        return top, total, hit

    @staticmethod
    def gradient(chunk: Chunk, top: Tensor, scale: Tensor, minus: Tensor, dtype: torch.dtype) -> Tensor:
        """One kernel, a block of a row each program."""
        logits, bias, num_ids, local = chunk
        rows, width = logits.shape
        out = torch.empty(rows, width, dtype=dtype, device=logits.device)
        _gradient[(rows, triton.cdiv(width, BLOCK))](
            logits, bias, local, top, scale, minus, out, logits.stride(0), out.stride(0), num_ids, width,
            HAS_BIAS=bias is not None, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
        return out
