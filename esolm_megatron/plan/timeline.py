"""One step of a pipeline played through: what each stage does when, by the order in which megatron-core works.

1F1B: a stage makes as many forward passes as stages follow it, then one forward and one backward in turn, then the backward
passes that are left. Interleaved: the same over its chunks, groups of as many micro-batches as there are stages taking turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """A pass of a micro-batch through a chunk of a stage, in seconds from the start of the step."""

    stage: int
    chunk: int
    micro_batch: int
    backward: bool
    start: float
    end: float


def order(stage: int, stages: int, chunks: int, micro_batches: int) -> list[tuple[bool, int, int]]:
    """(backward, micro-batch, chunk) as a stage comes to them."""
    total = micro_batches * chunks
    if chunks == 1:
        warm_up = min(stages - stage - 1, total)
    else:
        warm_up = min(2 * (stages - stage - 1) + (chunks - 1) * stages, total)
    forward = [_turn(n, stages, chunks, micro_batches) for n in range(total)]
    backward = [(m, chunks - 1 - c) for m, c in forward]
    out = [(False, *x) for x in forward[:warm_up]]
    for n in range(total - warm_up):
        out += [(False, *forward[warm_up + n]), (True, *backward[n])]
    return out + [(True, *x) for x in backward[total - warm_up :]]


def _turn(number: int, stages: int, chunks: int, micro_batches: int) -> tuple[int, int]:
    """Micro-batch and chunk of a stage's pass: groups of `stages` micro-batches go through all chunks one after another."""
    group, within = divmod(number, stages * chunks)
    size = min(stages, micro_batches - group * stages)
    chunk, place = divmod(within, size) if size < stages else divmod(within, stages)
    return group * stages + place, chunk


def play(
    forward: Sequence[Sequence[float]], backward: Sequence[Sequence[float]], micro_batches: int, message: float = 0.0
) -> list[Span]:
    """The passes of one step. forward, backward: seconds of a micro-batch by stage and chunk. message: between stages.

    A message is on its way beside other work, as it is where sends overlap; a stage waits for what it needs.
    """
    stages, chunks = len(forward), len(forward[0])
    lists = [order(stage, stages, chunks, micro_batches) for stage in range(stages)]
    at, clock = [0] * stages, [0.0] * stages
    done: dict[tuple[bool, int, int, int], float] = {}
    out = []
    moved = True
    while moved:
        moved = False
        for stage in range(stages):
            while at[stage] < len(lists[stage]):
                back, m, c = lists[stage][at[stage]]
                before = _before(back, stage, c, stages, chunks)
                ready = 0.0
                if before is not None:
                    kind, other, chunk = before
                    if (kind, m, other, chunk) not in done:
                        break
                    ready = done[kind, m, other, chunk] + (message if other != stage else 0.0)
                start = max(clock[stage], ready)
                end = start + (backward if back else forward)[stage][c]
                done[back, m, stage, c], clock[stage] = end, end
                out.append(Span(stage, c, m, back, start, end))
                at[stage] += 1
                moved = True
    if any(n < len(x) for n, x in zip(at, lists, strict=True)):
        raise ValueError(
            f"a pipeline of {stages} stages and {chunks} chunks stands still with {micro_batches} micro-batches"
        )
    return out


def _before(back: bool, stage: int, chunk: int, stages: int, chunks: int) -> tuple[bool, int, int] | None:
    """The pass that this one waits for: (backward, stage, chunk)."""
    if not back:
        if stage:
            return False, stage - 1, chunk
        return (False, stages - 1, chunk - 1) if chunk else None
    if stage < stages - 1:
        return True, stage + 1, chunk
    return (True, 0, chunk + 1) if chunk < chunks - 1 else (False, stage, chunk)
