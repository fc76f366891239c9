"""Changing a run on its way: what may, what is written down, and that it holds across kills at each border."""

import json

import pytest
import yaml
from ranks import run_ranks
from truth import MODERN, make_config

from esolm_megatron.config import ConfigError, dump
from esolm_megatron.data.prepare import PrepareConfig, prepare
from esolm_megatron.errors import UserError
from esolm_megatron.train.course import change, recorded, with_changes
from esolm_megatron.train.lease import Lease
from esolm_megatron.train.preflight import refuse_other_run


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    top = tmp_path_factory.mktemp("course")
    (top / "a.txt").write_text("".join(f"line {n} of a text\n" for n in range(400)))
    fields = {
        "inputs": (str(top / "a.txt"),),
        "output": str(top / "tokens"),
        "validation_fraction": 0,
        "num_processes": 1,
    }
    prepare(PrepareConfig(**fields), progress=False)
    return str(top / "tokens")


def config(tokens, runs_dir, num_steps=8, **optim):
    return make_config(
        MODERN | {"vocab_size": 258}, runs_dir=str(runs_dir), data={"path": tokens}, evaluate={"every_steps": 0},
        train={"num_steps": num_steps, "log_every_steps": 1}, optim=optim, checkpoint={"every_steps": 2, "keep_last": 9},
    )  # fmt: skip


def trained(config, store):
    """One rank: train, or continue."""
    import torch.distributed as dist

    from esolm_megatron.train.trainer import train

    step = train(config).step
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)  # which ended with it
    return step


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {x["step"]: (x["loss"], x["lr"]) for x in lines if "loss" in x}


@pytest.mark.gloo
def test_a_changed_rate_holds_from_the_newest_checkpoint_on_and_across_restarts(tokens, tmp_path):
    runs = {}
    for name, borders in (("once", (4, 8)), ("often", (4, 5, 6, 8))):
        runs[name] = tmp_path / name
        for number, steps in enumerate(borders):
            asked = config(tokens, runs[name], steps)
            words = ["optim.lr=5e-4", "objective.alpha_0=0.25"] if number == 1 else []
            now = change(with_changes(asked), words)
            assert run_ranks(trained, 1, now, tmp_path / f"{name}{number}") == [steps]
    once, often = (losses(runs[name] / "test") for name in runs)
    assert once == often
    assert [once[n][1] for n in range(1, 9)] == pytest.approx([3e-3] * 4 + [5e-4] * 4)
    plain = tmp_path / "plain"
    assert run_ranks(trained, 1, config(tokens, plain), tmp_path / "p") == [8]
    assert losses(plain / "test")[4] == once[4]
    assert losses(plain / "test")[6] != once[6]
    run = runs["often"] / "test"
    (line,) = recorded(run)
    assert line["step"] == 4
    assert line["set"] == {"optim.lr": [3e-3, 5e-4], "objective.alpha_0": [0.5, 0.25]}
    assert yaml.safe_load((run / "config.yaml").read_text())["optim"]["lr"] == 5e-4
    assert (run / "loss.png").stat().st_size > 1000
    with pytest.raises(ConfigError, match="optim.lr: was 0.0005, now 0.007"):
        refuse_other_run(with_changes(config(tokens, runs["often"], lr=7e-3)))


def test_what_cannot_change_on_the_way_is_refused_before_anything_is_written(tokens, tmp_path):
    asked = config(tokens, tmp_path)
    with pytest.raises(ConfigError, match="--change optim.lr=1: .*test holds no run yet"):
        change(asked, ["optim.lr=1"])
    asked.run_dir.mkdir()
    (asked.run_dir / "config.yaml").write_text(dump(asked))
    for word, said in (
        (
            "train.global_batch_size=4",
            "not on a run's way: rows, their order or the network would be others; what may change: optim",
        ),
        ("model.num_layers=3", "not on a run's way"),
        ("data.path=x", "not on a run's way"),
        ("optim.lrr=1", "there is no setting optim.lrr"),
        ("lr=1", "is written section.field=value"),
        ("optim.lr", "is written section.field=value"),
        ("optim.lr=-1", "optim.lr = -1: "),
    ):
        with pytest.raises(ConfigError, match=said):
            change(asked, [word])
    with Lease(asked.run_dir), pytest.raises(UserError, match="writes this run"):
        change(asked, ["optim.lr=1e-4"])
    assert [p.name for p in asked.run_dir.iterdir()] == ["config.yaml"]
    assert change(asked, ["optim.lr=3e-3"]) == asked, "nothing changes"
    assert recorded(asked.run_dir) == []
