"""Texts that a model writes, judged: perplexity under another model, how varied they are, and what they cost in time.

Low perplexity is easily had by dull texts, so it is never told without the entropy of the texts' tokens.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from esolm_megatron.errors import optional
from esolm_megatron.evaluation.judges import Judge
from esolm_megatron.evaluation.shares import Found
from esolm_megatron.inference.loaded_model import PretrainedEsoLM

_REPEATED = 4
"""Tokens of a phrase that counts as said again."""


@dataclass(frozen=True)
class Written:
    """What `num_samples` texts in `steps` diffusion steps came to.

    nats_per_token, standard_error: under the judge, over its tokens, error over texts; None without one. entropy: of a text's
    token frequencies, in nats, mean over texts. distinct: n -> different n-grams of all texts as a share of all. repetition:
    share of phrases of 4 tokens that its text has said before. seconds: of drawing alone; tokens_per_second: so.
    mauve: 0 to 1, against the reference texts; None without them.
    """

    steps: int
    num_samples: int
    passes: int
    nats_per_token: float | None
    standard_error: float | None
    entropy: float
    distinct: dict[int, float]
    repetition: float
    seconds: float
    tokens_per_second: float
    mauve: float | None


@dataclass(frozen=True)
class Generation:
    """Texts of each number of steps as a job whose parts are `batch_size` texts each.

    fields: of a `SampleRequest`. reference: texts of people, for MAUVE, which needs a judge of `transformers`.
    """

    model: PretrainedEsoLM
    judge: Judge | None
    num_samples: int
    length: int
    steps: Sequence[int]
    batch_size: int
    fields: Mapping[str, Any]
    reference: Sequence[str] = ()

    @property
    def batches(self) -> int:
        """Parts for each number of steps."""
        return -(-self.num_samples // self.batch_size)

    @property
    def count(self) -> int:
        """Parts; one more for the reference texts."""
        return len(self.steps) * self.batches + bool(self.reference)

    @property
    def tokens(self) -> int:
        """Tokens that are written."""
        return len(self.steps) * self.num_samples * self.length

    def prepare(self) -> None:
        """Write a text that nobody times, for which kernels and libraries get ready."""
        self.model.sample(1, self.length, min(self.steps), **self.fields)

    def part(self, number: int) -> Found:
        """Texts and what the judge says of them."""
        if number == len(self.steps) * self.batches:
            assert self.judge is not None
            return {"features": self._judged(list(self.reference))["features"]}
        steps, first = self.steps[number // self.batches], number % self.batches * self.batch_size
        count = min(self.batch_size, self.num_samples - first)
        begun = time.perf_counter()
        samples = self.model.sample(count, self.length, steps, first_row=first, **self.fields)
        tokens = samples[0].tolist()  # which waits for the last of them
        seconds = time.perf_counter() - begun
        texts = [self.model.tokenizer.decode(row) for row in tokens]
        return {
            "tokens": tokens,
            "texts": texts,
            "seconds": seconds,
            "passes": samples.num_forward_passes,
            **self._judged(texts),
        }

    def _judged(self, texts: list[str]) -> Found:
        if self.judge is None:
            return {}
        said = self.judge(texts)
        features = None if not self.reference or said.features is None else said.features.tolist()
        return {"nats": said.nats.tolist(), "judged": said.tokens.tolist(), "features": features}

    def result(self, parts: list[Found]) -> list[Written]:
        """What is said of each number of steps."""
        each = [parts[n * self.batches : (n + 1) * self.batches] for n in range(len(self.steps))]
        theirs = parts[-1]["features"] if self.reference else None
        return [self._written(steps, some, theirs) for steps, some in zip(self.steps, each, strict=True)]

    def _written(self, steps: int, parts: list[Found], theirs: list[list[float]] | None) -> Written:
        tokens = [row for part in parts for row in part["tokens"]]
        seconds = sum(part["seconds"] for part in parts)
        mean = error = mauve = None
        if self.judge is not None:
            nats, counts = (np.array([x for part in parts for x in part[name]], float) for name in ("nats", "judged"))
            mean = float(nats.sum() / max(counts.sum(), 1))
            error = float(np.sqrt(((nats - mean * counts) ** 2).sum()) / max(counts.sum(), 1))
        if theirs is not None:
            mauve = mauve_of([x for part in parts for x in part["features"]], theirs)
        return Written(
            steps=steps,
            num_samples=len(tokens),
            passes=max(part["passes"] for part in parts),
            nats_per_token=mean,
            standard_error=error,
            entropy=float(np.mean([entropy(row) for row in tokens])),
            distinct={n: distinct(tokens, n) for n in (1, 2, 3)},
            repetition=float(np.mean([1 - distinct([row], _REPEATED) for row in tokens])),
            seconds=seconds,
            tokens_per_second=sum(map(len, tokens)) / seconds,
            mauve=mauve,
        )


def entropy(tokens: Sequence[int]) -> float:
    """Of the frequencies of a text's tokens, in nats."""
    p = np.array(list(Counter(tokens).values()), float) / max(len(tokens), 1)
    return float(-(p * np.log(p)).sum())


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams of all texts as a share of all their n-grams; 1 where there is none."""
    grams = [tuple(row[i : i + n]) for row in texts for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def mauve_of(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """MAUVE of two sets of features (texts, H): 1 for one distribution, near 0 for two (arXiv 2102.01454).

    Raises:
        ConfigError: the package mauve-text is not installed.
    """
    mauve = optional("mauve", "reference")
    p, q = (np.asarray(x, np.float32) for x in (theirs, ours))
    return float(mauve.compute_mauve(p_features=p, q_features=q, verbose=False, seed=0).mauve)
