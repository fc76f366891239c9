"""Runs that stop moving, lose a rank, or go on with bad numbers: real processes, as a user starts them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from train.test_trainer import await_end_of_ranks, finish, ranks_of, start, state, tokens, tree

from esolm_megatron.checkpoint import complete_steps
from esolm_megatron.config.sections import WatchdogConfig
from esolm_megatron.launch.local import verdict
from esolm_megatron.train.ending import Ending, read
from esolm_megatron.train.metrics import Stragglers, WallClock
from esolm_megatron.train.watchdog import Watchdog, stacks_file

__all__ = ["tokens"]  # a fixture

LONG = {
    "checkpoint": {"every_steps": 0},
    "evaluate": {"every_steps": 0},
    "train": {"num_steps": 100000},
    "watchdog": {"min_limit_s": 4, "step_factor": 1.5},
}


def await_steps(process, folder, count):
    metrics = folder / "run" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    by_rank = {}
    for pid in ranks_of(folder):
        with open(f"/proc/{pid}/environ") as file:
            by_rank[int(dict(x.split("=", 1) for x in file.read().split("\0") if "=" in x)["RANK"])] = pid
    return by_rank


@pytest.mark.gloo
def test_frozen_rank_ends_the_run_with_stacks_of_all_others(tokens, tmp_path):
    process = start(tree(tokens, tmp_path, **LONG), tmp_path, processes=2)
    ranks = await_steps(process, tmp_path, 6)
    os.kill(ranks[0], signal.SIGSTOP)
    began = time.time()
    code, text = finish(process)
    assert code == Ending.HUNG, text
    assert time.time() - began < 40
    stacks = stacks_file(tmp_path / "run", 1).read_text()
    assert "rank 1: step after step" in stacks
    assert "esolm_megatron/train/trainer.py" in stacks, "where it waits depends on the moment"
    assert "most recent call first" in stacks
    marker = read(tmp_path / "run")
    assert (marker["how"], marker["restart"]) == ("hung", True)
    await_end_of_ranks(tmp_path)


@pytest.mark.gloo
def test_dead_rank_ends_the_others(tokens, tmp_path):
    process = start(tree(tokens, tmp_path, **LONG), tmp_path, processes=2)
    ranks = await_steps(process, tmp_path, 3)
    os.kill(ranks[1], signal.SIGKILL)
    began = time.time()
    code, text = finish(process)
    assert code == 137, text
    assert time.time() - began < 60
    await_end_of_ranks(tmp_path)
    said = read(tmp_path / "run")
    assert (said["how"], said["restart"], said["detail"]) == ("killed", True, "rank 1: Killed")
    assert said["step"] >= 3


LOCKED = """
import ctypes
import os
import sys
from esolm_megatron import cli
from esolm_megatron.parallel.engine import Engine

honest, calls = Engine.forward_backward, []

def a_place_to_be_stuck():
    ctypes.PyDLL(None).sleep(1000)  # keeps Python's lock

def forward_backward(self, noised):
    calls.append(1)
    if len(calls) == 7 and os.environ["RANK"] in sys.argv[1]:
        a_place_to_be_stuck()
    return honest(self, noised)

Engine.forward_backward = forward_backward
sys.exit(cli.main(["train", *sys.argv[2:]]))
"""
AS_A_USER = """
import subprocess, sys
from esolm_megatron import cli

program, who, *words = sys.argv[1:]
honest = subprocess.Popen
subprocess.Popen = lambda command, **options: honest([sys.executable, program, who, *command[4:]], **options)
sys.exit(cli.main(words))
"""
"""The command that a user types, with a program in the place of its ranks."""


@pytest.mark.gloo
@pytest.mark.parametrize("who", ["1", "01"], ids=["one", "all"])
def test_a_call_that_keeps_pythons_lock_ends_as_a_hang_with_its_stack(tokens, tmp_path, who):
    """One rank: the others notice. All ranks: no thread of Python runs anywhere, and only the parent can say how it ended."""
    config = tree(tokens, tmp_path, **LONG)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "program.py").write_text(LOCKED)
    began = time.time()
    words = [str(tmp_path / "program.py"), who, "train", str(tmp_path / "run.yaml"), "--processes=2"]
    done = subprocess.run(
        [sys.executable, "-c", AS_A_USER, *words], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == Ending.HUNG, done.stdout + done.stderr
    assert time.time() - began < 100
    for rank in who:
        stacks = stacks_file(tmp_path / "run", int(rank)).read_text()
        assert "a_place_to_be_stuck" in stacks
        assert "most recent call first" in stacks
    marker = read(tmp_path / "run")
    assert (marker["how"], marker["exit_code"], marker["restart"]) == ("hung", 80, True)
    assert ("Python's lock" in marker["detail"]) == (who == "01")
    await_end_of_ranks(tmp_path)


@pytest.mark.gloo
def test_a_run_that_ends_well_leaves_no_stacks(tokens, tmp_path):
    code, text = finish(start(tree(tokens, tmp_path, train={"num_steps": 2}), tmp_path, processes=2))
    assert code == 0, text
    assert list((tmp_path / "run" / "logs").iterdir()) == []


STUCK = """
import sys, time
from pathlib import Path
from esolm_megatron.config.sections import WatchdogConfig
from esolm_megatron.train.watchdog import Watchdog
config = WatchdogConfig(min_limit_s=0.4, step_factor=4, slow_limit_s=6)
with Watchdog(config, Path(sys.argv[1]), 3) as watchdog:
    time.sleep(0.8)  # the start is slow
    for step in range(1, 4):
        time.sleep(0.2)
        watchdog.step_done(step, 0.5)
    time.sleep(0.6)  # more than min_limit_s; 4 x the median is more
    watchdog.step_done(4, 0.5)
    with watchdog.slow("saving"):
        time.sleep(2.5)  # more than a step may take
    print("so far", flush=True)
    if sys.argv[2] == "slow":
        with watchdog.slow("saving"):
            time.sleep(60)
    def a_place_to_be_stuck():
        time.sleep(60)
    a_place_to_be_stuck()
"""


@pytest.mark.parametrize(("where", "words"), [("step", "step after step 4"), ("slow", "saving after step 4")])
def test_only_what_takes_too_long_is_ended(tmp_path, where, words):
    done = subprocess.run(
        [sys.executable, "-c", STUCK, str(tmp_path), where], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "so far\n", done.stderr
    assert done.returncode == Ending.HUNG
    stacks = stacks_file(tmp_path, 3).read_text()
    assert words in stacks
    assert ("a_place_to_be_stuck" in stacks) == (where == "step")
    assert read(tmp_path)["step"] == 4


SLEEPS = """
import sys, time
from pathlib import Path
from esolm_megatron import cli
from esolm_megatron.parallel.engine import Engine

honest, calls = Engine.forward_backward, []

def forward_backward(self, noised):
    calls.append(1)
    if len(calls) == 4:
        Path(sys.argv[1]).touch()
        time.sleep(8)
    return honest(self, noised)

Engine.forward_backward = forward_backward
sys.exit(cli.main(["train", sys.argv[2]]))
"""


@pytest.mark.parametrize("slurm", [False, True])
def test_a_second_signal_ends_the_process_at_once_but_not_under_slurm(tokens, tmp_path, slurm):
    """SLURM sends each signal twice: to the step and to the job."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree(tokens, tmp_path, **(LONG | {"watchdog": {}}))))
    env = {k: v for k, v in os.environ.items() if k != "SLURM_JOB_ID"} | ({"SLURM_JOB_ID": "1"} if slurm else {})
    words = [sys.executable, "-c", SLEEPS, str(tmp_path / "asleep"), str(tmp_path / "run.yaml")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        deadline = time.time() + 60
        while not (tmp_path / "asleep").exists():
            assert process.poll() is None
            assert time.time() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None, "the first one waits for the step"
        began = time.time()
        process.send_signal(signal.SIGINT)
        code, text = finish(process)
        assert code == (Ending.STOPPED if slurm else 128 + signal.SIGINT), text
        assert (time.time() - began > 4) == slurm
    assert complete_steps(tmp_path / "run") == ([4] if slurm else [])


def test_watchdog_that_is_off_ends_nothing(tmp_path):
    with Watchdog(WatchdogConfig(enabled=False, min_limit_s=0.05, slow_limit_s=0.1), tmp_path, 0) as watchdog:
        time.sleep(0.5)
        watchdog.step_done(1, 0.01)
        time.sleep(0.3)


def test_verdict_names_the_cause():
    assert verdict([0, 0]) == 0
    assert verdict([75, 0, 75]) == 75
    assert verdict([137, 1, 137]) == 137
    assert verdict([1, 81, 137]) == 81
    assert verdict([0, 80, 137]) == 80
    assert verdict([75, 1]) == 1


POISONED = """
import sys
import dataclasses
import numpy as np
from esolm_megatron import cli
from esolm_megatron.data.stream import TokenStream
from esolm_megatron.train import collate

bad = {int(x) for x in sys.argv[1].split(",")}
honest_batch, honest_draw = TokenStream.batch, collate.draw_step
hashes = set()

def batch(self, step):
    found = honest_batch(self, step)
    if step in bad and self.data_rank == 1:
        hashes.add(found.tokens.tobytes())
    return found

def draw(tokens, *args, **kwargs):
    noised = honest_draw(tokens, *args, **kwargs)
    if tokens.tobytes() not in hashes:
        return noised
    first, *rest = noised.micro_batches
    first = dataclasses.replace(first, weights=first.weights * float("nan"))
    return dataclasses.replace(noised, micro_batches=[first, *rest])

TokenStream.batch, collate.draw_step = batch, draw
sys.exit(cli.main(["train", *sys.argv[2:]]))
"""


def broken_run(config, folder, program, word, num_ranks):
    """Exit status and output of ranks that run `program word run.yaml`."""
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    (folder / "program.py").write_text(program)
    launch = f"import sys; from esolm_megatron.launch import run_local; sys.exit(run_local(sys.argv[1:], {num_ranks}))"
    words = [sys.executable, str(folder / "program.py"), word, str(folder / "run.yaml")]
    done = subprocess.run(
        [sys.executable, "-c", launch, *words], capture_output=True, text=True, timeout=250, check=False
    )
    return done.returncode, done.stdout + done.stderr


def poisoned_run(config, folder, bad):
    """The same for two ranks, of which rank 1's batches numbered `bad` have a loss that is no number."""
    return broken_run(config, folder, POISONED, ",".join(map(str, bad)), 2)


def events(folder, kind):
    lines = [json.loads(x) for x in (folder / "run" / "events.jsonl").read_text().splitlines()]
    return [x for x in lines if x["event"] == kind]


def clean_run(tokens, folder, skipped):
    config = tree(tokens, folder, guard={"skip_batches": skipped})
    code, text = finish(start(config, folder, processes=2))
    assert code == 0, text
    return state(folder / "run", 12)


@pytest.mark.gloo
def test_bad_batches_are_left_out_and_a_rollback_goes_around_them(tokens, tmp_path):
    """Batch 2 is bad alone; 9 and 10 together end in a rollback from step 8 to step 4, which leaves out 7 and 8 too."""
    guard = {"rollback_after": 2, "rollback_skip_batches": 2}
    for name in ("dirty", "clean"):
        (tmp_path / name).mkdir()
    code, text = poisoned_run(tree(tokens, tmp_path / "dirty", guard=guard), tmp_path / "dirty", [2, 9, 10])
    assert code == 0, text
    bad = events(tmp_path / "dirty", "bad_batch")
    assert [(x["step"], x["batch"], x["samples"]) for x in bad] == [
        (3, 2, [16, 23]),
        (9, 9, [72, 79]),
        (9, 10, [80, 87]),
    ]
    assert all("loss is nan" in x["reason"] for x in bad)
    (back,) = events(tmp_path / "dirty", "rollback")
    assert (back["step"], back["target"], back["skipped"]) == (8, 4, [7, 10])
    lines = [json.loads(x) for x in (tmp_path / "dirty" / "run" / "metrics.jsonl").read_text().splitlines()]
    lines = [x for x in lines if "loss" in x]
    assert [x["step"] for x in lines] == list(range(1, 13))
    assert lines[-1]["skipped_batches"] == 5
    assert all(
        lines[-1][key] > 0 for key in ("goodput", "lost_start", "lost_skipped", "lost_rollback", "lost_repeated")
    )
    assert sum(v for k, v in lines[-1].items() if k == "goodput" or k.startswith("lost_")) == pytest.approx(1, abs=0.01)
    assert {"slowest_rank", "slowest_share"} <= lines[-1].keys()
    dirty, clean = state(tmp_path / "dirty" / "run", 12), clean_run(tokens, tmp_path / "clean", [2, 7, 8, 9, 10])
    assert dirty.keys() == clean.keys()
    assert all(torch.equal(dirty[key], clean[key]) for key in dirty)


@pytest.mark.gloo
def test_resumed_run_leaves_out_the_same_batches(tokens, tmp_path):
    """The bad batch is healthy after the restart, and is left out all the same."""
    for name in ("dirty", "clean"):
        (tmp_path / name).mkdir()
    config = tree(tokens, tmp_path / "dirty", train={"num_steps": 6})
    assert poisoned_run(config, tmp_path / "dirty", [5])[0] == 0
    for step in (6,):  # as if the last save had been lost: the record in the run folder must do
        os.rename(tmp_path / f"dirty/run/checkpoints/step_{step:08d}", tmp_path / "lost")
    code, text = finish(start(tree(tokens, tmp_path / "dirty"), tmp_path / "dirty", processes=2))
    assert code == 0, text
    dirty, clean = state(tmp_path / "dirty" / "run", 12), clean_run(tokens, tmp_path / "clean", [5])
    assert all(torch.equal(dirty[key], clean[key]) for key in dirty)


@pytest.mark.gloo
def test_numbers_that_stay_bad_stop_the_run_with_a_report(tokens, tmp_path):
    guard = {"rollback_after": 2, "rollback_skip_batches": 0, "max_rollbacks": 1}
    code, text = poisoned_run(tree(tokens, tmp_path, guard=guard), tmp_path, range(6, 40))
    assert code == Ending.BAD_NUMBERS, text
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["rollbacks"] == [[6, 4]]
    assert [x["batch"] for x in report["events"] if x["event"] == "bad_batch"] == [6, 7, 8, 9]
    marker = read(tmp_path / "run")
    assert (marker["how"], marker["restart"], marker["step"]) == ("bad_numbers", False, 6)
    assert "guard.max_rollbacks = 1" in " ".join(text.split())


FLIPPED = """
import os
import sys
import torch
from esolm_megatron import cli
from esolm_megatron.parallel.engine import Engine

honest, calls = Engine.forward_backward, []

def forward_backward(self, noised):
    calls.append(1)
    if len(calls) == 7 and os.environ["RANK"] == "1":
        parameters = [o.parameter for o in self.owned if o.parameter.dim() == (1 if sys.argv[1] == "norm" else 2)]
        parameters[1].data.view(-1).view(torch.int32)[5] ^= 1 << 20
    return honest(self, noised)

Engine.forward_backward = forward_backward
sys.exit(cli.main(["train", *sys.argv[2:]]))
"""
TOO_FEW = "ranks 0, 1 differ, and no majority says which is right"


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("what", "num_ranks", "parallel", "every", "found"),
    [
        ("matrix", 3, {}, 1, ("layers.", "rank 1 differs from ranks 0, 2")),
        ("norm", 2, {"tensor_size": 2}, 0, ("norms and biases: ", TOO_FEW)),
        ("matrix", 2, {"context_size": 2}, 1, ("layers.", TOO_FEW)),
    ],
    ids=["data", "tensor", "context"],
)
def test_corrupted_rank_stops_the_run_before_anything_is_saved_from_it(
    tokens, tmp_path, what, num_ranks, parallel, every, found
):
    config = tree(tokens, tmp_path, guard={"checksum_every_steps": every}, checkpoint={"every_steps": 1})
    config |= {"parallel": parallel, "train": config["train"] | {"global_batch_size": 12}}
    code, text = broken_run(config, tmp_path, FLIPPED, what, num_ranks)
    assert code == Ending.CORRUPTED, text
    marker = read(tmp_path / "run")
    assert (marker["how"], marker["restart"], marker["step"]) == ("corrupted", True, 6)
    (event,) = events(tmp_path, "corrupted")
    assert event["found"][0].startswith(found[0])
    assert found[1] in event["found"][0]
    assert complete_steps(tmp_path / "run")[-1] == 6
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert ("norms and biases" in first["compared"], "all weights" in first["compared"]) == (True, every == 1)


def test_time_is_accounted_for():
    clock = WallClock()
    for state_, seconds in (("start", 0.05), ("step", 0.2), ("saving", 0.05)):
        time.sleep(seconds)
        clock.spent(state_)
    shares = clock.shares()
    assert shares["goodput"] == pytest.approx(2 / 3, abs=0.1)
    assert set(shares) == {"goodput", "lost_start", "lost_saving"}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)


def test_the_slowest_rank_is_named():
    made = Stragglers(4)
    for _ in range(3):
        made.add(torch.tensor([1.0, 1.0, 2.0, 1.0]).numpy())
    assert made.report() == {"slowest_rank": 2, "slowest_share": 0.5}
    assert made.report() == {}, "since the last report"
    assert Stragglers(1).report() == {}
