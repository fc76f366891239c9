"""Coordinates of ranks, and layers of stages, against every split of a few layers."""

import itertools

import pytest

from esolm_megatron.topology import Topology, balanced_stages, layers_of_chunk


def test_every_rank_has_coordinates_of_its_own_and_tensor_ranks_are_neighbours():
    grid = [Topology(rank, 2 * 3 * 5 * 7, 2, 5, 3) for rank in range(210)]
    places = [(g.stage, g.data_rank, g.context_rank, g.tensor_rank) for g in grid]
    assert places == list(itertools.product(range(5), range(7), range(3), range(2)))
    assert {g.data_size for g in grid} == {7}
    assert grid[0].token_multiple == 6


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize(("num_layers", "stages"), [(6, (3, 3)), (7, (3, 4)), (11, (3, 5, 3)), (13, (4, 3, 3, 3))])
def test_chunks_cover_every_layer_once_and_in_order(num_layers, stages, chunks):
    pieces = [layers_of_chunk(stages, stage, chunk, chunks) for chunk in range(chunks) for stage in range(len(stages))]
    assert [layer for piece in pieces for layer in piece] == list(range(num_layers))
    assert all(pieces)
    for stage, count in enumerate(stages):
        mine = [layers_of_chunk(stages, stage, chunk, chunks) for chunk in range(chunks)]
        assert sum(map(len, mine)) == count
        assert max(map(len, mine)) - min(map(len, mine)) <= 1


@pytest.mark.parametrize(("first", "last"), [(0, 0), (0.01, 0.7), (0.01, 1.3), (0.5, 4.2), (2.5, 0)])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_no_split_has_a_faster_slowest_stage(stages, first, last):
    def slowest(split):
        return max(n + (first if i == 0 else 0) + (last if i == stages - 1 else 0) for i, n in enumerate(split))

    found = balanced_stages(11, stages, first_load=first, last_load=last)
    everything = [s for s in itertools.product(range(1, 12), repeat=stages) if sum(s) == 11]
    assert sum(found) == 11
    assert slowest(found) == pytest.approx(min(map(slowest, everything)))


def test_equal_stages_stay_equal_and_ties_go_to_later_stages():
    assert balanced_stages(8, 4, first_load=0.001, last_load=0.3) == (2, 2, 2, 2)
    assert balanced_stages(7, 2) == (3, 4)
    assert balanced_stages(9, 2, 2, last_load=2.0) == (6, 3) or balanced_stages(9, 2, 2, last_load=2.0) == (5, 4)
    assert balanced_stages(5, 2, 2, last_load=9.0) == (3, 2), "a layer for each chunk"
