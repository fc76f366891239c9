"""Losses of predicted tokens without the logits of all of them at once.

Logits are made for some rows at a time. Those of the first few chunks are kept for the backward pass, which makes the
others again; so memory has a bound that knows neither the number of tokens nor the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from esolm_megatron.model.kernels import wide_product
from esolm_megatron.model.size import KEPT_CHUNKS, LOGITS_PER_CHUNK

OverRanks = Callable[[Tensor, Literal["max", "sum"]], Tensor]
"""An (M,) tensor of each tensor rank -> its maximum or sum over the ranks that share the vocabulary."""


def predicted_losses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    first_id: int,
    num_ids: int,
    over_ranks: OverRanks,
    chunk: int = LOGITS_PER_CHUNK,
    kept: int = KEPT_CHUNKS,
) -> Tensor:
    """-log softmax(x weight^T + bias) at `targets`: (M,) fp32, or fp64 for fp64.

    x (M, H). weight (V', H), bias (V',): this rank's slice of the vocabulary, whose ids start at `first_id`; from its
    row `num_ids` on nothing is ever predicted. chunk: logits made at once. kept: chunks of them kept for backward.
    """
    rows = max(chunk // max(weight.shape[0], 1), 1)
    local = targets - first_id
    inside = (local >= 0) & (local < weight.shape[0])
    local = local.clamp(0, weight.shape[0] - 1)[:, None]
    kept = kept if torch.is_grad_enabled() else 0
    return _ChunkedLoss.apply(x, weight, bias, local, inside, num_ids, over_ranks, rows, kept)


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, num_ids: int) -> Tensor:
    low = x.dtype in (torch.bfloat16, torch.float16)
    logits = wide_product(x, weight.t()) if low else F.linear(x, weight)
    if bias is not None:
        logits += bias.to(logits.dtype)
    logits[:, num_ids:] = float("-inf")
    return logits


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        local: Tensor,
        inside: Tensor,
        num_ids: int,
        over_ranks: OverRanks,
        rows: int,
        kept: int,
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        top, total, hit = (x.new_empty(len(x), dtype=wide) for _ in range(3))
        ctx.exps = []
        for at in range(0, len(x), rows):
            some = slice(at, at + rows)
            logits = _logits(x[some], weight, bias, num_ids)
            top[some] = logits.amax(-1).clamp(min=torch.finfo(wide).min)  # a slice of padding has minus infinity only
            hit[some] = logits.gather(1, local[some])[:, 0]
            exps = logits.sub_(top[some, None]).exp_()
            total[some] = exps.sum(-1)
            if len(ctx.exps) < kept:
                ctx.exps.append(exps)
        hit = torch.where(inside, hit, 0)
        highest = over_ranks(top.clone(), "max")
        share = torch.exp(top - highest)
        total = over_ranks(total * share, "sum")
        losses = torch.log(total) - (over_ranks(hit, "sum") - highest)
        ctx.save_for_backward(x, weight, bias, local, inside, top, share / total)
        ctx.num_ids, ctx.rows = num_ids, rows
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, local, inside, top, share = ctx.saved_tensors
        scale, minus = (grad * share)[:, None], -(grad * inside)[:, None]
        dx = torch.empty_like(x)
        one = len(x) <= ctx.rows
        dw = None if one else torch.zeros_like(weight, dtype=top.dtype)
        db = None if bias is None else torch.zeros_like(bias, dtype=top.dtype)
        for number, at in enumerate(range(0, len(x), ctx.rows)):
            some = slice(at, at + ctx.rows)
            if number < len(ctx.exps):
                d_logits = ctx.exps[number] * scale[some]
            else:
                logits = _logits(x[some], weight, bias, ctx.num_ids)
                d_logits = logits.sub_(top[some, None]).exp_().mul_(scale[some])
            d_logits.scatter_add_(1, local[some], minus[some])
            if db is not None:
                db += d_logits.sum(0)
            low = d_logits.to(x.dtype)
            torch.mm(low, weight, out=dx[some])
            if dw is None:
                dw = low.t() @ x
            else:
                dw += wide_product(low.t(), x[some])
        assert dw is not None or not len(x)
        dw = torch.zeros_like(weight) if dw is None else dw.to(weight.dtype)
        return dx, dw, None if db is None else db.to(bias.dtype), None, None, None, None, None, None
