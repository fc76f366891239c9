"""Learning-rate schedules at their corners."""

import pytest
from truth import make_config

from esolm_megatron.config import dump
from esolm_megatron.config.optim import OptimConfig
from esolm_megatron.train.preflight import rate_jump
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


def test_a_run_that_goes_on_longer_says_how_its_rate_jumps(tmp_path):
    def config(steps, **optim):
        return make_config(
            runs_dir=str(tmp_path), train={"num_steps": steps}, optim={"lr": 1e-3, "warmup_steps": 2, **optim}
        )

    cosine, wsd = {"schedule": "cosine"}, {"schedule": "wsd", "decay_steps": 10}
    for optim, said in ((cosine, True), (wsd, False), ({"schedule": "constant"}, False)):
        old = config(50, **optim)
        old.run_dir.mkdir(exist_ok=True)
        (old.run_dir / "config.yaml").write_text(dump(old))
        assert rate_jump(config(50, **optim), 30) is None
        assert rate_jump(config(100, **optim), 0) is None
        jump = rate_jump(config(100, **optim), 30)
        assert bool(jump) == said, optim
    old = config(50, **cosine)
    (old.run_dir / "config.yaml").write_text(dump(old))
    now, before = (f"{learning_rate(30, old.optim, steps):.4g}" for steps in (100, 50))
    said = rate_jump(config(100, **cosine), 30)
    assert said.startswith(
        "train.num_steps was 50 and is 100: by optim.schedule = cosine the learning rate of step 30 is "
    )
    assert f" is {now}, and would have been {before};" in said
