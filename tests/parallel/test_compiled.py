"""`train.compile` in whole runs: pipeline stages, recomputation and ZeRO give the losses of blocks that are not compiled."""

from functools import partial

import numpy as np
import pytest
import torch
from ranks import run_ranks
from truth import MODERN, REFERENCE, make_config, share_of_step

pytestmark = pytest.mark.gloo


def losses(config):
    """One rank: losses and gradient norms of three steps, and the graphs that exist after each."""
    from esolm_megatron.parallel.engine import Engine

    torch.compile = partial(torch.compile, backend="aot_eager")  # graphs and their derivatives, without generated code
    engine, counters = Engine(config), torch._dynamo.utils.counters
    top, found, graphs = engine.topology, [], []
    for step in range(3):
        result = engine.train_step(share_of_step(config, step, top.data_rank, top.data_size), 1e-3)
        found.append((result.loss, result.grad_norm))
        graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    return found, graphs


WHOLE, APART = (2, 4), (4, 9)
"""Graphs of a stage: before and after attention, the latter twice in the last block, embedding; or all pieces by themselves."""


@pytest.mark.parametrize(
    ("world", "parallel", "dropout", "graphs"),
    [
        (1, {}, 0.1, WHOLE),
        (2, {"pipeline_size": 2}, 0.1, WHOLE),
        (2, {"zero_stage": 2, "recompute": "full"}, 0.0, WHOLE),
        (1, {"recompute": "selective"}, 0.1, WHOLE),
        (2, {"context_size": 2}, 0.1, WHOLE),
        (2, {"tensor_size": 2}, 0.1, APART),
        (2, {"tensor_size": 2, "sequence_parallel": True, "recompute": "selective"}, 0.1, APART),
        (2, {"zero_stage": 3}, 0.0, APART),
        (2, {"zero_stage": 3, "recompute": "full"}, 0.1, APART),
    ],
    ids=str,
)
def test_compiled_runs_have_the_same_losses(world, parallel, dropout, graphs):
    model = (REFERENCE if parallel.get("zero_stage") != 3 else MODERN) | {"seq_length": 40, "dropout": dropout}
    compiled = run_ranks(losses, world, make_config(model, parallel=parallel, train={"compile": True}))
    plain = run_ranks(losses, world, make_config(model, parallel=parallel))
    for (ours, found), (theirs, none) in zip(compiled, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        assert none == [0, 0, 0]
        assert graphs[0] <= found[0] <= graphs[1], found
        assert found[1:] == [found[0]] * 2, "nothing is compiled again"
