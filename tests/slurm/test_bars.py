"""Runs that must survive, on SLURM's real daemons: two nodes, the real trainer over gloo."""

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]


def test_two_nodes_with_two_tasks_finish(login):
    """With the production parameters: GPUs through gres, a health check with collectives, ranks bound and mapped."""
    (job,), run = login.launch({"tasks_per_node": None, "gpus_per_node": 2, "health": "all", "exclusive": True})
    login.await_end(run)
    assert list(login.losses(run)) == list(range(1, 41))
    print(login.slurm.job(job))
