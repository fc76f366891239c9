"""Questions with given answers: the log-likelihood of each answer after its prompt, and whether the right one is likeliest."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from esolm_megatron.config import ConfigError, Section
from esolm_megatron.errors import of_setting
from esolm_megatron.evaluation.shares import Found
from esolm_megatron.inference.loaded_model import PretrainedEsoLM
from esolm_megatron.inference.scoring import score


class Question(Section):
    """A line of a file of questions."""

    prompt: str = ""
    """What is given."""
    choices: tuple[str, ...] = Field(min_length=1)
    """What may follow; spaces between are theirs."""
    answer: int | None = Field(None, ge=0)
    """Number of the right one, from 0."""

    @model_validator(mode="after")
    def _is_there(self) -> Question:
        if self.answer is not None and self.answer >= len(self.choices):
            raise ValueError(f"answer = {self.answer}: there are {len(self.choices)} choices, counted from 0")
        if not all(self.choices):
            raise ValueError("choices: none may be empty")
        return self


def read_questions(path: str) -> list[Question]:
    """The lines of a .jsonl.

    Raises:
        ConfigError: the file cannot be read, or a line is no question; names the line.
    """
    with of_setting("questions", path):
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    out = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                out.append(Question.model_validate(json.loads(line)))
            except (ValidationError, ValueError) as error:
                said = "; ".join(x["msg"] for x in error.errors()) if isinstance(error, ValidationError) else str(error)
                raise ConfigError(f"questions = {path!r}, line {number}: {said}") from None
    if not out:
        raise ConfigError(f"questions = {path!r}: has no line")
    return out


@dataclass(frozen=True)
class Answered:
    """accuracy: share of questions whose right answer is likeliest; normalized: by log p for each byte; None without answers."""

    num_questions: int
    accuracy: float | None
    normalized: float | None
    standard_error: float | None
    orders: str
    log_p: list[list[float]]


@dataclass(frozen=True)
class Choices:
    """Questions as a job whose parts are one question each. orders: 0 scores from left to right, K by the mean of K orders."""

    model: PretrainedEsoLM
    questions: Sequence[Question]
    orders: int
    seed: int
    batch_size: int

    @property
    def count(self) -> int:
        """Parts."""
        return len(self.questions)

    @property
    def tokens(self) -> int:
        """Tokens of all answers."""
        return sum(len(ids) for pairs in self.pairs for _, ids in pairs)

    @cached_property
    def pairs(self) -> list[list[tuple[list[int], list[int]]]]:
        """Tokens of the prompt and of each choice, by question.

        Raises:
            ConfigError: a token would hold the end of a prompt and the start of a choice; names the question.
        """
        out = []
        for number, q in enumerate(self.questions, 1):
            try:
                out.append([self.model.tokenizer.encode_pair(q.prompt, choice) for choice in q.choices])
            except ValueError as error:
                raise ConfigError(f"questions, the {number}. one: {error}") from error
        return out

    def prepare(self) -> None:
        """Encode all questions, which says at once what cannot be asked; raises as `pairs`."""
        _ = self.pairs

    def part(self, number: int) -> Found:
        """log p of each choice: exact from the left, or log of the mean probability over orders, which bounds it."""
        how = {"orders": self.orders} if self.orders else {"kind": "left_to_right"}
        kind: dict[str, Any] = {**how, "seed": self.seed, "batch_size": self.batch_size}
        return {
            "log_p": [score(self.model, ids, given, **kind).importance_weighted for given, ids in self.pairs[number]]
        }

    def result(self, parts: list[Found]) -> Answered:
        """What all parts together say."""
        log_p = [part["log_p"] for part in parts]
        known = [(q, x) for q, x in zip(self.questions, log_p, strict=True) if q.answer is not None]
        plain = [x.index(max(x)) == q.answer for q, x in known]
        each = [[y / len(c.encode()) for y, c in zip(x, q.choices, strict=True)] for q, x in known]
        long = [x.index(max(x)) == q.answer for (q, _), x in zip(known, each, strict=True)]
        accuracy, normalized = (sum(x) / len(x) if x else None for x in (plain, long))
        error = math.sqrt(accuracy * (1 - accuracy) / len(known)) if accuracy is not None else None
        orders = f"log mean p over {self.orders} orders" if self.orders else "exact, left to right"
        return Answered(len(self.questions), accuracy, normalized, error, orders, log_p)
