"""The head's product and the losses of predicted tokens, without the logits of all of them at once.

Logits are made for some rows at a time, and where it is known what each loss will count, the gradients of that chunk at
once: no logit is made twice, and memory has a bound that knows neither the number of tokens nor the vocabulary. A chunk is
two products that read its logits' gradient and one that made them; between these, all elementwise work is two passes over
the logits (model/loss_triton.py on GPUs, `_Plain` elsewhere).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from esolm_megatron.model.kernels import LOW, Chunk, add_product, on_gpu, wide_product
from esolm_megatron.model.size import LOGITS_PER_CHUNK

OverRanks = Callable[[Tensor, Literal["max", "sum"]], Tensor]
"""A tensor of each tensor rank -> its maximum or sum over the ranks that share the vocabulary."""


def predicted_losses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    counts: Tensor | None = None,
    *,
    first_id: int,
    num_ids: int,
    over_ranks: OverRanks,
    chunk: int = LOGITS_PER_CHUNK,
) -> Tensor:
    """-log softmax(x weight^T + bias) at `targets`: (M,) fp32, or fp64 for fp64.

    x (M, H). weight (V', H), bias (V',): this rank's slice of the vocabulary, whose ids start at `first_id`; from its
    row `num_ids` on nothing is ever predicted. counts: (M,) what each loss will count: what is differentiated must then be
    a multiple of sum(counts * losses), and its gradients are made now. Without, logits are made again in backward.
    chunk: logits made at once.
    """
    local = targets - first_id
    inside = (local >= 0) & (local < weight.shape[0])
    local = local.clamp(0, weight.shape[0] - 1)
    if not torch.is_grad_enabled():
        counts = None
    elif counts is not None:
        counts = counts.to(torch.promote_types(x.dtype, torch.float32))
    work = _Chunks(local, inside, num_ids, over_ranks, max(chunk // max(weight.shape[0], 1), 1))
    return _ChunkedLoss.apply(x, weight, bias, counts, work)


class Elementwise(Protocol):
    """What happens to a chunk's logits between products; `top_and_sum` is called first, with the same chunk."""

    def top_and_sum(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """(m,) each: the greatest of the first `num_ids` logits, the sum of exp(logit - it), the target's logit."""

    def gradient(self, chunk: Chunk, top: Tensor, scale: Tensor, minus: Tensor, dtype: torch.dtype) -> Tensor:
        """(m, V') of `dtype`: exp(logit - top) scale, less `minus` at the target; 0 from `num_ids` on."""


class _Plain:
    """By torch's operators. Between the calls the logits hold exp(logit - top)."""

    @staticmethod
    def top_and_sum(chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        logits, bias, num_ids, local = chunk
        if bias is not None:
            logits += bias.to(logits.dtype)
        logits[:, num_ids:] = float("-inf")
        top = logits.amax(-1).clamp(min=torch.finfo(logits.dtype).min)  # a slice of padding has minus infinity only
        hit = logits.gather(1, local[:, None])[:, 0]
        return top, logits.sub_(top[:, None]).exp_().sum(-1), hit

    @staticmethod
    def gradient(chunk: Chunk, top: Tensor, scale: Tensor, minus: Tensor, dtype: torch.dtype) -> Tensor:
        chunk.logits.mul_(scale[:, None])
        return chunk.logits.scatter_add_(1, chunk.local[:, None], -minus[:, None]).to(dtype)


WANTED = "auto"
"""`train.kernels.loss` of this process."""


def elementwise(logits: Tensor) -> Elementwise:
    """Triton's two passes where it is installed and the logits are a GPU's; torch's operators elsewhere."""
    if on_gpu(logits) and logits.dtype == torch.float32 and WANTED != "torch":
        try:
            from esolm_megatron.model.loss_triton import Fused
        except ImportError:  # torch for GPUs brings Triton on Linux
            return _Plain()
        return Fused()
    return _Plain()


class _Chunks:
    """The passes over chunks of rows; see `predicted_losses` for the fields."""

    def __init__(self, local: Tensor, inside: Tensor, num_ids: int, over_ranks: OverRanks, rows: int):
        self.local, self.inside, self.num_ids, self.over_ranks, self.rows = local, inside, num_ids, over_ranks, rows

    def run(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """(M,) losses and, where `counts` are given, the gradients of sum(counts * losses) in x, weight and bias."""
        wide, low = torch.promote_types(x.dtype, torch.float32), x.dtype in LOW
        losses = x.new_empty(len(x), dtype=wide)
        dx = dw = db = None
        if counts is not None:
            dx = torch.empty_like(x)
            db = None if bias is None else torch.zeros_like(bias, dtype=wide)
        for at in range(0, len(x), self.rows):
            some = slice(at, at + self.rows)
            logits = wide_product(x[some], weight.t()) if low else F.linear(x[some], weight)
            work, inside = elementwise(logits), self.inside[some]
            part = Chunk(logits, bias, self.num_ids, self.local[some])
            top, total, hit = work.top_and_sum(part)
            highest = self.over_ranks(top.clone(), "max")
            share = torch.exp(top - highest)
            total, hit = self.over_ranks(torch.stack([total * share, torch.where(inside, hit, 0)]), "sum")
            losses[some] = torch.log(total) - (hit - highest)
            if counts is None or dx is None:
                continue
            scale, minus = counts[some] * share / total, counts[some] * inside
            d_logits = work.gradient(part, top, scale, minus, x.dtype)
            del logits, part
            torch.mm(d_logits, weight, out=dx[some])
            if db is not None:
                db += d_logits.sum(0, dtype=wide)
            if len(x) <= self.rows:
                dw = d_logits.t() @ x
            elif dw is None:
                dw = wide_product(d_logits.t(), x[some])
            else:
                add_product(dw, d_logits.t(), x[some])
            del d_logits  # the next chunk's would be made beside it
        if counts is not None:
            dw = torch.zeros_like(weight) if dw is None else dw.to(weight.dtype)
        return losses, (dx, dw, None if db is None or bias is None else db.to(bias.dtype))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor | None, work: _Chunks
    ) -> Tensor:
        losses, gradients = work.run(x, weight, bias, counts)
        ctx.work, ctx.known = work, counts is not None
        ctx.save_for_backward(*((counts, *gradients) if ctx.known else (x, weight, bias)))
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.known:
            return *ctx.work.run(*ctx.saved_tensors, grad)[1], None, None
        counts, *gradients = ctx.saved_tensors
        factor = (grad @ counts) / (counts @ counts).clamp(min=torch.finfo(counts.dtype).tiny)
        apart = (
            grad - factor * counts
        ).norm() > 1e-3 * grad.norm()  # false for NaN: bad steps are the guard's business
        torch._assert_async(~apart, "what is differentiated is no multiple of sum(counts * losses)")
        # in the wide type: rounded to 16 bits, a factor of 257 data ranks would be 256
        return *(None if x is None else _times(x, factor) for x in gradients), None, None


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """x factor, computed in the type of the factor, with one copy of x in it at a time."""
    return x * factor if x.dtype == factor.dtype else x.to(factor.dtype).mul_(factor).to(x.dtype)
