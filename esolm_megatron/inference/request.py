"""What the sampler can be asked for. No torch, so that the command line can read it at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from esolm_megatron.config import Section

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Schedule = Literal["binomial", "uniform", "first_hitting"]
"""binomial: the ancestral sampler of the paper. uniform: equally many places in each diffusion step. first_hitting: the
ancestral sampler of infinitely many steps, which fills one place a pass."""
Propose = Annotated[int, Field(ge=1)] | Literal["auto"]
MOST_PROPOSED = 8
"""Tokens that "auto" proposes at most."""
Cache = Literal["full", "int8"]
"""How keys and values are kept: in the weights' type, or in 8 bits with a scale for each vector."""
Order = Literal["random", "left_to_right", "block_distant"]
"""Places of the diffusion steps: random, from the left, or random ones of which a step takes those farthest apart."""


EXTREME = 1e10
"""Temperatures and penalties up to it, and down to one over it, leave logits numbers that fp32 holds."""
MOST = 2**63 - 1
"""Of whole numbers in a request."""


@dataclass(frozen=True)
class Draw:
    """How tokens are drawn from logits; the default is the model's own distribution.

    temperature: logits are divided by it; 0 takes the likeliest token. top_k: the k likeliest tokens, 0 for all.
    top_p: after those, the smallest set of likeliest tokens that holds this probability. Of equally likely tokens all
    or none belong to a set. repetition_penalty: logits of tokens that the row holds already are divided by it if
    positive, multiplied if negative; 1 is off.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: must lie above 0 and at most 1; 1 draws from all tokens")
        if self.temperature != 0 and not 1 / EXTREME <= self.temperature <= EXTREME:
            raise ValueError(
                f"temperature = {self.temperature}: must be 0, which takes the likeliest token, or a number of "
                f"{1 / EXTREME:g} to {EXTREME:g}"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}: must be at least 1, or 0 to draw from all tokens")
        if not 1 / EXTREME <= self.repetition_penalty <= EXTREME:
            raise ValueError(
                f"repetition_penalty = {self.repetition_penalty}: must be a number of {1 / EXTREME:g} to {EXTREME:g}; 1 is off"
            )


class SamplingParams(Section):
    """What commands and requests to the server say alike about how texts are made."""

    steps: int | None = Field(None, ge=1, le=2**53)
    """Diffusion steps; null means one for each token."""
    alpha_0: float | None = Field(None, ge=0, le=1)
    """Share of tokens made by diffusion; null means the trained value."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus that tokens are drawn from."""
    temperature: float = Field(1.0, ge=0)
    """Sharpness of the draw; below 1 is sharper, 0 takes the likeliest token."""
    top_k: int = Field(0, ge=0, le=MOST)
    """Draw from this many of the likeliest tokens; 0 means all."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Above 1, tokens that the text holds already become less likely."""
    seed: int = Field(0, ge=0, le=MOST)
    """Seed of orders and tokens."""
    schedule: Schedule = "binomial"
    """How many tokens each diffusion step makes; first_hitting: one, for as many steps as there are."""
    order: Order = "random"
    """Places of the diffusion steps."""
    propose: Propose = 1
    """Tokens proposed at once and verified, with schedule=first_hitting, which keeps the distribution; auto: as many as pay."""
    passes: int = Field(1, ge=1, le=2)
    """Verify proposals in the pass that makes the next ones (1), or in one of its own (2)."""

    def sampling(self) -> dict[str, Any]:
        """These fields alone."""
        return {name: getattr(self, name) for name in SamplingParams.model_fields}


def most_proposed(propose: Propose) -> int:
    """Tokens that are proposed at once, at most."""
    return MOST_PROPOSED if isinstance(propose, str) else propose


@dataclass(frozen=True, eq=False)
class Proposing:
    """How a row is filled by verified proposals: see `SampleRequest`. words: (passes, 2 most) int64, random."""

    propose: Propose
    passes: int
    words: NDArray[np.int64]

    @property
    def most(self) -> int:
        """Tokens that are proposed at once, at most."""
        return most_proposed(self.propose)


@dataclass(frozen=True, eq=False)
class SampleRequest:
    """Rows of one length to be sampled, checked when they are planned.

    steps: diffusion steps T; the 1 - alpha_0 of the places that they leave are filled from the left, one a pass.
    temperature, top_p, top_k, repetition_penalty: see `Draw`.
    prompt: (P,) or (B, P) ids at `prompt_positions`, (P,) or (B, P), by default the first P; it comes first in the
    order, as given. order: a kind, of which "left_to_right" fills the diffusion steps' places from the left too; or
    positions (L,) or (B, L), each once, which the steps take one after the other, the prompt's first. own_schedules: a
    schedule drawn for each row; by default the rows share one. stop_id: id of end-of-text; a row ends once every place
    before the first one drawn is filled, the places left are given the same id, and the text up to there is the one
    that a full row would have. propose: with the first-hitting schedule, tokens that are proposed at once and verified
    in the next pass (`passes` = 1), or in one of its own (2); the distribution stays that of one token a pass. "auto": as
    many as pay in each row, by the share of its proposals that were accepted so far.
    cache: int8 keeps keys and values in 8 bits, which alters what is drawn; `loss_of_cache` tells by how much.
    first_row: id of the first row, for requests that together are one.
    """

    num_samples: int
    length: int
    alpha_0: float
    steps: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    prompt: Tensor | None = None
    prompt_positions: Tensor | None = None
    schedule: Schedule = "binomial"
    order: Order | Tensor = "random"
    own_schedules: bool = False
    stop_id: int | None = None
    propose: Propose = 1
    passes: int = 1
    cache: Cache = "full"
    first_row: int = 0

    @property
    def draw(self) -> Draw:
        """How tokens are drawn.

        Raises:
            ValueError: a number out of its range.
        """
        return Draw(self.temperature, self.top_p, self.top_k, self.repetition_penalty)

    @property
    def rows(self) -> range:
        """The ids of the rows, which name their random numbers."""
        return range(self.first_row, self.first_row + self.num_samples)

    def part(self, first: int, count: int) -> SampleRequest:
        """`count` of the rows, from `first` on.

        Raises:
            ValueError: prompt, positions or order have another number of rows.
        """
        rows = {name: self._rows_of(name, first, count) for name in ("prompt", "prompt_positions", "order")}
        return replace(self, num_samples=count, first_row=self.first_row + first, **rows)

    def _rows_of(self, name: str, first: int, count: int) -> Any:
        values = getattr(self, name)
        if values is None or isinstance(values, str):
            return values
        import torch

        values = torch.as_tensor(values)
        if values.dim() != 2:
            return values
        if len(values) != self.num_samples:
            raise ValueError(
                f"{name}: {len(values)} rows for num_samples = {self.num_samples}; give one row for each, or only one"
            )
        return values[first : first + count]
