"""`train.compile` in whole runs: pipeline stages, recomputation and ZeRO give the losses of blocks that are not compiled."""

from functools import partial

import numpy as np
import pytest
import torch
from ranks import run_ranks
from truth import REFERENCE, make_config, share_of_step

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


@pytest.mark.parametrize(
    ("world", "parallel"),
    [(1, {}), (2, {"pipeline_size": 2}), (2, {"zero_stage": 2, "recompute": "full"}), (2, {"context_size": 2})],
    ids=["1", "pp2", "zero2_recompute", "cp2"],
)
def test_compiled_runs_have_the_same_losses(world, parallel):
    model = REFERENCE | {"seq_length": 40}
    compiled = run_ranks(losses, world, make_config(model, parallel=parallel, train={"compile": True}))
    plain = run_ranks(losses, world, make_config(model, parallel=parallel))
    for (ours, graphs), (theirs, none) in zip(compiled, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        assert none == [0, 0, 0]
        assert 2 <= graphs[0] <= 3, "before and after attention; after it once more, in the last block"
        assert graphs[1:] == [graphs[0]] * 2, "nothing is compiled again"
