"""Several tokens a pass, with the distribution of one token a pass: proposals that the same network verifies.

Masks that are filled together are drawn independently, which is not the model. But a network that is causal over the
order also gives, in one pass, what it would have said one by one: a mask that sees the tokens before its place and
nothing else. So proposals are drawn in parallel from masks, and a later pass, which feeds them as tokens, accepts each
with probability min(1, p / q), p being the exact prediction and q the one that it was drawn from. The first that is
refused is drawn anew from max(0, p - q), the rest are forgotten (speculative sampling). A pass feeds, for a row,

    certain token   proposals   groups of masks: one after the certain tokens, one after each proposal
    x               d1 d2       | z z z | z z z | z z z |

The first mask of a group verifies the proposal that comes next, or is the next token's exact prediction; the others are
the next proposals, whichever group turns out to stand where the text ends. That is `passes` = 1: k + k * k fed for
each row. With `passes` = 2 groups hold one mask where there are proposals, and k where there are none, in turn: fewer
fed, more passes. The head looks at the first mask of each group, and at the others of one group only.

All of it is a function of numbers on the device: how many proposals were accepted is nothing that the host must know before
the next pass, so a GPU replays it as it replays other passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from esolm_megatron.inference.decoding.cuda_graphs import LOGITS_AT_ONCE, Size, sent
from esolm_megatron.inference.decoding.decoder import Decoder
from esolm_megatron.inference.decoding.draw import pick, probabilities
from esolm_megatron.inference.request import MOST_PROPOSED, Proposing
from esolm_megatron.objective.noise import uniforms

OVERHEAD = 32
"""What a pass costs beside the places that it feeds, in places."""


def best(accepted: Tensor, judged: Tensor) -> Tensor:
    """Tokens (R,) to propose at once that give most for what they cost, if each is accepted as often as those before.

    accepted, judged: (R,) a row's proposals so far; what follows a refused one is not judged. No other row changes what a
    row is given.
    """
    share = ((accepted + 1) / (judged + 2))[:, None].double()
    k = torch.arange(1, MOST_PROPOSED + 1, device=share.device)
    return 1 + ((1 - share**k) / (1 - share) / (OVERHEAD + k + k * k)).argmax(1)


def accept(p: Tensor, q: Tensor, chance: Tensor) -> Tensor:
    """Which proposals, drawn with probability q, are kept, p being the right one and `chance` uniform in [0, 1)."""
    return chance * q < p


@dataclass
class VerifiedPasses:
    """Rows filled by verified proposals, over the store of a `Decoder`, whose cache has `spare_slots(most)` for them.

    log_probs: (R + 1, L + 1), filled beside the tokens. kinds: (R + 1, 4), how each row is drawn. most: tokens proposed at
    once, at most. rows: ids of the rows at work; those that turn out to be done are to be removed. passes: how many there were;
    counted: of those that the host has read, how many found a row that was not done.
    """

    decoder: Decoder
    log_probs: Tensor
    kinds: Tensor
    most: int

    def __post_init__(self) -> None:
        self.rows, self.passes, self.counted = np.empty(0, np.int64), 0, 0
        self.fresh = list[int]()
        self.asked: dict[int, Proposing] = {}
        self.filtered = set[int]()
        self.begun: dict[int, int] = {}
        store = self.decoder.fed
        self.known, self.cached, self.count, self.end, self.wanted, self.accepted, self.judged, self.pass_of = (
            store.new_zeros(len(store)) for _ in range(8)
        )
        self.in_turn = torch.zeros_like(self.known, dtype=torch.bool)
        self.stored = store.new_full((len(store),), len(store) - 1)
        self.told = store.new_zeros(len(store), self.most + 2)

    @cached_property
    def random(self) -> tuple[Tensor, Tensor]:
        """Of each row and pass: (R + 1, L, most) words for draws, and as many fp64 numbers that decide what is accepted."""
        rows, places = self.decoder.fed.shape
        words = self.decoder.fed.new_zeros(rows, places - 1, self.most)
        return words, torch.zeros(words.shape, dtype=torch.float64, device=words.device)

    @cached_property
    def proposals(self) -> tuple[Tensor, Tensor]:
        """Of each row: (R + 1, most) proposed tokens, and the distributions (R + 1, most, V) that they were drawn from."""
        tokens = torch.zeros_like(self.told[:, : self.most])
        return tokens, self.log_probs.new_zeros(*tokens.shape, self.decoder.model.shape.vocab)

    def add(self, row: int, length: int, num_given: int, asked: Proposing, *, prompt: object, filtered: bool) -> None:
        """Start a row of `length` places whose first `num_given` are known. filtered: its draw has a top_k or top_p."""
        device = self.known.device
        decoder, auto = self.decoder, isinstance(asked.propose, str)
        decoder.known[row], decoder.cached[row], decoder.prompts[row] = num_given, 0, prompt
        for store, value in (
            (self.known, num_given), (self.cached, num_given), (self.end, length), (self.count, 0), (self.accepted, 0),
            (self.judged, 0), (self.pass_of, 0), (self.wanted, 0 if auto else asked.propose), (self.in_turn, asked.passes == 2),
        ):  # fmt: skip
            store[row] = value
        passes, width = asked.words.shape[0], asked.most
        words, chances = self.random
        words[row, :passes, :width] = sent(asked.words[:, :width], device)
        chances[row, :passes, :width] = torch.from_numpy(uniforms(asked.words[:, width:].view(np.uint64))).to(device)
        self.asked[row], self.begun[row] = asked, self.passes
        self.filtered = self.filtered | {row} if filtered else self.filtered - {row}
        if num_given < length:
            self.rows, self.fresh = np.append(self.rows, row), [*self.fresh, row]

    def remove(self, row: int) -> None:
        """Take a row out."""
        self.rows, self.fresh = self.rows[self.rows != row], [x for x in self.fresh if x != row]
        self._at_work()

    def _at_work(self) -> None:
        spare = np.full(len(self.stored) - len(self.rows), len(self.stored) - 1)
        self.stored.copy_(sent(np.concatenate([self.rows, spare]), self.stored.device))

    def step(self, exact: bool) -> Tensor:
        """One pass over all rows at work; (rows, 2 + most): places known before and after it, and what it has made certain.

        exact: ask the device how many proposals there are, to feed no more places than that takes.
        """
        if self.fresh:
            self.decoder.prefill(np.array(self.fresh, np.int64))
            self._at_work()
            self.fresh = []
        rows, size, horizon = self.rows, self._most_fed(), None
        if exact:
            known, count = (x[self.stored[: len(rows)]] for x in (self.known, self.count))
            width = int(self._width(self.stored[: len(rows)]).max())
            size, horizon = (int(count.max()) + 1, width), int((known + count).max()) + (int(count.max()) + 1) * width
        key = Size.around(len(rows), 1, 1, len(self.stored) - 1).rows if not exact else len(rows), *size
        filtered = not self.filtered.isdisjoint(rows.tolist())
        with self.decoder.products:
            self.decoder.recorder((key, filtered), lambda: self.run(*key, filtered, horizon))
        self.passes += 1
        return self.told[self.stored[: len(rows)]]

    def _most_fed(self) -> tuple[int, int]:
        """Groups of a row, and masks of each, whatever is accepted."""
        found = [(1, 1)]
        for row in self.rows.tolist():
            asked = self.asked[row]
            turn = (self.passes - self.begun[row]) % 2 if asked.passes == 2 else None
            found.append((1 if turn == 0 else asked.most, 1 if turn == 1 else asked.most))
        return max(x for x, _ in found), max(x for _, x in found)

    def _width(self, row: Tensor) -> Tensor:
        """Masks (R,) of each group."""
        wanted = self.wanted[row]
        wanted = torch.where(wanted == 0, best(self.accepted[row], self.judged[row]), wanted)
        return torch.where(self.in_turn[row] & (self.count[row] > 0), 1, wanted)

    def run(self, num_rows: int, groups: int, masks: int, filtered: bool, horizon: int | None = None) -> None:
        """The pass itself: so many rows, of each so many groups of masks. A row that is done feeds and fills nothing."""
        decoder, row, width = self.decoder, self.stored[:num_rows], self._width(self.stored[:num_rows])
        fed, device, length = decoder.fed, row.device, decoder.fed.shape[1] - 1
        known, cached, count, end = (x[row][:, None] for x in (self.known, self.cached, self.count, self.end))
        g, j = torch.arange(groups, device=device), torch.arange(masks, device=device)
        proposed = self.proposals[0][row, : groups - 1]
        fed[row[:, None], torch.where(g[:-1] < count, known + g[:-1], length)] = proposed
        own = cached + g  # a certain token, and the proposals
        start = known + count + masks * g
        after = known + g
        place = after[:, :, None] + j
        inside = (g <= count)[:, :, None] & (place < end[:, :, None]) & (j < width[:, None, None])
        slot = torch.cat([own, (start[:, :, None] + j).flatten(1)], 1)
        there = torch.cat([own < known + count, inside.flatten(1)], 1) & (known < end)
        place = torch.where(there, torch.cat([own, place.flatten(1)], 1), length)
        limit, first = (torch.cat([own * 0, x[:, :, None].expand(-1, -1, masks).flatten(1)], 1) for x in (after, start))
        spare = decoder.cache.num_slots - 1
        seen = torch.where(there, limit, 0), torch.where(there, first, 0)
        corner = torch.arange(0, slot.numel(), slot.shape[1], device=device)[:, None]
        looked_at = corner + torch.arange(groups, slot.shape[1], device=device)
        in_cache = row.clamp(max=len(self.stored) - 2)
        decoder.cache.begin_fixed(in_cache, torch.where(there, slot, spare), there, looked_at, seen, horizon)
        ids = fed[row[:, None], place]
        ids[:, groups:] = decoder.model.shape.mask_id
        positions = decoder.order[row[:, None], place]
        hidden = decoder.model(
            ids.view(-1), positions.view(-1), decoder.cache, last=decoder.cache.last, head=False
        ).view(num_rows, groups, masks, -1)
        each = max(1, LOGITS_AT_ONCE // decoder.model.shape.vocab // (groups + masks))
        for begin in range(0, num_rows, each):
            part = slice(begin, begin + each)
            self._advance(row[part], hidden[part], width[part], filtered)

    def _advance(self, row: Tensor, hidden: Tensor, width: Tensor, filtered: bool) -> None:
        """Accept what can be accepted, draw the token after it and the next proposals.

        row, width: (R,). hidden: (R, groups, masks, H).
        """
        (num_rows, groups, masks, _), fed, device = hidden.shape, self.decoder.fed, row.device
        length, at = fed.shape[1] - 1, torch.arange(num_rows, device=device)
        known, count, end = self.known[row], self.count[row], self.end[row]
        number = self.pass_of[row]
        words, chances = (x[row, number] for x in self.random)
        tokens, drawn_from = self.proposals
        g = torch.arange(groups, device=device)
        logits = self.decoder.model.logits(hidden[:, :, 0].flatten(0, 1))
        exact = probabilities(logits, self.kinds[row].repeat_interleave(groups, 0), filtered)
        exact = exact.view(num_rows, groups, -1)
        accepted = torch.zeros_like(count)
        if groups > 1:
            proposed = tokens[row, : groups - 1]
            q = drawn_from[row[:, None], g[:-1], proposed].double()
            p = exact[:, :-1].gather(2, proposed[:, :, None])[:, :, 0].double()
            kept = accept(p, q, chances[:, : groups - 1]) & (g[:-1] < count[:, None])
            accepted = kept.long().cumprod(1).sum(1)
        refused = accepted < count
        chosen = accepted.clamp(max=groups - 1)
        p = exact[at, chosen]
        left = (p - drawn_from[row, chosen.clamp(max=self.most - 1)]).clamp_(min=0)
        p = torch.where(refused[:, None], left, p)
        cached = known + accepted
        goes_on = cached < end
        fed[row, torch.where(goes_on, cached, length)] = pick(p, words[:, 0])
        after = cached + goes_on.long()
        new = known[:, None] + g
        places = torch.where(new < after[:, None], new, length)
        made = fed[row[:, None], places]
        log_p = logits.view(exact.shape).gather(2, made[:, :, None])[:, :, 0] - logits.logsumexp(-1).view(-1, groups)
        self.log_probs[row[:, None], places] = log_p
        if masks > 1:
            others = self.decoder.model.logits(hidden[at, chosen, 1:].flatten(0, 1))
            q = probabilities(others, self.kinds[row].repeat_interleave(masks - 1, 0), filtered)
            tokens[row, : masks - 1] = pick(q, words[:, 1:masks].reshape(-1)).view(num_rows, -1)
            drawn_from[row, : masks - 1] = q.view(num_rows, masks - 1, -1)
        self.count[row] = (torch.minimum(width, end - cached) - 1).clamp(min=0)
        self.judged[row] += torch.minimum(accepted + 1, count)
        self.accepted[row] += accepted
        self.cached[row], self.known[row] = cached, after
        self.pass_of[row] = (number + 1).clamp(max=length - 1)
        self.told[row, 0], self.told[row, 1] = known, after
        self.told[row, 2 : 2 + groups] = made


def spare_slots(most: int) -> int:
    """Slots that proposals of one row need beside its places."""
    return most * most if most > 1 else 0
