"""Which jobs SLURM still knows, and which of them are a run's. No torch."""

from __future__ import annotations

import json
from pathlib import Path

from esolm_megatron.config import UserError
from esolm_megatron.launch.site import ask, there

OVER = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")


def queue() -> dict[str, dict[str, str]]:
    """state, reason, nodes and raw id of each job that SLURM still knows, by the id that squeue shows."""
    status, text = ask("squeue", "-h", "-r", "-t", "all", "-o", "%i|%A|%T|%r|%N") if there("squeue") else (1, "")
    out = {}
    for line in text.splitlines() if status == 0 else []:
        shown, raw, state, reason, nodes = line.split("|", 4)
        out[shown] = {"id": raw, "state": state, "reason": reason, "nodes": nodes}
    return out


def refuse_running(run_dir: Path) -> None:
    """Raise UserError if a job of this run is in the queue."""
    waiting, known = queue(), jobs_of(run_dir)
    for job in known:
        if job in waiting and waiting[job]["state"] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED"):
            raise UserError(
                f"{run_dir}: its job {job} is {waiting[job]['state'].lower()}; stop it first: esolm jobs stop {run_dir}"
            )


def jobs_of(run_dir: Path) -> list[str]:
    """Ids of the jobs that were submitted for a run, as squeue writes them; oldest first."""
    files = sorted((run_dir / "launches").glob("*/launch.json"))
    return [job for file in files for job in json.loads(file.read_text())["jobs"]]
