"""Rotary position embedding with a position for each token, in the rotate-half layout of Llama in `transformers`."""

from __future__ import annotations

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
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
