"""Rotary position embedding with a position for each token, in the rotate-half layout of Llama in `transformers`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the tokens' true sequence positions, each (T, 1, head_dim).

    positions: (T,) integers. Frequencies are fp32 numbers in every dtype, as in the reference and in
    `transformers`, so that an fp64 model is the same function; angles are fp32, or fp64 for fp64 models.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angles = positions.to(wide)[:, None] * (1.0 / base**exponents).to(wide)[None]
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """x (T, heads, head_dim), turned by its positions."""
    cos, sin = tables
    if torch.compiler.is_compiling():  # which fuses this, and its backward
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    """Written in halves: the plain formula makes five tensors of the size of x, and as many more in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = x.shape[-1] // 2
    (a, b), (c, d), cos, sin = x.split(half, -1), out.split(half, -1), cos[..., :half], sin[..., :half]
    torch.mul(a, cos, out=c).addcmul_(b, sin, value=-direction)
    torch.mul(b, cos, out=d).addcmul_(a, sin, value=direction)
    return out
