"""Changing a run on its way: what may, what is written down, and that it holds across kills at each border."""

import json
import subprocess
import sys
import time

import pytest
import yaml
from ranks import run_ranks
from truth import MODERN, make_config

from esolm_megatron.config import ConfigError, check, dump
from esolm_megatron.config.tree import with_values
from esolm_megatron.data.prepare import PrepareConfig, prepare
from esolm_megatron.errors import UserError
from esolm_megatron.train.course import change, origin, recorded, turns, with_changes
from esolm_megatron.train.lease import Lease
from esolm_megatron.train.preflight import check_run, refuse_other_run


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


PHASES = [
    {"from_step": 3, "set": {"optim.lr": 5e-4, "objective.alpha_0": 0.25, "model.dropout": 0.1}},
    {"from_step": 6, "set": {"optim.weight_decay": 0.5, "objective.alpha_0": 0.0}},
]


def phased(tokens, runs_dir, phases=PHASES, **sections):
    asked = config(tokens, runs_dir)
    return check(asked.model_dump(mode="json") | {"phases": phases} | sections)


@pytest.mark.gloo
@pytest.mark.parametrize("world", [1, 2])
def test_phases_are_what_changes_at_their_steps_would_be(tokens, tmp_path, world):
    """Once through; and stopped and changed by hand at each border."""
    assert run_ranks(trained_together, world, phased(tokens, tmp_path / "once")) == [8] * world
    by_hand = tmp_path / "hand"
    for steps, words in ((3, []), (6, [f"{k}={v}" for k, v in PHASES[0]["set"].items()]),
                         (8, [f"{k}={v}" for k, v in PHASES[1]["set"].items()])):  # fmt: skip
        now = change(with_changes(config(tokens, by_hand, steps)), words)
        assert run_ranks(trained_together, world, now) == [steps] * world
    assert losses(tmp_path / "once" / "test") == losses(by_hand / "test")
    run = tmp_path / "once" / "test"
    assert yaml.safe_load((run / "config.yaml").read_text())["phases"] == PHASES
    assert turns(run, 8) == [(x["from_step"], x["set"]) for x in PHASES]
    assert turns(by_hand / "test", 8) == turns(run, 8)
    manifests = [json.loads((run / f"checkpoints/step_{n:08d}/manifest.json").read_text()) for n in (2, 3, 4, 6, 8)]
    assert [m["config"]["objective"]["alpha_0"] for m in manifests] == [0.5, 0.5, 0.25, 0.25, 0.0]
    with pytest.raises(ConfigError, match="phases: was"):
        refuse_other_run(phased(tokens, tmp_path / "once", PHASES[:1]))


def trained_together(config):
    """One of several ranks: train, or continue; the process group stays for the test's own barrier."""
    from esolm_megatron.parallel import groups
    from esolm_megatron.train.trainer import train

    groups.stop = lambda: None
    return train(config).step


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("after", [2, 3, 4, 6, 7])
def test_a_run_killed_around_a_border_goes_on_the_same(tokens, tmp_path, after):
    """SIGKILL once the metrics say that step; then the same command again."""
    asked = phased(tokens, tmp_path)
    (tmp_path / "run.yaml").write_text(dump(asked))
    assert run_ranks(trained_together, 1, phased(tokens, tmp_path / "whole")) == [8]
    command = [sys.executable, "-m", "esolm_megatron", "train", str(tmp_path / "run.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = asked.run_dir / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and f'"step": {after},' in metrics.read_text()):
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert losses(asked.run_dir) == losses(tmp_path / "whole" / "test")


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ([{"from_step": 3, "set": {"optim.lrr": 1}}], r"phases\[0\].set: optim.lrr: there is no setting"),
        ([{"from_step": 3, "set": {"train.global_batch_size": 4}}], "not on a run's way"),
        ([{"from_step": 3, "set": {"optim.lr": -1}}], r"phases\[0\].set: optim.lr = -1"),
        ([PHASES[1], PHASES[0]], r"phases\[1\].from_step = 3: must be above 6"),
    ],
)
def test_phases_that_cannot_be_are_refused_before_the_run(tokens, tmp_path, phases, said):
    with pytest.raises(ConfigError, match=said):
        check_run(phased(tokens, tmp_path, phases), 1)
    assert not (tmp_path / "test").exists()


@pytest.mark.gloo
def test_a_run_starts_from_another_runs_checkpoint(tokens, tmp_path):
    first = config(tokens, tmp_path / "a")
    assert run_ranks(trained_together, 1, first) == [8]

    def fork(name, **fields):
        return check(config(tokens, tmp_path / name, 4).model_dump(mode="json") | fields)

    source = f"{first.run_dir}@4"
    check_run(fork("keep", start_from=source), 1)
    for name, fields in (("keep", {}), ("new", {"optimizer": "new"}), ("again", {})):
        assert run_ranks(trained_together, 1, fork(name, start_from=source, **fields)) == [4]
    found = {name: losses(tmp_path / name / "test") for name in ("a", "keep", "new", "again")}
    assert found["keep"] == found["again"]
    assert found["keep"][1] == found["new"][1], "the same weights, and the first rows again"
    assert found["keep"][1][0] < found["a"][1][0]
    assert found["keep"][2] != found["new"][2], "other moments"
    (line, *_) = [json.loads(x) for x in (tmp_path / "keep/test/metrics.jsonl").read_text().splitlines()]
    assert line["started_from"] == source
    manifest = json.loads((tmp_path / "keep/test/checkpoints/step_00000004/manifest.json").read_text())
    assert manifest["numbers"]["optimizer_steps"] == 8
    halfway = fork("halves", start_from=source)
    for steps in (2, 4):
        assert run_ranks(trained_together, 1, with_values(halfway, train={"num_steps": steps})) == [steps]
    assert losses(tmp_path / "halves" / "test") == found["keep"], "across a restart, Adam's bias correction included"
    deeper = fork("other", start_from=source, model=MODERN | {"vocab_size": 258, "num_layers": 5})
    with pytest.raises(ConfigError, match="starts from weights of another network"):
        check_run(deeper, 1)
    for text, said in ((f"{first.run_dir}@5", "no checkpoint of step 5; there are 2, 4, 6, 8"),
                       (str(tmp_path), "holds no checkpoint of a run")):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            check_run(fork("other", start_from=text), 1)
    with pytest.raises(ConfigError, match="is this run itself"):
        origin(check(first.model_dump(mode="json") | {"start_from": str(first.run_dir)}))
    longer = fork("longer", start_from=source, model=first.model.model_dump() | {"seq_length": 32})
    assert run_ranks(trained_together, 1, longer) == [4]
