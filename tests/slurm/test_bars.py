"""Runs that must survive, on SLURM's real daemons: two nodes, the real trainer over gloo. Each says how long it took."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, Login

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]
LONG = {"train": {"num_steps": 200}, "checkpoint": {"every_steps": 40}}


@pytest.fixture(scope="module")
def whole(slurm, tokens, tmp_path_factory):
    """Losses of the same run on two processes of this machine, undisturbed, by --local."""
    login = Login(slurm, tokens, tmp_path_factory.mktemp("whole"))
    code, text = login.esolm("launch", *login.files({"nodes": 1, "tasks_per_node": 2}, **LONG), "--local")
    assert code == 0, text
    assert text.rstrip().endswith("finished at step 200: done")
    losses = login.losses(login.folder / "runs" / "run")
    assert list(losses) == list(range(1, 201))
    return losses


def ranks_of(job, rank):
    """Process ids of one rank of a job."""
    want, out = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}, []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            first, *words = process.joinpath("cmdline").read_bytes().split(b"\0")
            is_rank = b"esolm_megatron.launch.rank" in words and first != b"srun"
            if is_rank and want <= set(process.joinpath("environ").read_bytes().split(b"\0")):
                out.append(int(process.name))
    return out


def test_two_nodes_with_two_tasks_finish_as_the_dry_run_said(login):
    """With the production parameters: GPUs through gres, whole nodes, a health check with collectives."""
    cluster = {"tasks_per_node": None, "gpus_per_node": 2, "health": "all", "exclusive": True, "mail_user": "x@y"}
    code, text = login.esolm("launch", *login.files(cluster), "--dry-run", "--json")
    assert code == 0, text
    assert not (login.folder / "runs").exists()
    said = json.loads(text)
    assert said["plan"]["topology"]["world_size"] == 4
    (job,), run = login.launch(cluster)
    login.await_end(run)
    assert list(login.losses(run)) == list(range(1, 41))
    assert (run / "launches" / "001" / f"{job}_submission.sh").read_text() == said["script"]
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", said["script"], re.MULTILINE))
    ran = login.slurm.job(job)
    assert (ran["JobName"], ran["Partition"], ran["NumNodes"]) == (
        asked["job-name"],
        asked["partition"],
        asked["nodes"],
    )
    assert (ran["NumTasks"], ran["TresPerNode"]) == ("4", f"gres:gpu:{asked['gpus-per-node']}")
    assert (ran["TimeLimit"], asked["time"], asked["signal"]) == ("00:30:00", "30", "USR2@60")
    assert (ran["OverSubscribe"], ran["Requeue"]) == ("NO", "1")
    assert ran["StdOut"] == asked["output"].replace("%j", job)
    logs = run / "logs" / f"{job}.0"
    assert (logs / "rank.txt").read_text().splitlines()[0] == said["srun"].replace("JOB.COUNT", f"{job}.0")
    places = [json.loads((logs / f"rank_{rank:05d}.txt").read_text().splitlines()[0]) for rank in range(4)]
    assert [(p["host"], p["local_rank"], p["gpus"]) for p in places] == [
        ("n1", 0, "0,1"), ("n1", 1, "0,1"), ("n2", 0, "0,1"), ("n2", 1, "0,1"),
    ]  # fmt: skip
    log = (run / "logs" / f"job_{job}.txt").read_text()
    assert "ranks 0-1 on n1, 2-3 on n2" in log
    assert "healthy: 2 nodes" in log
    assert log.rstrip().endswith("finished at step 40: done")
    assert (run / "launches/001/code/esolm_megatron/cli.py").read_bytes() == (
        ROOT / "esolm_megatron/cli.py"
    ).read_bytes()
    code, text = login.esolm("launch", *login.files(cluster))
    assert code == 2, text
    assert "give --resume" in text


def test_time_limit_saves_requeues_and_loses_nothing(login, whole):
    """The signal that SLURM sends to the ranks before the limit; here it comes at a moment that we choose."""
    (job,), run = login.launch(**LONG)
    login.await_step(run, 50)
    login.slurm.run("scancel", "--signal=USR2", job)
    login.await_end(run)
    first, second = login.starts(run)
    assert (first["how"], first["again"], second["how"]) == ("stopped", True, "finished")
    assert second["step"] >= 50
    assert second["step"] % 40, "saved because of the signal"
    assert login.losses(run) == whole


def test_no_memory_at_step_0_ends_it_at_once(login):
    """Matrices of 110 GB, which no machine of the tests has."""
    huge = {"hidden_size": 96000, "num_heads": 2, "num_layers": 1}
    (_,), run = login.launch(model=huge)
    login.await_end(run, "failed")
    (only,) = login.starts(run)
    assert (only["how"], only["again"]) == ("failed", False), only
    last = (run / "logs").glob("job_*.txt").__next__().read_text().rstrip().splitlines()[-1]
    assert re.search(r"failed at step 0: .*allocate.*lower train.micro_batch_size", last), last


def test_preempted_by_a_more_important_job_it_comes_back(login, whole):
    (job,), run = login.launch({"exclusive": True}, **LONG)
    login.await_step(run, 50)
    login.slurm.run("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2")
    login.until(lambda: login.slurm.job(job)["Restarts"] == "1", 60, run)
    login.await_end(run)
    first, second = login.starts(run)
    assert (first["how"], second["how"]) == ("stopped", "finished")
    assert second["step"] >= 50, "it had time to save"
    assert login.losses(run) == whole


def test_requeued_by_hand_it_is_watched_and_stays_one_run_of_wandb(login, whole):
    (_,), run = login.launch(log={"wandb": "offline"}, **LONG)
    login.await_step(run, 50)
    words = [sys.executable, "-m", "esolm_megatron", "jobs", "runs", "--watch", "--every", "1"]
    with (login.folder / "seen.txt").open("wb") as seen:
        watching = subprocess.Popen(words, cwd=login.folder, env=login.env, stdout=seen, stderr=seen)
    code, text = login.esolm("jobs", "requeue", "runs/run")
    assert code == 0, text
    login.await_end(run)
    login.until(lambda: "finished" in (login.folder / "seen.txt").read_text(), 30, run)
    watching.send_signal(signal.SIGINT)
    assert watching.wait(30) == 0
    seen = (login.folder / "seen.txt").read_text()
    assert seen.count(" run ") > 3, "the table again and again"
    assert "Traceback" not in seen
    first, second = login.starts(run)
    assert (first["how"], second["how"]) == ("stopped", "finished"), first
    assert login.losses(run) == whole
    number = (run / "wandb_id").read_text().strip()
    runs = sorted(path.name.rpartition("-")[2] for path in (run / "wandb").glob("offline-run-*"))
    assert runs == [number, number], "two starts, one run"


def test_a_hang_is_ended_and_the_run_goes_on(login, whole):
    watchdog = {"min_limit_s": 5, "step_factor": 2, "slow_limit_s": 60}
    (job,), run = login.launch(watchdog=watchdog, **LONG)
    login.await_step(run, 50)
    (pid,) = ranks_of(job, 1)
    os.kill(pid, signal.SIGSTOP)
    login.await_end(run)
    first, second = login.starts(run)
    assert (first["how"], first["again"], second["how"]) == ("hung", True, "finished"), first
    assert second["step"] >= 40
    assert "step" in (run / "logs" / "stacks_rank_00000.txt").read_text()
    assert login.losses(run) == whole


def test_a_killed_rank_is_named_and_the_run_goes_on(login, whole):
    (job,), run = login.launch(**LONG)
    login.await_step(run, 50)
    (pid,) = ranks_of(job, 1)
    os.kill(pid, signal.SIGKILL)
    login.until(lambda: login.starts(run)[0]["how"] is not None, 30, run)
    ended = json.loads((run / "ended.json").read_text())
    assert (ended["how"], ended["restart"], ended["detail"]) == ("killed", True, "rank 1 on n2: Killed")
    _, text = login.esolm("jobs", "runs", "--json")
    (row,) = json.loads(text)
    assert (row["run"], row["job"], row["restarts"], row["saved"]) == ("run", job, {"killed": 1}, 40)
    assert any(line.startswith("rank 1 on n2: Killed; its log ends: ") for line in row["failed"]), row
    login.await_end(run)
    first, second = login.starts(run)
    assert (first["how"], second["how"], second["step"]) == ("killed", "finished", 40)
    assert login.losses(run) == whole
    code, text = login.esolm("jobs", "runs")
    assert (code, "killed 1" in text, "rank 1 on n2: Killed" in text) == (0, True, True), text
    _, text = login.esolm("jobs", "logs", "runs/run")
    assert "finished at step 200: done" in text


def test_a_dead_node_the_run_goes_on_elsewhere_and_its_old_rank_ends(login):
    """SIGKILL to slurmd alone: the rank that it had started lives on, and must not write beside the new one."""
    (job,), run = login.launch({"nodes": 1}, train={"num_steps": 1_000_000}, checkpoint={"every_steps": 100})
    login.await_step(run, 100)
    (old,) = ranks_of(job, 0)
    node = login.slurm.job(job)["NodeList"]
    login.slurm.kill_node(node)
    try:
        login.until(lambda: len(login.starts(run)) == 2, 60, run)
        taken_over = time.monotonic()
        login.until(lambda: not Path(f"/proc/{old}").exists(), 10, run)
        assert time.monotonic() - taken_over < 10
        begun = login.reached(run)
        login.until(lambda: ranks_of(job, 0) and login.reached(run) > begun, 60, run)
        code, text = login.esolm("jobs", "stop", "runs/run")
        assert code == 0, text
        login.await_end(run, "stopped")
    finally:
        login.slurm.start_node(node)
    first, second = login.starts(run)
    assert first["how"] in ("killed", "lost"), "the old job may have had time to say that a node failed"
    assert (second["how"], second["again"]) == ("stopped", False)
    assert first["nodes"] != second["nodes"]
    assert second["step"] >= 100
    assert "has taken over" in (run / "logs" / f"{job}.0" / "rank_00000.txt").read_text()
    steps = [json.loads(x)["step"] for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    login.until(lambda: len(login.slurm.run("sinfo", "-hN", "-p", "main", "-t", "idle").split()) >= 4, 30, run)


def test_a_crash_loop_ends(login):
    (job,), run = login.launch({"nodes": 1, "max_restarts": 1, "env": {"DS_ACCELERATOR": "abacus"}})
    login.await_end(run, "failed")
    assert [start["how"] for start in login.starts(run)] == ["failed", "failed"]
    last = (run / "logs" / f"job_{job}.txt").read_text().splitlines()[-1]
    assert re.search(r"failed at step 0: gave up, 2 starts without a new checkpoint: rank 0 on n\d: .*abacus", last), (
        last
    )
    assert login.slurm.job(job)["JobState"] == "FAILED"


def test_missing_data_ends_the_job_at_once(login, tmp_path):
    copy = tmp_path / "tokens"
    shutil.copytree(login.tokens, copy)
    (job,), run = login.launch(
        {"nodes": 1, "sbatch": {"begin": "now+3"}}, data={"path": str(copy)},
    )  # fmt: skip
    shutil.rmtree(copy)
    login.await_end(run, "bad_config")
    assert len(login.starts(run)) == 1
    last = (run / "logs" / f"job_{job}.txt").read_text().splitlines()[-1]
    assert re.search(rf"bad_config at step 0: rank 0 on n\d: .*{copy}", last), last


def test_a_bad_node_is_named_and_left_out(login, tmp_path):
    """No machine here has GPUs, so a script plays the GPU tool: on n1, where the job comes first, it reports memory errors."""
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\n[ "$(hostname)" = n1 ] && bad=2 || bad=0\nprintf "0, $bad, 3, 80000\\n1, 0, 3, 80000\\n"\n'
    )
    tool.chmod(0o755)
    env = {"PATH": f"{tool.parent}:{login.slurm.env['PATH']}", "DS_ACCELERATOR": "cpu"}
    (job,), run = login.launch(
        {"nodes": 1, "tasks_per_node": None, "gpus_per_node": 2, "health": "node", "env": env, "restart_delay_s": 12},
        train={"device": "auto"},
    )
    login.await_end(run)
    first, second = login.starts(run)
    assert (first["how"], first["nodes"], first["exclude"]) == ("unhealthy", ["n1"], ["n1"])
    assert "n1: GPU 0 has 2 uncorrected memory errors" in first["detail"]
    assert (second["how"], second["nodes"]) == ("finished", ["n2"])
    assert login.slurm.job(job)["ExcNodeList"] == "n1"
    assert second["time"] - first["ended"] >= 11, "it waited as long as it was told, to a second of SLURM's clock"


@pytest.mark.slow
def test_a_real_time_limit(login):
    """Two minutes, which SLURM looks at once a minute or so: the signal may come up to a minute before its time."""
    _, run = login.launch({"nodes": 1, "time_h": 2 / 60, "signal_s": 50}, train={"num_steps": 1_000_000})
    login.until(lambda: len(login.starts(run)) == 2, 150, run)
    first = login.starts(run)[0]
    login.await_step(run, login.newest_step(run) + 10)
    login.esolm("jobs", "stop", "runs/run")
    login.await_end(run, "stopped")
    second = login.starts(run)[1]
    assert (first["how"], first["again"], second["how"], second["again"]) == ("stopped", True, "stopped", False)
    steps = [json.loads(x)["step"] for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)), "no step is lost or repeated"


def test_a_sweep_of_four(login):
    flags = ["--sweep", "optim.lr=1e-3,1e-2", "--sweep", "seed=1,2"]
    jobs, _ = login.launch({"nodes": 1}, flags, train={"num_steps": 10})
    assert len(jobs) == 1, "one array"
    runs = [login.folder / "runs" / f"run-lr{lr}-seed{seed}" for lr in ("1e-3", "1e-2") for seed in (1, 2)]
    for run in runs:
        login.await_end(run) if run == runs[-1] else login.until(lambda run=run: login.reached(run) == 10, 180, run)
    assert len({login.losses(run)[10] for run in runs}) == 4
    _, text = login.esolm("jobs", "runs", "--json")
    found = {row["run"]: row for row in json.loads(text)}
    assert [(found[run.name]["job"], found[run.name]["state"]) for run in runs] == [
        (f"{jobs[0]}_{i}", "finished") for i in range(4)
    ]


def test_a_chain_goes_on_where_nothing_may_requeue(login):
    jobs, run = login.launch({"nodes": 1}, ["--chain", "2"], train={"num_steps": 300})
    login.await_step(run, 30)
    login.slurm.run("scancel", "--signal=USR2", jobs[0])
    login.await_end(run)
    assert [(s["attempt"], s["how"]) for s in login.starts(run)] == [
        (f"{jobs[0]}.0", "stopped"),
        (f"{jobs[1]}.0", "finished"),
    ]
    assert list(login.losses(run)) == list(range(1, 301))


def test_plain_sbatch_does_the_same(login):
    """slurm/train.sbatch, where submitit is not installed."""
    code, text = login.esolm("launch", *login.files({"nodes": 1}, train={"num_steps": 5}), "--prepare")
    assert code == 0, text
    folder = Path(text.strip())
    words = ["--nodes=1", "--ntasks-per-node=1", "--time=10", f"--output={folder}/job.txt"]
    login.slurm.run("sbatch", *words, str(ROOT / "slurm" / "train.sbatch"), str(folder), cwd=login.folder)
    login.await_end(folder.parents[1])
    assert (folder / "job.txt").read_text().rstrip().endswith("finished at step 5: done")
