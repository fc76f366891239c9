"""Several tokens a pass, with the distribution of one token a pass: proposals that the same network verifies.

Masks that are filled together are drawn independently, which is not the model. But a network that is causal over the
order also gives, in one pass, what it would have said one by one: a mask that sees the tokens before its place and
nothing else. So proposals are drawn in parallel from masks, and a later pass, which feeds them as tokens, accepts each
with probability min(1, p / q), p being the exact prediction and q the one that it was drawn from. The first that is
refused is drawn anew from max(0, p - q), the rest are forgotten (speculative sampling). A pass feeds, for a row,

    certain tokens   proposals   groups of masks: one after the certain tokens, one after each proposal
    x                d1 d2       | z z z | z z z | z z z |

The first mask of a group verifies the proposal that comes next, or is the next token's exact prediction; the others are
the next proposals, whichever group turns out to stand where the text ends. That is `passes` = 1: k + k * k fed for
each row. With `passes` = 2 groups hold one mask where there are proposals, and k where there are none, in turn: fewer
fed, more passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esolm_megatron.inference.decoding.draw import pick, probabilities
from esolm_megatron.inference.request import Draw, SampleRequest
from esolm_megatron.model.cache import KVCache
from esolm_megatron.model.products import FastProducts
from esolm_megatron.model.transformer import EsoLM
from esolm_megatron.objective.noise import uniforms, words

MOST = 8
"""Tokens that "auto" proposes at most."""
OVERHEAD = 32
"""What a pass costs beside the places that it feeds, in places."""
_Made = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


@dataclass
class _Row:
    """A row at work: `known` places hold certain tokens, `cached` of them keys; `proposals` (n,) follow, drawn from q."""

    id: int
    known: int
    cached: int = 0
    proposals: list[int] = field(default_factory=list)
    q: Tensor | None = None
    width: int = 1
    """Masks of each group."""
    accepted: int = 0
    judged: int = 0
    """Proposals that were accepted, and those that were judged: what follows a refused one is not."""

    @property
    def best(self) -> int:
        """Tokens to propose at once that give most for what they cost, if each is accepted as often as those before.

        A function of the row's own past: no other row changes what it is given.
        """
        share = (self.accepted + 1) / (self.judged + 2)
        gains = [(1 - share**k) / (1 - share) / (OVERHEAD + k + k * k) for k in range(1, MOST + 1)]
        return 1 + max(range(MOST), key=gains.__getitem__)


def decode_verified(
    model: EsoLM,
    fed: Tensor,
    order: Tensor,
    log_probs: Tensor,
    request: SampleRequest,
    *,
    num_given: int,
    watch: Callable[[int, *_Made], None] | None = None,
    ended: Callable[[*_Made, NDArray[np.int64]], list[int]] | None = None,
) -> int:
    """Fill `fed` (B, L) in place, in the generation order, and `log_probs` (B, L) beside it; returns the passes.

    Each token has exactly the distribution that one token a pass would give it. `request.propose`: tokens proposed at
    once, the certain one included. watch, ended: told after each pass which rows, positions and tokens it made certain;
    `ended`, also told how many places of each row are certain (B,), names the rows that end before they are full.
    """
    length, device, draw = fed.shape[1], fed.device, request.draw
    most = MOST if isinstance(request.propose, str) else request.propose
    dtype, size = model.embedding.weight.dtype, model.linears.tensor_size
    cache = KVCache(
        model.shape, len(fed), length + most * (most + 1), dtype, device, tensor_size=size, int8=request.cache == "int8"
    )
    products = FastProducts(model)
    rows = [_Row(i, num_given) for i in range(len(fed)) if num_given < length]
    count, known = 0, np.full(len(fed), num_given)
    while rows:
        for row in rows:
            wanted = row.best if isinstance(request.propose, str) else request.propose
            row.width = wanted if request.passes == 1 or not row.proposals else 1
        logits, firsts = _feed(model, cache, products, fed, order, rows)
        exact = probabilities(logits[torch.cat(firsts).to(device)], draw)
        made, at = [], 0
        for row, first in zip(rows, firsts, strict=True):
            raw = words(2 * most + 2, request.seed, "verified", request.first_row + row.id, count)
            made.append(_advance(row, fed, log_probs, logits, exact[at : at + len(first)], first, draw, raw))
            at += len(first)
        over = {row.id for row in rows if row.known == length}
        if watch is not None or ended is not None:
            where = [np.concatenate(x) for x in zip(*made, strict=True)]
            index = tuple(torch.from_numpy(x).to(device) for x in where)
            news = where[0], order[index].cpu().numpy(), fed[index].cpu().numpy()
            if watch is not None:
                watch(count, *news)
            if ended is not None:
                known[[row.id for row in rows]] = [row.known for row in rows]
                over.update(ended(*news, known))
        for slot, row in reversed(list(enumerate(rows))):
            if row.id in over:
                if slot != len(rows) - 1:
                    cache.move(len(rows) - 1, slot, rows[-1].cached)
                    rows[slot] = rows[-1]
                rows.pop()
        count += 1
    return count


def _feed(
    model: EsoLM, cache: KVCache, products: FastProducts, fed: Tensor, order: Tensor, rows: list[_Row]
) -> tuple[Tensor, list[Tensor]]:
    """One pass: logits of all masks, and for each row the indices among them of its groups' first masks."""
    length, columns, firsts, masks = fed.shape[1], [], [], 0
    for slot, row in enumerate(rows):
        certain, end = row.known, row.known + len(row.proposals)
        fed[row.id, certain:end] = torch.tensor(row.proposals, dtype=torch.int64)
        own = np.arange(row.cached, end)
        parts = [np.stack([own, own, own * 0, own * 0, own * 0])]  # slot, place, limit, first slot seen, is a mask
        group, at = [], end
        for after in range(certain, min(end, length - 1) + 1):
            place = np.arange(after, min(after + row.width, length))
            slots = at + np.arange(len(place))
            parts.append(np.stack([slots, place, place * 0 + after, place * 0 + at, place * 0 + 1]))
            group.append(masks)
            at, masks = at + len(place), masks + len(place)
        firsts.append(torch.tensor(group))
        columns.append(np.concatenate([np.concatenate(parts, 1), np.full((1, at - row.cached), slot)]))
    slots, places, limit, first, is_mask, inside = torch.from_numpy(np.concatenate(columns, 1)).unbind()
    cache.begin_step(inside, slots, is_mask.nonzero()[:, 0], (limit, first))
    stored = torch.tensor([row.id for row in rows])[inside].to(fed.device)
    places, is_mask = places.to(fed.device), is_mask.to(fed.device).bool()
    tokens = fed[stored, places].masked_fill_(is_mask, model.shape.mask_id)
    with products:
        return model(tokens, order[stored, places], cache, last=cache.last), firsts


def _advance(
    row: _Row,
    fed: Tensor,
    log_probs: Tensor,
    logits: Tensor,
    exact: Tensor,
    firsts: Tensor,
    draw: Draw,
    raw: NDArray[np.uint64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Accept what can be accepted, draw the token after it and the next proposals; returns row and places that are new.

    exact: (G, V), predictions of the groups' first masks. raw: random words.
    """
    length, before, device = fed.shape[1], row.known, fed.device
    accepted, chances = 0, uniforms(raw)
    p = exact[0]
    for proposal in row.proposals:
        p = exact[accepted]
        assert row.q is not None
        row.judged += 1
        if not accept(p[proposal].item(), row.q[accepted, proposal].item(), float(chances[accepted])):
            p = (p - row.q[accepted]).clamp_(min=0)
            break
        accepted += 1
        row.accepted += 1
        p = exact[min(accepted, len(exact) - 1)]
    row.cached, row.known = before + accepted, before + accepted
    signed = torch.from_numpy(raw.view(np.int64)).to(device)
    if row.known < length:
        fed[row.id, row.known] = pick(p[None], signed[-1:])[0]
        row.known += 1
    new = np.arange(before, row.known)
    drawn = logits[firsts[: len(new)].to(device)]
    log_probs[row.id, before : row.known] = drawn.log_softmax(-1).gather(1, fed[row.id, before : row.known, None])[:, 0]
    row.proposals, row.q = [], None
    room = min(row.width, length - row.cached) - 1
    if room > 0:
        start = int(firsts[accepted]) + 1
        row.q = probabilities(logits[start : start + room], draw)
        row.proposals = pick(row.q, signed[-1 - room : -1]).tolist()
    return np.full(len(new), row.id), new


def accept(p: float, q: float, chance: float) -> bool:
    """Whether a proposal drawn with probability q is kept, p being the right one and `chance` uniform in [0, 1)."""
    return chance * q < p
