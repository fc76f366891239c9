"""A few rows times a matrix of 8 bits as a Triton kernel: the matrix is read once, as it is, and never written wider.

Under TRITON_INTERPRET=1 it runs on CPU tensors, which is how it is tested where there is no GPU.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
"""Of a program: the fewest that tensor cores multiply."""
BLOCK_N, BLOCK_K = 16, 256


@triton.jit
def _rows(x, matrix, scale, out, count, N, K, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
          EXACT: tl.constexpr):  # fmt: skip
    n, m = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, ROWS)
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x + m[:, None] * K + k[None], mask=(m < count)[:, None] & (k < K)[None], other=0.0)
        b = tl.load(matrix + n[:, None].to(tl.int64) * K + k[None], mask=(n < N)[:, None] & (k < K)[None], other=0)
        if EXACT:  # the interpreter multiplies the bits of bf16 as integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        else:
            b = b.to(a.dtype)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    total *= tl.load(scale + n, mask=n < N, other=0.0).to(tl.float32)[None]
    where = m[:, None].to(tl.int64) * N + n[None]
    tl.store(out + where, total.to(out.dtype.element_ty), mask=(m < count)[:, None] & (n < N)[None])


def few_rows(x: Tensor, matrix: Tensor, scale: Tensor) -> Tensor:
    """x (M, K) contiguous, M up to 16, of a floating type; matrix (N, K) int8; scale (N,) -> (M, N) of x's type."""
    (count, width), height = x.shape, len(matrix)
    out = torch.empty(count, height, dtype=x.dtype, device=x.device)
    _rows[(triton.cdiv(height, BLOCK_N),)](
        x, matrix, scale, out, count, height, width, ROWS=ROWS, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        EXACT=not isinstance(_rows, triton.JITFunction), num_warps=4,
    )  # fmt: skip
    return out
