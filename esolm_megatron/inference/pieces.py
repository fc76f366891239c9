"""A text as it comes: places are filled in any order, and pieces of text are given once their characters are whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from esolm_megatron.data.tokenizer import Tokenizer

_BROKEN = "\ufffd"


@dataclass(frozen=True)
class Piece:
    """The text of the places from `start` up to `end`."""

    start: int
    end: int
    text: str


class Pieces:
    """Pieces of one text of `length` tokens. Put in the order of their places, all together are the text.

    A character may be several tokens (bytes), which often come in different passes: its piece waits for the last of them. A
    token whose bytes are no whole character begins a piece only where one has ended, or the text begins: before, it
    might be the rest of a character whose start is not known yet.
    """

    def __init__(self, tokenizer: Tokenizer, length: int):
        self._tokenizer, self._length = tokenizer, length
        self._tokens: list[int | None] = [None] * length
        self._ends: dict[int, int] = {}
        """Start of each piece that was given -> its end."""
        self._borders = {0}

    def add(self, positions: Sequence[int], tokens: Sequence[int]) -> list[Piece]:
        """The pieces that become whole with these tokens, from the left."""
        for position, token in zip(positions, tokens, strict=True):
            self._tokens[position] = token
        out: dict[int, Piece] = {}
        for position in positions:
            start = position
            while start > 0 and start not in self._borders and self._tokens[start - 1] is not None:
                start -= 1
            for piece in self._from(start):
                out[piece.start] = piece
        return [out[start] for start in sorted(out)]

    def _from(self, start: int) -> Iterator[Piece]:
        """New pieces of the run of known tokens that holds `start`."""
        while start < self._length and self._tokens[start] is not None:
            if start in self._ends:
                start = self._ends[start]
                continue
            end = self._end_of_piece(start)
            if end is None:
                if start in self._borders:
                    return
                start += 1  # the rest of a character, whose start is not known
                continue
            yield Piece(start, end, self._text(start, end))
            self._ends[start] = end
            self._borders |= {start, end}
            start = end

    def _end_of_piece(self, start: int) -> int | None:
        """Where the piece that begins at `start` ends; None if that is not known, or it does not begin there."""
        if _BROKEN not in self._text(start, start + 1):
            return start + 1
        if start not in self._borders:
            return None
        for end in range(start + 1, self._length + 1):
            if _BROKEN not in self._text(start, end):
                return end
            if end == self._length or end in self._ends:  # bytes that are no character, and never will be
                return end
            following = self._tokens[end]
            if following is None:
                return None
            if _BROKEN not in self._text(end, end + 1):
                return end
        return None

    def _text(self, start: int, end: int) -> str:
        ids = [token for token in self._tokens[start:end] if token is not None]
        return self._tokenizer.decode(ids) if start == 0 else self._tokenizer.decode_later(ids)


class Transcript:
    """One text for a client, who reads from the left: pieces, what each adds to what can be read, and the whole."""

    def __init__(self, tokenizer: Tokenizer, plan: Any, asked: Any):
        """plan: the row's. asked: prompt, infill, echo, stop_texts of the request."""
        self._tokenizer, self._stop_id, self._stop_texts = tokenizer, plan.stop_id, asked.stop_texts
        places, given = plan.order[: len(plan.given)].tolist(), plan.given.tolist()
        self._given, self._hidden = set(places), 0 if asked.echo or asked.infill is not None else len(given)
        self._pieces, self._by_start = Pieces(tokenizer, len(plan.order)), dict[int, Piece]()
        self._first = self._pieces.add(places, given)
        self._at, self._read, self._said, self._over, self._ends = 0, "", 0, False, set[int]()

    def add(self, positions: list[int], tokens: list[int]) -> dict[str, Any]:
        """text: what goes on from the left. pieces: all that have become whole, the given ones with the first."""
        found = [*self._first, *self._pieces.add(positions, tokens)]
        self._first, self._by_start = [], self._by_start | {piece.start: piece for piece in found}
        self._ends |= {p for p, token in zip(positions, tokens, strict=True) if token == self._stop_id}
        while (piece := self._by_start.get(self._at)) is not None and not self._over:
            self._over = piece.start in self._ends
            if not self._over and piece.start >= self._hidden:
                self._read += piece.text
            self._at = piece.end
        held = max(map(len, self._stop_texts), default=1) - 1  # what may be the start of a string that ends the text
        upto = max(min(len(self._read) - held, self._cut(self._read)), self._said)
        text, self._said = self._read[self._said : upto], upto
        return {"text": text, "pieces": [vars(piece) for piece in found]}

    def finished(self, tokens: list[int]) -> dict[str, Any]:
        """The whole text of a finished row, and why it ended."""
        ends = [i for i, token in enumerate(tokens) if token == self._stop_id and i not in self._given]
        upto = ends[0] if ends else len(tokens)
        pieces = Pieces(self._tokenizer, upto).add(range(upto), tokens[:upto])
        text = "".join(piece.text for piece in pieces if piece.start >= self._hidden)
        cut = self._cut(text)
        return {"text": text[:cut], "finish_reason": "stop" if ends or cut < len(text) else "length"}

    def rest(self, text: str) -> str:
        """What of the whole text `add` has not said yet."""
        return text[self._said :]

    def texts(self, tokens: list[int]) -> list[str]:
        """Each token by itself."""
        return [self._tokenizer.decode([token]) for token in tokens]

    def _cut(self, text: str) -> int:
        found = [at for stop in self._stop_texts if (at := text.find(stop)) >= 0]
        return min(found, default=len(text))
