"""Tokens drawn from logits, exactly, without sorting the vocabulary and without noise of its size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from esolm_megatron.inference.request import Draw
from esolm_megatron.model.kernels import on_gpu

_BLOCK = 256


DEFAULT = Draw()


def fused_draw(like: Tensor) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """One kernel for rows of all kinds, for logits of this type: see draw_triton.py. None: `draw_tokens`."""
    if not on_gpu(like) or like.dtype != torch.float32:
        return None
    try:
        from esolm_megatron.inference.decoding.draw_triton import draw
    except ImportError:  # torch for GPUs brings Triton on Linux
        return None
    return draw


def draw_tokens(logits: Tensor, raw: Tensor, draw: Draw = DEFAULT, held: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Tokens (M,) drawn as `draw` says, and log-probabilities (M,) of them under the untouched logits.

    logits: (M, V) fp32 or fp64. raw: (M,) int64 random words, one for each draw. held: (M, K) ids that each row holds,
    for the repetition penalty; an id whose logit is minus infinity stands for none.
    """
    penalised = logits if held is None else penalise(logits, held, draw.repetition_penalty)
    highest = penalised.amax(-1, keepdim=True)
    vocab = logits.shape[1]
    weights = logits.new_zeros(len(logits), -(-vocab // _BLOCK), _BLOCK)
    flat = weights.flatten(1)[:, :vocab]
    if draw.temperature == 0:
        flat.copy_(penalised == highest)
    else:
        torch.sub(penalised, highest, out=flat)
        flat.div_(draw.temperature).exp_() if draw.temperature != 1 else flat.exp_()
    if 0 < draw.top_k < vocab:
        flat.masked_fill_(flat < flat.topk(draw.top_k).values[:, -1:], 0)
    by_block = _cumulative(weights)
    total = by_block[:, -1]
    tokens = _inverse_cdf(weights, by_block, raw)
    if draw.top_p < 1:
        _into_nucleus(tokens, weights, raw, total * draw.top_p)
    tokens.clamp_(max=vocab - 1)  # only logits that are no numbers get there
    if draw == Draw(top_p=draw.top_p):
        normaliser = (highest[:, 0].double() + total.log()).to(logits.dtype)
    else:
        normaliser = logits.logsumexp(-1)
    return tokens, logits.gather(1, tokens[:, None])[:, 0] - normaliser


def penalise(logits: Tensor, held: Tensor, penalty: float) -> Tensor:
    """A copy of the logits (M, V) whose ids `held` (M, K) are penalised once each."""
    found = logits.gather(1, held)
    return logits.scatter(1, held, torch.where(found > 0, found / penalty, found * penalty))


def probabilities(logits: Tensor, kinds: Tensor, filtered: bool) -> Tensor:
    """The distribution (M, V), fp32 or fp64, that `draw_tokens` draws from, without the repetition penalty.

    kinds: (M, 4) fp64, temperature, top_p, top_k and penalty of each row. filtered: whether any has a top_k or top_p, which
    cost a sort here. For verified decoding, which compares two of them.
    """
    temperature, top_p, top_k, _ = kinds.unsqueeze(-1).unbind(1)
    sharp = (logits / torch.where(temperature == 0, 1, temperature).to(logits.dtype)).softmax(-1)
    p = torch.where(temperature == 0, (logits == logits.amax(-1, keepdim=True)).to(logits.dtype), sharp)
    if filtered:
        most, ranked = p.shape[1], p.sort(descending=True).values
        count = torch.where(top_k > 0, top_k, most).long().clamp(max=most)
        least = ranked.gather(1, count - 1)
        ranked = ranked.masked_fill(ranked < least, 0)
        total = ranked.sum(-1, keepdim=True)
        before = (ranked / total).double().cumsum(-1) - ranked / total
        kept = torch.where(top_p < 1, (before < top_p).sum(-1, keepdim=True), most)
        p = p.masked_fill(p < torch.maximum(least, ranked.gather(1, kept.clamp(min=1) - 1)), 0)
    return p / p.sum(-1, keepdim=True)


def pick(p: Tensor, raw: Tensor) -> Tensor:
    """Index (M,) drawn in proportion to the rows of p (M, V), by the inverse CDF."""
    return _inverse_cdf(p[:, None], p.sum(-1, keepdim=True).double(), raw)


def _cumulative(weights: Tensor) -> Tensor:
    """Running sums over the blocks (M, blocks) fp64; within a block the weights' own type is precise enough."""
    return weights.sum(-1).double().cumsum(-1)


def _inverse_cdf(weights: Tensor, by_block: Tensor, raw: Tensor) -> Tensor:
    """Index (M,) drawn in proportion to `weights` (M, blocks, width): first its block, then the token in it.

    by_block: their running sums. An index of weight zero is never drawn.
    """
    uniform = ((raw >> 11) & ((1 << 53) - 1)).double() * 2.0**-53
    target = uniform * by_block[:, -1]
    block = _first_above(by_block, target)
    before = by_block.gather(1, (block - 1).clamp(min=0)[:, None])[:, 0].masked_fill(block == 0, 0.0)
    within = weights[torch.arange(len(block), device=block.device), block].double().cumsum(-1)
    return block * weights.shape[2] + _first_above(within, target - before)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """First place (M,) where a cumulative sum (M, K) exceeds the target; rounding never lets it pass the last increase."""
    total = cumulative[:, -1]
    target = torch.minimum(target.clamp(min=0), torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp(max=cumulative.shape[1] - 1)


def _into_nucleus(tokens: Tensor, weights: Tensor, raw: Tensor, enough: Tensor) -> None:
    """Draw `tokens` (M,) again, in place, where they are not among the likeliest that together weigh `enough` (M,).

    A token is outside if strictly likelier ones weigh enough already; then the next draw is among those likelier ones,
    which hold the whole nucleus. So what is accepted has the distribution restricted to the nucleus, exactly, and
    nothing is sorted.
    """
    left, drawn = torch.arange(len(tokens), device=tokens.device), tokens
    while True:
        chosen = weights.flatten(1).gather(1, drawn[:, None])[..., None]
        likelier = torch.where(weights > chosen, weights, 0)
        by_block = _cumulative(likelier)
        outside = by_block[:, -1] >= enough
        if not outside.any():
            return
        left, enough, raw = left[outside], enough[outside], _next_words(raw[outside])
        weights = likelier[outside]
        drawn = _inverse_cdf(weights, by_block[outside], raw)
        tokens[left] = drawn


def _next_words(raw: Tensor) -> Tensor:
    """The random word (M,) int64 after each word: one step of splitmix64, whose shifts must not keep the sign."""
    x = raw + (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))
