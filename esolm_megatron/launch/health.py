"""What each process of a job finds out about its node before training: `python -m esolm_megatron.launch.health LAUNCH`.

Each writes what it found before it meets the others, so that a node which hangs there, or never came, is known by name.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from esolm_megatron.config import load
from esolm_megatron.launch.rank import take_place
from esolm_megatron.launch.site import ClusterConfig, ask, load_cluster, there
from esolm_megatron.train.ending import write_json

_GIB = 2**30


def report_file(logs: Path, rank: int) -> Path:
    """What a rank found on its node."""
    return logs / "health" / f"rank_{rank:05d}.json"


def together_file(logs: Path) -> Path:
    """What all ranks found together."""
    return logs / "health" / "together.json"


def gpu_problems(expected: int) -> list[str]:
    """What nvidia-smi says against this node: fewer GPUs than asked for, uncorrected memory errors, GPUs in use."""
    fields = "index,ecc.errors.uncorrected.volatile.total,memory.used,memory.total"
    if not there("nvidia-smi"):
        return ["nvidia-smi is not there"]
    status, text = ask("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", timeout_s=60)
    if status:
        return [f"nvidia-smi fails: {text.strip()[-200:]}"]
    lines = [[part.strip() for part in line.split(",")] for line in text.strip().splitlines()]
    out = [f"{len(lines)} GPUs, {expected} are expected"] if len(lines) < expected else []
    for index, errors, used, total in lines:
        if errors.isdigit() and int(errors):
            out.append(f"GPU {index} has {errors} uncorrected memory errors")
        if used.isdigit() and total.isdigit() and int(used) > 0.1 * int(total):
            out.append(f"GPU {index}: {used} of {total} MiB are in use by someone else")
    return out


def free_memory_gb() -> float:
    """Memory of this node that is free, in GiB; inf where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        return int(lines["MemAvailable"].split()[0]) / 2**20
    except (OSError, KeyError):
        return float("inf")


def node_problems(cluster: ClusterConfig, run_dir: Path, *, on_gpus: bool) -> list[str]:
    """What is wrong with this node, a line each."""
    out = gpu_problems(cluster.gpus_per_node) if on_gpus and cluster.gpus_per_node else []
    memory = free_memory_gb()
    if memory < cluster.min_memory_gb:
        out.append(f"{memory:.1f} GiB of memory are free, min_memory_gb = {cluster.min_memory_gb:g}")
    try:
        room = shutil.disk_usage(run_dir).free / _GIB
        if room < cluster.min_disk_gb:
            out.append(f"{room:.1f} GiB are free in {run_dir}, min_disk_gb = {cluster.min_disk_gb:g}")
        trial = run_dir / f".health_{os.uname().nodename}_{os.getpid()}"
        trial.write_bytes(b"x")
        trial.unlink()
    except OSError as error:
        out.append(f"cannot write into {run_dir}: {error.strerror}")
    return out


def main(folder: Path) -> int:
    """Write what this rank finds; 1 if its node must not be used."""
    rank, logs, run_dir = take_place(), Path(os.environ["ESOLM_LOGS"]), folder.parents[1]
    cluster = load_cluster(folder / "cluster.yaml")
    facts: dict[str, Any] = {"rank": rank, "host": os.uname().nodename, "time": time.time(), "problems": []}
    if os.environ["LOCAL_RANK"] == "0":
        on_gpus = load(folder / "config.yaml").train.device != "cpu"
        facts["problems"] = node_problems(cluster, run_dir, on_gpus=on_gpus)
    write_json(report_file(logs, rank), facts)
    if facts["problems"]:
        sys.stderr.write("\n".join(facts["problems"]) + "\n")
        return 1
    if cluster.health == "all":
        from esolm_megatron.doctor.cluster import examine

        config = load(folder / "config.yaml")
        report = examine(run_dir, megabytes=8, timeout_s=cluster.health_limit_s, config=config)
        if rank == 0:
            bad = sorted({r.host for r in report.ranks if r.problems})
            slow = report.slow
            write_json(together_file(logs), {"bad": bad, "wrong": report.wrong, "slow": slow, **asdict(report)})
        return report.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
