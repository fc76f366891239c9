"""What is refused, and how quickly, before anything is written; most of it needs no SLURM."""

import io
import json
import os
import socket
import subprocess
import sys
import time

import pytest
import yaml
from conftest import CLUSTER, Login

from esolm_megatron.config import ConfigError
from esolm_megatron.errors import UserError
from esolm_megatron.launch.executor import Slurm, meeting_port, srun_command
from esolm_megatron.launch.site import ClusterConfig, cluster_problems, load_cluster
from esolm_megatron.launch.submit import sweep


@pytest.fixture
def here(tokens, tmp_path):
    """A machine without SLURM."""
    return Login(None, tokens, tmp_path)


def refused(login, *words):
    """What a launch says that is refused and leaves nothing behind, and its seconds."""
    begun = time.monotonic()
    code, text = login.esolm("launch", *words)
    seconds = time.monotonic() - begun
    assert code == 2, text
    assert not (login.folder / "runs").exists()
    return text, seconds


@pytest.mark.slurm
def test_what_the_cluster_lacks_is_refused(login):
    """Prints how long it took: docs/operations.md tells."""
    cases = [
        ({"partition": "gpu"}, {}, "partition = gpu: sinfo knows high, main"),
        ({"nodes": 3}, {}, "nodes = 3: partition main has 2"),
        ({"time_h": 100}, {}, "time_h = 100: partition main has a limit of 48 hours"),
        ({"gpus_per_node": 8, "tasks_per_node": None}, {}, "gpus_per_node = 8: partition main has nodes with 2"),
        ({"cpus_per_task": 9}, {}, "cores of a node, partition main has nodes with 8"),
        ({}, {"optim": {"lr": -1}}, "optim.lr = -1"),
        ({}, {"train": {"global_batch_size": 6}}, "train.global_batch_size = 6"),
    ]
    times = []
    for cluster, sections, said in cases:
        text, seconds = refused(login, *login.files(cluster, **sections))
        assert said in text
        times.append(seconds)
    print(f"refused in {min(times):.2f} to {max(times):.2f} s")
    code, text = login.esolm("launch", *login.files({"sbatch": {"constraint": "unobtainium"}}))
    assert code == 1, text
    assert "sbatch would refuse this" in text
    assert not (login.folder / "runs").exists()


def test_a_refusal_loads_no_torch(here):
    """Nothing else takes longer: without it the answer comes within a second or two."""
    words = ["launch", *here.files(optim={"lr": -1})]
    code = (
        "import sys; from esolm_megatron.cli import main; "
        f"print(main({words!r}), sorted({{'torch', 'deepspeed'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=here.folder)
    assert done.stdout.strip() == "2 []", done.stderr


def test_a_cluster_file_is_checked_as_a_whole(here):
    files = here.files({"gpus_per_node": 4, "tasks_per_node": 2})
    assert "leave tasks_per_node out" in refused(here, *files)[0]
    files = here.files({"partitoin": "x", "nodes": 0})
    text, _ = refused(here, *files)
    assert "partitoin: no such field; did you mean partition?" in text
    assert "nodes = 0" in text
    assert "container and container_image go together" in refused(here, *here.files({"container": "pyxis"}))[0]
    assert "must be below the time limit" in refused(here, *here.files({"time_h": 0.01}))[0]


def test_the_shown_cluster_files_are_right():
    from conftest import ROOT

    found = {path.stem: load_cluster(path) for path in (ROOT / "slurm" / "clusters").glob("*.yaml")}
    assert found["example"].num_ranks == 32
    assert found["debug"].num_ranks == 4
    readme = (ROOT / "slurm" / "README.md").read_text()
    assert [name for name in ClusterConfig.model_fields if f"`{name}`" not in readme] == []


def test_dry_run_without_slurm(here):
    pytest.importorskip("submitit")
    code, text = here.esolm("launch", *here.files(), "--dry-run", "optim.lr=0.5")
    assert code == 0, text
    assert "#SBATCH --signal=USR2@60" in text
    assert "--kill-on-bad-exit=1" in text
    assert "plan of run" in text
    assert not (here.folder / "runs").exists()


def test_containers_wrap_the_ranks(tmp_path):
    base = {k: v for k, v in CLUSTER.items() if k != "tasks_per_node"} | {
        "gpus_per_node": 1,
        "container_image": "i.sqsh",
    }
    mounts = {"container_mounts": ["/a:/b", "/c:/d"]}
    words = srun_command(ClusterConfig(**base, **mounts, container="pyxis"), "rank", tmp_path, "o")
    assert {"--container-image=i.sqsh", "--container-mounts=/a:/b,/c:/d"} <= set(words)
    words = srun_command(ClusterConfig(**base, **mounts, container="apptainer", python="py"), "rank", tmp_path, "o")
    assert words[words.index("apptainer") :][:9] == [
        "apptainer", "exec", "--nv", "--bind", "/a:/b", "--bind", "/c:/d", "i.sqsh", "py",
    ]  # fmt: skip


def test_sinfo_tells_what_a_partition_has():
    found = {"a": {"nodes": 2, "minutes": 60.0, "cores": 8, "gpus": 0}}
    fits = ClusterConfig(partition="a", nodes=2, tasks_per_node=4, cpus_per_task=2, time_h=1)
    assert cluster_problems(fits, found) == []
    assert len(cluster_problems(fits.model_copy(update={"nodes": 3, "time_h": 1.5, "gpus_per_node": 1}), found)) == 3


def test_a_sweep_is_written_field_by_field(here):
    assert len(sweep(["a.b=1,2,3", "c=4,5"])) == 6
    assert sweep([]) == [()]
    with pytest.raises(ConfigError, match="is written"):
        sweep(["a.b"])
    assert "no such field" in refused(here, *here.files(), "--sweep", "optim.speed=1,2", "--dry-run")[0]


def test_local_run_is_stopped_by_a_signal_and_resumed(here):
    """--local: the same job, run folder and records, without SLURM; in a shell that SLURM has started, too."""
    import signal
    import subprocess
    import sys

    inside = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "a[1-2]", "SLURM_PROCID": "3"}
    files = here.files({"nodes": 1}, train={"num_steps": 100_000})
    process = subprocess.Popen(
        [sys.executable, "-m", "esolm_megatron", "launch", *files, "--local"],
        cwd=here.folder, env=here.env | inside, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    run = here.folder / "runs" / "run"
    here.await_step(run, 20)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 75, text
    step = here.newest_step(run)
    assert step >= 20
    code, text = here.esolm("launch", *files, "--local", "--resume", f"train.num_steps={step + 5}")
    assert code == 0, text
    assert [(s["launch"], s["how"]) for s in here.starts(run)] == [("001", "stopped"), ("002", "finished")]
    assert list(here.losses(run)) == list(range(1, step + 6))
    code, text = here.esolm("jobs", "runs", "--json")
    (row,) = json.loads(text)
    assert (row["state"], row["step"], row["restarts"]) == ("finished", step + 5, {"stopped": 1})
    assert yaml.safe_load((run / "launches/002/config.yaml").read_text())["train"]["num_steps"] == step + 5


def test_the_table_shows_words_of_logs_as_they_are(tmp_path):
    """Words in brackets are markup to the library that draws the table: gloo's errors name files like that."""
    from rich.console import Console

    from esolm_megatron.launch.record import Record, failure_file
    from esolm_megatron.launch.table import as_table, row
    from esolm_megatron.train.ending import write_json

    (tmp_path / "launches").mkdir()
    record = Record(tmp_path)
    record.write("start", launch="001", attempt="7.0", step=0, nodes=["n1"])
    record.write("end", launch="001", attempt="7.0", how="failed", detail="", again=True)
    words = {"rank": 1, "host": "n1", "error": "[/a/pair.cc:537] closed", "time": 1.0}
    write_json(failure_file(tmp_path / "logs" / "7.0", 1), words)
    console = Console(width=300, file=io.StringIO(), record=True)
    console.print(as_table([row(tmp_path, {})]))
    assert "rank 1 on n1: [/a/pair.cc:537] closed" in console.export_text()


def test_jobs_ten_thousand_apart_meet_at_different_ports():
    first = meeting_port(4711)
    with socket.create_server(("", first)):
        assert meeting_port(14711) == first + 2
    with socket.create_server(("", meeting_port(9999))) as last:
        assert last.getsockname()[1] == 31998
        assert meeting_port(19999) == 12000


def test_words_of_a_command_that_failed_are_no_hosts(tmp_path, monkeypatch):
    """As in a shell of SLURM whose commands have gone, or whose node list is another cluster's."""
    for failing in ("exit 1", "echo slurm_load_jobs error: no such thing >&2; exit 1"):
        command = tmp_path / "scontrol"
        command.write_text(f"#!/bin/sh\n{failing}\n")
        command.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        with pytest.raises(UserError, match=r"scontrol show hostnames a\[1-2\]:"):
            Slurm(tmp_path, None, tmp_path, {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "a[1-2]"})
