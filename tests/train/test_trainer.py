"""The loop with real processes: resume, kills, signals, refusals."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from esolm_megatron.checkpoint import Checkpoint, complete_steps, newest, step_folder
from esolm_megatron.config import ConfigError, check, load
from esolm_megatron.data.prepare import PrepareConfig, prepare
from esolm_megatron.train import preflight
from esolm_megatron.train.ending import Ending, read

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Shards of this project's own source."""
    folder = tmp_path_factory.mktemp("data")
    source = Path(__file__).parents[2] / "esolm_megatron"
    prepare(
        PrepareConfig(
            inputs=(str(source),),
            output=str(folder / "tokens"),
            validation_fraction=0.2,
            block_tokens=4096,
            num_processes=1,
        ),
        progress=False,
    )
    return folder / "tokens"


def tree(tokens, runs, **sections):
    out = {
        "name": "run",
        "runs_dir": str(runs),
        "model": {"num_layers": 2, "hidden_size": 24, "num_heads": 2, "seq_length": 32},
        "objective": {"alpha_0": 0.5},
        "train": {
            "num_steps": 12, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32", "log_every_steps": 1,
            "device": "cpu",
        },
        "optim": {"lr": 1e-2, "warmup_steps": 2, "ema_decay": 0.9},
        "data": {"path": str(tokens)},
        "evaluate": {"every_steps": 6, "num_sequences": 5},
        "checkpoint": {"every_steps": 4, "keep_last": 10},
    }  # fmt: skip
    for name, values in sections.items():
        out[name] = {**out.get(name, {}), **values}
    return out


def start(config, folder, processes=1):
    """A training process group, as a user starts it."""
    file = Path(folder) / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "esolm_megatron", "train", str(file), f"--processes={processes}"]
    command[-1:] = command[-1:] if processes > 1 else []
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process, timeout=120):
    text, _ = process.communicate(timeout=timeout)
    return process.returncode, text


def ranks_of(folder):
    """Ids of the processes, apart from their launcher, that train what is described in `folder`."""
    out = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = process.joinpath("cmdline").read_bytes().split(b"\0")
            environment = process.joinpath("environ").read_bytes()
            if str(folder).encode() in b" ".join(words) and b"\0RANK=" in b"\0" + environment:
                out.append(int(process.name))
    return sorted(out)


def await_end_of_ranks(folder):
    deadline = time.time() + 20
    while ranks_of(folder):
        assert time.time() < deadline, "ranks outlive their launcher"
        time.sleep(0.01)


def state(run, step):
    """Every saved tensor of a step."""
    checkpoint = Checkpoint.open(step_folder(run, step), verify=True)
    return {(kind, name): checkpoint.read(kind, name) for kind in checkpoint.kinds() for name in checkpoint.names(kind)}


def equal(a, b):
    assert a.keys() == b.keys()
    assert {kind for kind, _ in a} == {"weight", "exp_avg", "exp_avg_sq", "ema"}
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.fixture(scope="module")
def uninterrupted(tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    code, text = finish(start(tree(tokens, folder), folder, processes=2))
    assert code == 0, text
    return folder / "run"


def test_run_leaves_everything(uninterrupted):
    assert complete_steps(uninterrupted) == [4, 8, 12]
    assert read(uninterrupted)["how"] == "finished"
    lines = [json.loads(x) for x in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    losses = {x["step"]: x["loss"] for x in lines if "loss" in x}
    assert list(losses) == list(range(1, 13))
    assert losses[12] < losses[1] - 0.5
    assert {x["step"] for x in lines if "validation_nelbo" in x} == {6, 12}
    assert (uninterrupted / "loss.png").stat().st_size > 5000
    assert load(uninterrupted / "config.yaml").model.vocab_size == 258
    assert (uninterrupted / "tokenizer" / "tokenizer.json").exists()
    moved = {n: (a - b).abs().max() for (k, n), a in state(uninterrupted, 12).items() if k == "weight"
             for b in [state(uninterrupted, 4)["weight", n]]}  # fmt: skip
    assert min(moved.values()) > 0, "every tensor trains"


def test_resume_is_bit_identical(tokens, uninterrupted, tmp_path):
    for steps in (5, 12):
        config = tree(tokens, tmp_path, train={"num_steps": steps})
        code, text = finish(start(config, tmp_path, processes=2))
        assert code == 0, text
    equal(state(tmp_path / "run", 12), state(uninterrupted, 12))
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == list(range(1, 13))


@pytest.mark.parametrize("seed", [1, 2])
def test_kill_minus_nine_loses_nothing_saved(tokens, uninterrupted, tmp_path, seed):
    """SIGKILL to all processes at random moments, some of them during saves, until the run ends."""
    generator = random.Random(seed)
    config = tree(tokens, tmp_path, checkpoint={"every_steps": 1})
    kills, before = 0, -1
    while True:
        process = start(config, tmp_path, processes=2)
        if kills < 3:
            deadline = time.time() + 60
            while not complete_steps(tmp_path / "run") or complete_steps(tmp_path / "run")[-1] <= before:
                assert process.poll() is None, process.communicate()[0]
                assert time.time() < deadline
                time.sleep(0.01)
            time.sleep(generator.random() * 0.15)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            await_end_of_ranks(tmp_path)
            assert read(tmp_path / "run")["how"] == "running", "gone, and still running: killed"
            found = newest(tmp_path / "run", verify=True)
            assert found is not None
            assert found.step > before
            before = found.step
        else:
            code, text = finish(process)
            assert code == 0, text
            break
    equal(state(tmp_path / "run", 12), state(uninterrupted, 12))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_saves_and_continues(tokens, tmp_path, processes, number):
    config = tree(tokens, tmp_path, checkpoint={"every_steps": 0}, train={"num_steps": 4000})
    process = start(config, tmp_path, processes)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(number)
    code, text = finish(process)
    assert code == Ending.STOPPED, text
    marker = read(tmp_path / "run")
    (step,) = complete_steps(tmp_path / "run")
    assert (marker["how"], marker["exit_code"], marker["restart"], marker["step"]) == ("stopped", 75, True, step)
    assert 3 <= step < 4000
    assert "continue" in text


def test_damaged_newest_checkpoint_falls_back(tokens, uninterrupted, tmp_path):
    config = tree(tokens, tmp_path, train={"num_steps": 8})
    assert finish(start(config, tmp_path, processes=2))[0] == 0
    victim = step_folder(tmp_path / "run", 8) / "rank_00001.safetensors"
    data = bytearray(victim.read_bytes())
    data[-5] ^= 1
    victim.write_bytes(data)
    code, text = finish(start(tree(tokens, tmp_path), tmp_path, processes=2))
    assert code == 0, text
    assert "rank_00001.safetensors" in text, "the fall-back is loud"
    equal(state(tmp_path / "run", 12), state(uninterrupted, 12))


@contextlib.contextmanager
def small_disk(folder, kilobytes):
    """`folder` is a file system of this size inside."""
    folder.mkdir(parents=True)
    made = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(made, capture_output=True, check=False).returncode:
        pytest.skip("this process may not mount a tmpfs; tests/train/test_saver.py limits the size of files instead")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_the_run_and_keeps_what_was_saved(tokens, uninterrupted, tmp_path):
    """A real file system with room for two checkpoints of 0.54 MB, not for three; a restart that keeps one goes through."""
    run = tmp_path / "run"
    with small_disk(run / "checkpoints", 1400):
        code, text = finish(start(tree(tokens, tmp_path, train={"num_steps": 8}), tmp_path, processes=2))
        assert code == 0, text
        config = tree(tokens, tmp_path, train={"num_steps": 300}, checkpoint={"every_steps": 100})
        code, text = finish(start(config, tmp_path, processes=2))
        assert code != 0, text
        said = "".join(text.split("\n"))
        assert re.search(r"step_00000100\.tmp-\w+/rank_0000\d\.safetensors:.*No space left on device", said), text
        assert "Traceback" not in text
        reached = [json.loads(x)["step"] for x in (run / "metrics.jsonl").read_text().splitlines()][-1]
        assert 100 <= reached < 200, "reported when it happens, not when the next save comes"
        assert complete_steps(run) == [4, 8]
        for step in (4, 8):
            equal(state(run, step), state(uninterrupted, step))
        code, text = finish(start(tree(tokens, tmp_path, checkpoint={"keep_last": 1}), tmp_path, processes=2))
        assert code == 0, text
        assert complete_steps(run) == [12]
        equal(state(run, 12), state(uninterrupted, 12))


def test_other_settings_in_the_same_folder_are_refused(tokens, uninterrupted):
    config = check(tree(tokens, uninterrupted.parent, optim={"lr": 2e-2}))
    with pytest.raises(ConfigError, match=r"optim.lr: was 0.01, now 0.02"):
        preflight.check_run(config, 2)
    preflight.check_run(check(tree(tokens, uninterrupted.parent, train={"num_steps": 20})), 2)


def test_vocabulary_of_other_data_is_refused(tokens, tmp_path):
    config = check(tree(tokens, tmp_path, model={"vocab_size": 300}))
    with pytest.raises(ConfigError, match="has 258 tokens with the mask"):
        preflight.check_run(config, 1)


def test_bad_world_size_is_refused_before_any_process(tokens, tmp_path):
    process = start(tree(tokens, tmp_path), tmp_path, processes=3)
    code, text = finish(process)
    assert code == 2
    assert "micro_batch_size x data-parallel size = 2 x 3" in " ".join(text.split())
    assert not (tmp_path / "run").exists()
