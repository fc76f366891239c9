"""What tools/benchmark_train.py compares is the same training."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
from benchmark_train import Steps


@pytest.mark.parametrize("alpha_0", [1.0, 0.5, 0.25, 0.0])
def test_the_references_way_trains_the_same_model(alpha_0):
    ours, reference = (Steps("tiny", alpha_0, 4, torch.device("cpu")) for _ in range(2))
    for step in range(3):
        ours.step = reference.step = step
        assert ours.run("ours") == pytest.approx(reference.run("reference"), rel=1e-5)
    for a, b in zip(ours.model.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


def test_a_plain_step_learns():
    steps = Steps("tiny", 1.0, 4, torch.device("cpu"))
    steps.tokens[:] = 5
    losses = [steps.run("ar") for _ in range(6)]
    assert losses[-1] < losses[0] - 0.01
