"""Learning-rate schedules at their corners."""

import pytest

from esolm_megatron.config.tree import OptimConfig
from esolm_megatron.train.schedule import learning_rate


def rates(num_steps, **fields):
    optim = OptimConfig(lr=2.0, **fields)
    return [learning_rate(step, optim, num_steps) for step in range(num_steps)]


def test_warm_up_then_constant():
    assert rates(6, warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert rates(2, warmup_steps=0) == [2.0, 2.0]


def test_cosine_ends_near_the_minimum():
    found = rates(102, warmup_steps=2, schedule="cosine", min_lr_fraction=0.1)
    assert found[2] == 2.0
    assert found[52] == pytest.approx(1.1)
    assert 0.2 < found[-1] < 0.202
    assert found[2:] == sorted(found[2:], reverse=True)


def test_wsd_falls_only_at_the_end():
    found = rates(20, warmup_steps=2, schedule="wsd", decay_steps=4)
    assert found[2:17] == [2.0] * 15
    assert found[17:] == pytest.approx([1.5, 1.0, 0.5])
