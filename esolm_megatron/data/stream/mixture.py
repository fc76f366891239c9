"""Which source each sample of a run comes from: exact quotas, known for any sample at once.

Between two changes of the weights, sources take turns in a pattern that repeats. Normalised weights q_i / P are exact
fractions; of any n samples since the change, source i has had n q_i / P of them, give or take less than one. The pattern
of P samples is made by Tijdeman's rule (R. Tijdeman, The chairman assignment problem, 1980): copy c of source i may
come once n q_i / P - c is 1 / (2k - 2), and of k sources that may, the one with the earliest deadline comes.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache

import numpy as np

from esolm_megatron.config import ConfigError, DataConfig
from esolm_megatron.config.sections import SourceConfig

LONGEST_PATTERN = 100_000
ONLY_SOURCE = "data"
"""The name of the source that `data.path` gives."""


@dataclass(frozen=True)
class Phase:
    """Weights, normalised and exact, that hold from batch `start` (counted from 0) on, in the order of the sources."""

    start: int
    weights: tuple[Fraction, ...]


def sources_of(config: DataConfig) -> dict[str, SourceConfig]:
    """The sources in the order of their names; a lone `data.path` is one of weight 1."""
    return dict(sorted(config.sources.items())) or {ONLY_SOURCE: SourceConfig(path=config.path or "", weight=1.0)}


def setting_of(config: DataConfig, source: str) -> str:
    """The setting that holds the path of a source."""
    return f"data.sources.{source}.path" if config.sources else "data.path"


def phases_of(config: DataConfig) -> tuple[Phase, ...]:
    """The weights of each stretch of the run; those that a change does not name stay as they were."""
    weights = {name: _exact(source.weight) for name, source in sources_of(config).items()}
    phases = [Phase(0, _normalised(weights))]
    for change in sorted(config.weight_changes, key=lambda c: c.step):
        weights |= {name: _exact(weight) for name, weight in change.weights.items()}
        phases.append(Phase(change.step, _normalised(weights)))
    return tuple(phase for n, phase in enumerate(phases) if n + 1 == len(phases) or phases[n + 1].start > phase.start)


def first_difference(
    old: Sequence[Phase], old_names: Sequence[str], new: Sequence[Phase], new_names: Sequence[str]
) -> int | None:
    """The first batch that two courses of weights deal differently; None if there is none."""
    if len(old_names) == len(new_names) == 1:
        return None
    for start in sorted({phase.start for phase in (*old, *new)}):
        a, b = (
            {name: weight for name, weight in zip(names, at(phases, start).weights, strict=True) if weight}
            for phases, names in ((old, old_names), (new, new_names))
        )
        if a != b:
            return start
    return None


def at(phases: Sequence[Phase], batch: int) -> Phase:
    """The phase that a batch belongs to."""
    return phases[bisect_right([phase.start for phase in phases], batch) - 1]


def _exact(weight: float) -> Fraction:
    return Fraction(repr(weight))  # 0.1 is a tenth, as it was written


def _normalised(weights: Mapping[str, Fraction]) -> tuple[Fraction, ...]:
    total = sum(weights.values())
    return tuple(weight / total for weight in weights.values())


class Pattern:
    """The samples of one phase: the source of each, and how many of its own came before.

    Raises:
        ConfigError: the weights have no common denominator up to LONGEST_PATTERN.
    """

    def __init__(self, weights: tuple[Fraction, ...]):
        self.period = math.lcm(*(weight.denominator for weight in weights))
        if self.period > LONGEST_PATTERN:
            shown = ", ".join(f"{float(weight):.6g}" for weight in weights)
            raise ConfigError(
                f"data.sources: weights {shown} are no multiples of 1 / {LONGEST_PATTERN} of their sum, or of a larger share; "
                "round them, so that they add up to 1 with at most 5 digits"
            )
        self.quotas = [int(weight * self.period) for weight in weights]
        self.source = np.array(_deal(self.quotas, self.period), np.int64)
        self._places = [np.flatnonzero(self.source == i) for i in range(len(weights))]
        self._before = np.empty(self.period, np.int64)
        for places in self._places:
            self._before[places] = np.arange(len(places))

    def counts(self, num_samples: int) -> list[int]:
        """Samples of each source among the first `num_samples` of the phase."""
        whole, rest = divmod(num_samples, self.period)
        return [
            whole * quota + int(np.searchsorted(places, rest))
            for quota, places in zip(self.quotas, self._places, strict=True)
        ]

    def deal(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For samples of the phase, numbered from 0: the source, and the number among that source's samples."""
        whole, place = np.divmod(samples, self.period)
        source = self.source[place]
        return source, whole * np.asarray(self.quotas)[source] + self._before[place]


pattern = lru_cache(maxsize=64)(Pattern)


def _deal(quotas: Sequence[int], period: int) -> list[int]:
    """The source of each place of one period, by earliest deadline."""
    active = [i for i, quota in enumerate(quotas) if quota]
    slack = max(2 * len(active) - 2, 1)
    common = math.lcm(*(quotas[i] for i in active))
    waiting: list[list[int]] = [[] for _ in range(period + 2)]  # by the first place at which the next copy may come
    given = dict.fromkeys(active, 0)

    def release(i: int, earliest: int) -> None:
        first = -(-(slack * given[i] + 1) * period // (slack * quotas[i]))
        if given[i] < quotas[i]:
            waiting[min(max(first, earliest), period + 1)].append(i)

    for i in active:
        release(i, 1)
    ready: list[tuple[int, int]] = []
    out = []
    for place in range(1, period + 1):
        for i in waiting[place]:
            heapq.heappush(ready, ((slack * (given[i] + 1) - 1) * (common // quotas[i]), i))
        _, chosen = heapq.heappop(ready)
        out.append(chosen)
        given[chosen] += 1
        release(chosen, place + 1)
    return out


class Mixture:
    """Which source's which sample each sample of a run is. Batches have `batch_size` samples."""

    def __init__(self, config: DataConfig, batch_size: int):
        self.names = tuple(sources_of(config))
        self.phases, self.batch_size = phases_of(config), batch_size

    @cached_property
    def _before(self) -> list[list[int]]:
        """Samples of each source before each phase."""
        out = [[0] * len(self.names)]
        for phase, following in zip(self.phases, self.phases[1:], strict=False):
            new = pattern(phase.weights).counts((following.start - phase.start) * self.batch_size)
            out.append([a + b for a, b in zip(out[-1], new, strict=True)])
        return out

    def counts(self, num_batches: int) -> dict[str, int]:
        """Samples of each source in the first `num_batches` batches."""
        phase = at(self.phases, max(num_batches - 1, 0))
        new = pattern(phase.weights).counts((num_batches - phase.start) * self.batch_size)
        base = self._before[self.phases.index(phase)]
        return {name: a + b for name, a, b in zip(self.names, base, new, strict=True)}

    def deal(self, batch: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For samples `places` of a batch, from 0: the source of each, and its number among that source's samples."""
        phase = at(self.phases, batch)
        source, number = pattern(phase.weights).deal((batch - phase.start) * self.batch_size + places)
        return source, number + np.asarray(self._before[self.phases.index(phase)])[source]
