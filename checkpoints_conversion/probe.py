"""The proof of a conversion: one input through the weights before and after it, with one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from esolm_megatron.config import ModelConfig
from esolm_megatron.model.attention import PackedAttention, PackedLayout
from esolm_megatron.model.layers import PlainLinears
from esolm_megatron.model.pretrained import open_tensors
from esolm_megatron.model.transformer import EsoLM

BOUNDS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of a logit, times the largest logit where that is above 1. A wrong tensor moves logits by about
their own size; rounding to bf16 by one or two hundredths of it."""

NUM_TOKENS = 8


def probe_row(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Tokens and positions, (L,) int64 each: distinct places of the sequence, far apart, not in their order."""
    size = min(NUM_TOKENS, config.seq_length)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.mask_id, (size,), generator=generator)
    return tokens, (torch.arange(size) * (config.seq_length // size))[torch.randperm(size, generator=generator)]


@torch.no_grad()
def streamed_logits(
    config: ModelConfig,
    read: Callable[[str], Tensor],
    tokens: Tensor,
    positions: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Logits (L, V) of one causal row, as the whole network would give them, from weights that `read` gives by name.

    tokens, positions: (L,) int64 in the order of generation. dtype: that of the arithmetic. Embedding, blocks and head
    are held one after another.
    """
    attend, whole = PackedAttention(PackedLayout(len(tokens), 1)), config.num_layers
    parts = [range(0), *(range(i, i + 1) for i in range(whole)), range(0)]
    x = None
    for number, layers in enumerate(parts):
        first, last = number == 0, number == len(parts) - 1
        stage = EsoLM(config, PlainLinears(dtype), layers=layers, first=first, last=last).eval()
        names = stage.whole_names()
        for name, parameter in stage.named_parameters():
            parameter.copy_(read(names[name]))
        if x is not None:
            stage.set_input_tensor(x)
        x = stage(tokens, positions, attend)
        del stage, parameter
    assert x is not None
    return x


def folder_logits(folder: str | Path, tokens: Tensor, positions: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`streamed_logits` of an inference folder."""
    info, tensors = open_tensors(folder)
    return streamed_logits(info.model, tensors.read, tokens, positions, dtype)


def difference(mine: Tensor, theirs: Tensor, bound: float) -> tuple[float, float]:
    """(largest difference of a logit, `bound` scaled by the largest logit); minus infinity on both sides agrees.

    Raises:
        ValueError: the shapes differ.
    """
    if mine.shape != theirs.shape:
        raise ValueError(f"has shape {tuple(theirs.shape)}, the model gives {tuple(mine.shape)}")
    mine, theirs = mine.double(), theirs.double()
    seen = ~(torch.isneginf(mine) & torch.isneginf(theirs))
    mine, theirs = mine[seen], theirs[seen]
    return (mine - theirs).abs().max().item(), bound * max(1.0, theirs.abs().max().item())


def require(found: float, tolerance: float, what: str, out: str | Path, refusal: type[Exception]) -> None:
    """Raise `refusal`, with `what` and both numbers, unless the difference `found` is within its bound; nan is not."""
    if not found <= tolerance:
        raise refusal(f"{what}: largest difference {found:.3g}, allowed {tolerance:.3g}; nothing was written to {out}")
