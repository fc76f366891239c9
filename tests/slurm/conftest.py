"""One cluster for all tests of this folder, one set of tokens, and a way to launch tiny runs on it."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from mini_slurm import MiniSlurm, missing

from esolm_megatron.data.prepare import PrepareConfig, prepare
from esolm_megatron.launch.record import Record, newest_step, starts
from esolm_megatron.train.ending import read

ROOT = Path(__file__).parents[2]
TREE = {
    "model": {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "seq_length": 32},
    "objective": {"alpha_0": 0.5},
    "train": {
        "num_steps": 40, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32", "log_every_steps": 1,
        "device": "cpu",
    },
    "optim": {"lr": 1e-2, "warmup_steps": 2, "ema_decay": 0.9},
    "evaluate": {"every_steps": 0},
    "checkpoint": {"every_steps": 10, "keep_last": 10},
}  # fmt: skip
CLUSTER = {
    "partition": "main", "nodes": 2, "tasks_per_node": 1, "time_h": 0.5, "signal_s": 60, "health": "off", "max_restarts": 2,
    "restart_delay_s": 0, "env": {"TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"},
}  # fmt: skip


@pytest.fixture(scope="session")
def slurm():
    """Munge, slurmctld and two slurmd of our own."""
    if lack := missing():
        pytest.skip(f"SLURM cannot run here: {lack}")
    # pytest's own folders are closed to munge
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, MiniSlurm(folder) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    """Shards of a part of this project's own source."""
    folder = tmp_path_factory.mktemp("data") / "tokens"
    source = str(ROOT / "esolm_megatron" / "train")
    prepare(PrepareConfig(inputs=(source,), output=str(folder), block_tokens=4096, num_processes=1), progress=False)
    return folder


class Login:
    """A user on the login node, in a folder of his own."""

    def __init__(self, slurm, tokens, folder):
        self.slurm, self.tokens, self.folder, self.begun = slurm, tokens, folder, time.monotonic()
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.env = (slurm.env if slurm else os.environ) | {"PYTHONPATH": path, "COLUMNS": "200"}

    def esolm(self, *words):
        """(exit status, what it said)"""
        command = [sys.executable, "-m", "esolm_megatron", *map(str, words)]
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    def files(self, cluster=(), **sections):
        """run.yaml and cluster.yaml."""
        tree = {"runs_dir": "runs", "data": {"path": str(self.tokens)}, **{k: dict(v) for k, v in TREE.items()}}
        name = sections.pop("name", "run")
        for section, values in sections.items():
            tree[section] = {**tree.get(section, {}), **values}
        (self.folder / "run.yaml").write_text(yaml.safe_dump({"name": name, **tree}))
        (self.folder / "cluster.yaml").write_text(yaml.safe_dump({**CLUSTER, **dict(cluster)}))
        return "run.yaml", "--on", "cluster.yaml"

    def launch(self, cluster=(), flags=(), **sections):
        """A submitted run: (job ids, run folder)"""
        code, text = self.esolm("launch", *self.files(cluster, **sections), "--json", *flags)
        assert code == 0, text
        found = json.loads(text)
        return found["jobs"], Path(found["runs"][0])

    def await_step(self, run, step, seconds=120):
        """Until `step` is logged; 0: until the run has started."""
        self.until(lambda: self.reached(run) >= step, seconds, run)

    @staticmethod
    def reached(run):
        path = run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return max([json.loads(line)["step"] for line in lines if line.endswith("\n")], default=0)

    def await_end(self, run, how="finished", seconds=180):
        """Until ended.json says `how` and no job of the run is left."""
        self.until(lambda: (read(run) or {}).get("how") == how, seconds, run)
        self.until(lambda: not self.slurm.run("squeue", "-h", "-t", "R,PD,CG").strip(), 40, run)

    def until(self, true, seconds, run):
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline:
                logs = [f"== {p}\n{p.read_text()[-3000:]}" for p in sorted(run.glob("logs/**/*.txt"))]
                queue = self.slurm.run("squeue") if self.slurm else ""
                raise AssertionError("\n".join([f"not within {seconds} s", queue, str(read(run)), *logs]))
            time.sleep(0.2)

    @staticmethod
    def starts(run):
        return starts(Record(run).events())

    @staticmethod
    def losses(run):
        """Loss by step; fails where a step was logged twice."""
        lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
        assert len({x["step"] for x in lines}) == len(lines)
        return {x["step"]: x["loss"] for x in lines}

    newest_step = staticmethod(newest_step)


@pytest.fixture
def login(slurm, tokens, tmp_path, request, capsys):
    """A login node; says how long its test took, for docs/operations.md."""
    made = Login(slurm, tokens, tmp_path)
    yield made
    for job in {line.split("_")[0] for line in slurm.run("squeue", "-h", "-o", "%i").split()}:
        slurm.run("scancel", job)
    made.until(lambda: not slurm.run("squeue", "-h").strip(), 30, tmp_path)
    with capsys.disabled():
        print(f"\n  {request.node.name}: {time.monotonic() - made.begun:.1f} s")
