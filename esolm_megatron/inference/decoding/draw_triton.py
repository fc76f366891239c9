"""`draw_tokens` as one Triton kernel: the same words, the same arithmetic, a row of logits each program, no copy of any.

It reads a row twice (greatest logit; sums of blocks of weights) and one block again, where the token is. Tokens outside of a
nucleus cost a further reading each, a top-k eight: its threshold is found digit by digit. How a row is drawn is data, so rows
of all kinds share a launch, and nothing is asked of the host. Under TRITON_INTERPRET=1 it runs on CPU tensors.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esolm_megatron.model.kernels import Chunk
from esolm_megatron.model.loss_triton import Fused

TILE = 16
"""Blocks of 256 ids that are read at once."""


@triton.jit
def _weigh(x, highest, temperature):
    sharp = tl.exp((x - highest) / tl.where(temperature == 0, 1.0, temperature))
    return tl.where(temperature == 0, (x == highest).to(tl.float32), sharp)


@triton.jit
def _sum_blocks(base, sums, num_ids, highest, temperature, above, TILE: tl.constexpr):
    """Weights greater than `above`, added up in blocks of 256 ids; what is no number stays one that is none."""
    for first in range(0, tl.cdiv(num_ids, 256), TILE):
        block = first + tl.arange(0, TILE)
        ids = block[:, None] * 256 + tl.arange(0, 256)[None]
        w = _weigh(tl.load(base + ids, mask=ids < num_ids, other=float("-inf")), highest, temperature)
        tl.store(sums + block, tl.sum(tl.where(w <= above, 0.0, w), 1), mask=block * 256 < num_ids)
    tl.debug_barrier()  # other threads read what these have written


@triton.jit
def _place(w, target, WIDTH: tl.constexpr):
    """The first place whose running sum exceeds the target, and the sum before it; a weight of 0 is never hit."""
    at, running = tl.arange(0, WIDTH), tl.cumsum(w.to(tl.float64), 0)
    last = tl.max(tl.where(w > 0, at, 0), 0)
    found = tl.minimum(tl.min(tl.where((w > 0) & (running > target), at, WIDTH), 0), last)
    return found, tl.sum(tl.where(at < found, w, 0.0).to(tl.float64), 0)


@triton.jit
def _pick(base, sums, num_ids, highest, temperature, above, word, BLOCKS: tl.constexpr):
    """A token in proportion to the weights greater than `above`, whose blocks have these sums, and their total."""
    at = tl.arange(0, BLOCKS)
    by_block = tl.load(sums + at, mask=at * 256 < num_ids, other=0.0)
    total = tl.sum(by_block.to(tl.float64), 0)
    target = ((word >> 11) & 9007199254740991).to(tl.float64) * 1.1102230246251565e-16 * total
    block, before = _place(by_block, target, BLOCKS)
    ids = block * 256 + tl.arange(0, 256)
    w = _weigh(tl.load(base + ids, mask=ids < num_ids, other=float("-inf")), highest, temperature)
    within, _ = _place(tl.where(w > above, w, 0.0), target - before, 256)
    return block * 256 + within, total


@triton.jit
def _below_kth(base, num_ids, highest, temperature, k, TILE: tl.constexpr):
    """The number just below the k-th greatest weight: floats of one sign have the order of their bits."""
    digits, bits = tl.arange(0, 16).to(tl.int64), tl.zeros([], tl.int64)
    for step in range(8):
        candidates = bits + (digits << (28 - 4 * step))
        counts = tl.zeros([16], tl.int32)
        for first in range(0, num_ids, 16 * TILE):
            ids = first + tl.arange(0, 16 * TILE)
            w = _weigh(tl.load(base + ids, mask=ids < num_ids, other=float("-inf")), highest, temperature)
            found = w.to(tl.int32, bitcast=True).to(tl.int64)[None] >= candidates[:, None]
            counts += tl.sum((found & (ids < num_ids)[None]).to(tl.int32), 1)
        bits = tl.max(tl.where(counts >= k, candidates, bits), 0)
    return tl.where(bits > 0, (bits - 1).to(tl.int32).to(tl.float32, bitcast=True), -1.0)


@triton.jit
def _draw(
    logits, raw, rows, kinds, sums, tokens, log_probs, stride, num_ids, num_blocks, BLOCKS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    base, sums = logits + m * stride, sums + m * num_blocks
    kind = kinds + 4 * tl.load(rows + m)
    temperature, top_p, top_k = tl.load(kind).to(tl.float32), tl.load(kind + 1), tl.load(kind + 2).to(tl.int32)
    greatest = tl.full([256 * TILE], float("-inf"), tl.float32)
    for first in range(0, num_ids, 256 * TILE):
        ids = first + tl.arange(0, 256 * TILE)
        greatest = tl.maximum(greatest, tl.load(base + ids, mask=ids < num_ids, other=float("-inf")))
    highest = tl.max(greatest, 0)
    above = -1.0
    if (top_k > 0) & (top_k < num_ids):
        above = _below_kth(base, num_ids, highest, temperature, top_k, TILE)
    _sum_blocks(base, sums, num_ids, highest, temperature, above, TILE)
    word = tl.load(raw + m)
    token, total = _pick(base, sums, num_ids, highest, temperature, above, word, BLOCKS)
    normaliser, enough, outside = total, total * top_p, top_p < 1
    while outside:
        chosen = _weigh(tl.load(base + token), highest, temperature)
        tl.debug_barrier()  # the sums are read before they are written over
        _sum_blocks(base, sums, num_ids, highest, temperature, chosen, TILE)
        word += -7046029254386353131
        word = (word ^ ((word >> 30) & 17179869183)) * -4658895280553007687
        word = (word ^ ((word >> 27) & 137438953471)) * -7723592293110705685
        word = word ^ ((word >> 31) & 8589934591)
        likelier, weight = _pick(base, sums, num_ids, highest, temperature, chosen, word, BLOCKS)
        outside = weight >= enough
        token = tl.where(outside, likelier, token)
    if (temperature != 1) | (above >= 0):
        tl.debug_barrier()
        _sum_blocks(base, sums, num_ids, highest, 1.0, -1.0, TILE)
        at = tl.arange(0, BLOCKS)
        normaliser = tl.sum(tl.load(sums + at, mask=at * 256 < num_ids, other=0.0).to(tl.float64), 0)
    tl.store(tokens + m, token.to(tl.int64))
    log_p = tl.load(base + token) - (highest.to(tl.float64) + tl.log(normaliser)).to(tl.float32)
    tl.store(log_probs + m, log_p)


def draw(logits: Tensor, raw: Tensor, rows: Tensor, kinds: Tensor, held: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens (M,) and log-probabilities (M,), as `draw_tokens` gives them for rows that are each drawn in their own way.

    logits: (M, V) fp32; written to, with `held`, and restored. raw, rows: (M,) int64. kinds: (R, 4) fp64: temperature, top_p,
    top_k and penalty of each row. held: (M, K) ids that the rows hold; None where no row has a penalty.
    """
    (count, num_ids), rows, raw = logits.shape, rows.contiguous(), raw.contiguous()  # one text's are expanded
    blocks = triton.cdiv(num_ids, 256)
    sums = torch.empty(count, blocks, dtype=torch.float32, device=logits.device)
    tokens, log_probs = torch.empty_like(raw), torch.empty_like(sums[:, 0])
    before = None
    if held is not None:
        before, penalty = logits.gather(1, held), kinds[rows, 3:].float()
        logits.scatter_(1, held, torch.where(before > 0, before / penalty, before * penalty))
    _draw[(count,)](
        logits, raw, rows, kinds, sums, tokens, log_probs, logits.stride(0), num_ids, blocks,
        BLOCKS=triton.next_power_of_2(blocks), TILE=TILE, num_warps=8,
    )  # fmt: skip
    if held is not None and before is not None:
        logits.scatter_(1, held, before)
        top, total, hit = Fused.top_and_sum(Chunk(logits, None, num_ids, tokens))
        log_probs = hit - (top + total.log())
    return tokens, log_probs
