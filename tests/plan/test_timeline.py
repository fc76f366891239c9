"""A pipeline's step played through, against what is known of it by hand."""

import itertools

import pytest

from esolm_megatron.plan.timeline import order, play


def end_of(spans):
    return max(span.end for span in spans)


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (2, 5), (4, 4), (4, 16), (8, 3)])
def test_one_chunk_takes_a_pass_for_each_micro_batch_and_for_each_other_stage(stages, micro_batches):
    """(m + p - 1) (forward + backward): the bubble is (p - 1) / m."""
    spans = play([[1.0]] * stages, [[2.0]] * stages, micro_batches)
    assert end_of(spans) == pytest.approx((micro_batches + stages - 1) * 3.0)
    assert len(spans) == 2 * stages * micro_batches


@pytest.mark.parametrize(("stages", "chunks", "groups"), [(2, 2, 2), (4, 2, 2), (4, 3, 4), (8, 2, 1)])
def test_interleaving_divides_the_bubble_by_the_chunks(stages, chunks, groups):
    micro_batches = stages * groups
    spans = play([[1.0 / chunks] * chunks] * stages, [[2.0 / chunks] * chunks] * stages, micro_batches)
    assert end_of(spans) == pytest.approx(3.0 * micro_batches + 3.0 * (stages - 1) / chunks)


def test_what_a_pass_needs_is_there_and_no_stage_does_two_things():
    spans = play([[1.0, 0.5], [0.7, 0.7], [0.2, 1.1]], [[2.0, 1.0], [1.4, 1.4], [0.4, 2.2]], 6, 0.1)
    ends = {(s.backward, s.micro_batch, s.stage, s.chunk): s.end for s in spans}
    for span in spans:
        if not span.backward and span.stage:
            assert span.start >= ends[False, span.micro_batch, span.stage - 1, span.chunk] + 0.1 - 1e-12
        if span.backward:
            assert span.start >= ends[False, span.micro_batch, span.stage, span.chunk]
        if span.backward and span.stage < 2:
            assert span.start >= ends[True, span.micro_batch, span.stage + 1, span.chunk] + 0.1 - 1e-12
    for stage in range(3):
        mine = sorted((s.start, s.end) for s in spans if s.stage == stage)
        assert all(a[1] <= b[0] + 1e-12 for a, b in itertools.pairwise(mine))
        assert len(mine) == 6 * 2 * 2


def test_the_order_of_an_interleaved_stage_is_that_of_megatron_core():
    """4 micro-batches through 2 stages of 2 chunks, by its docstring of the schedule: 1 2 3 4 | chunk by chunk, two at a time."""
    forward = [(m, c) for backward, m, c in order(1, 2, 2, 4) if not backward]
    assert forward == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1)]
    assert [backward for backward, *_ in order(1, 2, 2, 4)][:4] == [False, False, False, True], (
        "2 (p - s - 1) + (v - 1) p warm up"
    )
    assert [(m, c) for backward, m, c in order(0, 2, 2, 4) if backward][:2] == [(0, 1), (1, 1)]


def test_the_order_is_what_megatron_core_runs():
    """Its own table of the interleaved schedule, where it has one."""
    schedules = pytest.importorskip("megatron.core.pipeline_parallel.schedules")
    for stages, chunks, micro_batches in ((2, 2, 4), (4, 3, 8), (4, 2, 16)):
        table = schedules.get_schedule_table(micro_batches, chunks, stages)
        for stage in range(stages):
            mine = [(m, c) for backward, m, c in order(stage, stages, chunks, micro_batches) if not backward]
            assert mine == [tuple(x) for x in table]


def test_a_message_delays_each_stage():
    spans = play([[1.0]] * 3, [[1.0]] * 3, 1, 0.25)
    assert end_of(spans) == pytest.approx(6 + 4 * 0.25)
