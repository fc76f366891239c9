"""Given text in rows of tokens: each document by itself, in windows that slide, or all in one stream as the reference has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esolm_megatron.config import ConfigError
from esolm_megatron.evaluation.bounds import Estimate

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class TextRows:
    """tokens, valid, scored: (rows, L) as in `Rows`. The rest counts all of the documents that were read, and says how they lie."""

    tokens: NDArray[np.int64]
    valid: NDArray[np.bool_]
    scored: NDArray[np.bool_]
    num_tokens: int
    num_words: int
    num_bytes: int
    how: str

    @classmethod
    def of(
        cls,
        texts: Iterable[str],
        encode: Encode,
        length: int,
        most: int,
        *,
        stride: int | None = None,
        ends: int | None = None,
    ) -> TextRows:
        """Rows of `length`; no document is read after the one that fills `most` of them.

        By default each document is by itself, without an end-of-text token: a row sees nothing of the rows before it. stride:
        a row after a document's first counts so many new tokens, and is given those before them. ends: id of end-of-text;
        documents follow each other, one such after each, and a row is length - 2 tokens of that stream between two more, as
        the reference evaluates (its last, shorter row is left out).

        Raises:
            ConfigError: there is no text, too little of it, or a stride that a row cannot hold.
        """
        if stride is not None and not 1 <= stride <= length:
            raise ConfigError(f"stride = {stride}: must be 1 to {length}, the tokens of a row")
        if ends is not None and length < 3:
            raise ConfigError(f"seq_length = {length}: a row of the stream needs at least 3 tokens")
        rows: list[tuple[list[int], int]] = []  # ids, and how many of them count
        stream: list[int] = []
        num_tokens = num_words = num_bytes = 0
        for text in texts:
            ids = encode(text)
            num_tokens += len(ids) + (ends is not None)
            num_words += len(text.split())
            num_bytes += len(text.encode())
            if ends is not None:
                stream += [*ids, ends]
                while len(stream) >= length - 2:
                    rows.append(([ends, *stream[: length - 2], ends], length))
                    stream = stream[length - 2 :]
            before = 0
            while ends is None and before < len(ids):
                stop = min(len(ids), length if before == 0 else before + (stride or length))
                rows.append((ids[before if stride is None else max(0, stop - length) : stop], stop - before))
                before = stop
            if len(rows) >= most:
                break
        if not rows:
            why = (
                "every document is empty"
                if ends is None or not num_tokens
                else f"its {num_tokens} tokens fill no row of {length}"
            )
            raise ConfigError(f"text: there is none to evaluate on; {why}")
        tokens = np.zeros((len(rows), length), np.int64)
        valid, scored = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
        for i, (row, new) in enumerate(rows):
            tokens[i, : len(row)], valid[i, : len(row)], scored[i, len(row) - new : len(row)] = row, True, True
        how = f"documents by themselves, in rows of {length}"
        if stride is not None:
            how = f"documents by themselves, in windows of {length} that move on by {stride}"
        if ends is not None:
            how = f"documents in one stream, an end-of-text after each, in rows of {length} between two more"
        return cls(tokens, valid, scored, num_tokens, num_words, num_bytes, how)

    def per_unit(self, estimate: Estimate) -> dict[str, float]:
        """Perplexity of a word (what white space separates) and bits of a UTF-8 byte, by what the whole text has of each."""
        nats = estimate.nats_per_token * self.num_tokens
        try:
            words = math.exp(nats / self.num_words)
        except (OverflowError, ZeroDivisionError):
            words = math.inf
        return {"word_perplexity": words, "bits_per_byte": nats / self.num_bytes / math.log(2)}
