"""One writer for a run folder: refused, taken over, given back; with real processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from esolm_megatron.errors import UserError
from esolm_megatron.train import lease
from esolm_megatron.train.lease import Lease

HOLD = "import sys, time; from pathlib import Path; from esolm_megatron.train.lease import Lease\n" \
       "with Lease(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"  # fmt: skip


def holder(folder, **env):
    """A process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True, env=os.environ | env
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_and_the_folder_of_a_dead_one_taken_over(tmp_path, capfd):
    run = tmp_path / "run"
    first = holder(run, SLURM_JOB_ID="77")
    try:
        with pytest.raises(
            UserError, match=rf"process {first.pid} on {os.uname().nodename}, job 77 writes this run since 20"
        ):
            Lease(run).__enter__()
        assert sorted(p.name for p in run.iterdir()) == ["writer.json"], "nothing is left of who was refused"
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        with Lease(run):
            assert (
                f"process {first.pid} on {os.uname().nodename}, job 77 left this run without a word; taken over"
                in capfd.readouterr().err
            )
            with pytest.raises(UserError, match=f"process {os.getpid()} "):
                Lease(run).__enter__()
        assert not run.exists(), "given back"
    finally:
        first.kill()


def test_a_zombie_and_another_process_of_the_same_number_are_dead(tmp_path):
    (tmp_path / "config.yaml").touch()
    first = holder(tmp_path)
    os.kill(first.pid, signal.SIGKILL)
    time.sleep(0.2)  # nobody has asked how it ended
    with Lease(tmp_path):
        pass
    first.wait()
    own = lease._self()
    (tmp_path / "writer.json").write_text(json.dumps({"token": "x", **own, "begun": "1"}))
    with Lease(tmp_path):
        pass


def test_on_another_machine_beats_decide(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").touch()
    path = tmp_path / "writer.json"
    elsewhere = {"token": "x", "host": "other", "pid": 1, "world": "another boot", "begun": "1", "since": "then"}
    path.write_text(json.dumps(elsewhere))
    os.utime(path, (time.time() - 60, time.time() - 60))
    with pytest.raises(
        UserError, match=r"process 1 on other writes this run since then, with a sign of life 6\d s ago"
    ):
        Lease(tmp_path).__enter__()
    os.utime(path, (time.time() - 100, time.time() - 100))
    with Lease(tmp_path):
        pass
    path.write_text("")  # cut off in writing: nobody's, once it is old
    os.utime(path, (time.time() - 100, time.time() - 100))
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    with Lease(tmp_path):
        os.utime(path, (0, 0))
        time.sleep(0.4)
        assert time.time() - path.stat().st_mtime < 5, "a beat"


def test_a_start_that_slurm_has_begun_again_takes_over_and_the_old_one_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    quick = HOLD.replace(
        "from esolm_megatron.train.lease import Lease",
        "from esolm_megatron.train import lease; Lease = lease.Lease; lease.BEAT_S = 0.1",
    )
    first = subprocess.Popen(
        [sys.executable, "-c", quick, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "held\n"
    monkeypatch.setenv("ESOLM_ATTEMPT", "5.1")
    (tmp_path / "owner.json").write_text('{"attempt": "5.0"}')
    with pytest.raises(UserError):
        Lease(tmp_path).__enter__()
    (tmp_path / "owner.json").write_text('{"attempt": "5.1"}')
    with Lease(tmp_path):
        assert first.wait(10) == 75
        assert "another process has taken over this run; ending" in first.stderr.read()


def test_of_many_that_come_at_once_one_gets_a_dead_ones_folder(tmp_path):
    (tmp_path / "writer.json").write_text(json.dumps({"token": "x", **lease._self(), "begun": "1"}))
    gate, out = threading.Barrier(8), []

    def come(_):
        gate.wait()
        one = Lease(tmp_path)
        try:
            one.__enter__()
        except UserError:
            return None
        out.append(one)
        return one

    with ThreadPoolExecutor(8) as pool:
        got = [one for one in pool.map(come, range(8)) if one is not None]
    assert len(got) == 1
    got[0].__exit__()


def test_a_folder_that_cannot_be_made_is_named_with_its_setting(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"runs_dir: .*/file/run cannot be made: Not a directory; choose another"):
        Lease(tmp_path / "file" / "run").__enter__()
