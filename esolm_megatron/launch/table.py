"""What `esolm jobs` knows, from squeue and the run folders; sacct is not asked. No torch."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from esolm_megatron.config import UserError
from esolm_megatron.launch.record import Record, newest_step, starts
from esolm_megatron.launch.site import ask
from esolm_megatron.launch.slurm_queue import OVER, jobs_of, queue
from esolm_megatron.launch.verdict import dead_ranks, failures
from esolm_megatron.train import ending

_TAIL = 65536


@dataclass(frozen=True)
class Row:
    """A run. restarts: how often for each reason; failed: the last words of each rank that failed in the newest start."""

    run: str
    job: str
    state: str
    where: str
    step: int
    saved: int
    loss: float | None
    tokens_per_s: float | None
    goodput: float | None
    restarts: dict[str, int]
    detail: str
    failed: list[str]
    logs: str


def run_folders(folder: Path) -> list[Path]:
    """Launched runs: `folder` itself, or those in it.

    Raises:
        UserError: there are none.
    """
    found = [p for p in (folder, *sorted(folder.glob("*"))) if (p / "launches").is_dir()]
    if not found:
        raise UserError(f"{folder}: no run in it was started by esolm launch")
    return found


def newest_metrics(run_dir: Path) -> dict[str, Any]:
    """The last line of metrics.jsonl that has a loss."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "loss" in found:
            return found
    return {}


def last_line(path: Path) -> str:
    """The last line of a log that says something."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def failed_ranks(logs: Path) -> list[str]:
    """A line for each rank that failed in one start: who, where, and its last words."""
    out = {w["rank"]: f"rank {w['rank']} on {w['host']}: {w['error'].splitlines()[0]}" for w in failures(logs)}
    for node, ranks, what in dead_ranks(logs):
        if ranks.isdigit() and int(ranks) not in out:
            words = last_line(logs / f"rank_{int(ranks):05d}.txt")
            out[int(ranks)] = f"rank {ranks} on {node}: {what}; its log ends: {words}"
    return [out[rank] for rank in sorted(out)]


def row(run_dir: Path, waiting: dict[str, dict[str, str]]) -> Row:
    """What is known of one run; waiting: from `queue`."""
    jobs = jobs_of(run_dir)
    live = [job for job in jobs if job in waiting and waiting[job]["state"] not in OVER]
    job = live[0] if live else (jobs[-1] if jobs else "local")
    found, marker = waiting.get(job, {}), ending.read(run_dir) or {}
    listed, metrics = starts(Record(run_dir).events()), newest_metrics(run_dir)
    how = marker.get("how", "not started")
    if live:
        state = found["state"].lower()
    else:
        state = "gone" if how == "running" and job != "local" else how
    again = Counter(start["how"] for start in listed if start["again"])
    logs = run_dir / "logs" / listed[-1]["attempt"] if listed else run_dir / "logs"
    newest = next((s for s in reversed(listed) if s["how"] not in (None, "stopped", "finished")), None)
    reason = found.get("reason", "") if state == "pending" else ""
    return Row(
        run=run_dir.name,
        job=job,
        state=state,
        where=found.get("nodes", "") or (",".join(listed[-1]["nodes"]) if listed else ""),
        step=metrics.get("step", 0),
        saved=newest_step(run_dir),
        loss=metrics.get("loss"),
        tokens_per_s=metrics.get("tokens_per_s"),
        goodput=metrics.get("goodput"),
        restarts=dict(again),
        detail=reason or marker.get("detail", "") or "",
        failed=failed_ranks(run_dir / "logs" / newest["attempt"]) if newest else [],
        logs=str(logs),
    )


def rows(folder: Path) -> list[Row]:
    """All launched runs in a folder."""
    waiting = queue()
    return [row(run, waiting) for run in run_folders(folder)]


def as_dict(found: list[Row]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(each) for each in found]


def as_table(found: list[Row]) -> Table:
    """For a terminal."""
    table = Table(
        "run", "job", "state", "step", "saved", "loss", "tok/s", "goodput", "restarts", "what, and where logs are"
    )
    for each in found:
        restarts = ", ".join(f"{how} {count}" for how, count in each.restarts.items()) or "-"
        numbers = (
            f"{each.loss:.4f}" if each.loss is not None else "-",
            f"{each.tokens_per_s:,.0f}" if each.tokens_per_s is not None else "-",
            f"{each.goodput:.0%}" if each.goodput is not None else "-",
        )
        text = "\n".join(filter(None, [each.detail, *each.failed, each.logs]))
        cells = (each.run, each.job, each.state, str(each.step), str(each.saved), *numbers, restarts, text)
        table.add_row(*map(Text, cells))  # words of logs are no markup
    return table


def stop(run_dir: Path) -> str:
    """Ask a run to save and end for good; what was done."""
    waiting = queue()
    run_folders(run_dir)
    (run_dir / "stop_requested").touch()
    done = []
    for job in jobs_of(run_dir):
        if job not in waiting or waiting[job]["state"] in OVER:
            continue
        if waiting[job]["state"] == "RUNNING":
            status, text = ask("scancel", "--batch", "--signal=USR1", waiting[job]["id"])
            done.append(f"job {job} saves and ends" if status == 0 else f"job {job}: {text.strip()}")
        else:
            status, text = ask("scancel", waiting[job]["id"])
            done.append(f"job {job} is cancelled" if status == 0 else f"job {job}: {text.strip()}")
    return "; ".join(done) or "no job of this run is in the queue"


def requeue(run_dir: Path) -> str:
    """Start the newest job of a run again: a running one saves first. What was done.

    Raises:
        UserError: SLURM does not know its jobs any more, or refuses.
    """
    run_folders(run_dir)
    waiting = queue()
    known = [job for job in jobs_of(run_dir) if job in waiting]
    if not known:
        raise UserError(f"{run_dir}: SLURM knows none of its jobs any more; start it again with esolm launch --resume")
    (run_dir / "stop_requested").unlink(missing_ok=True)
    status, text = ask("scontrol", "requeue", waiting[known[-1]]["id"])
    if status:
        raise UserError(f"{run_dir}: {text.strip()}; start it again with esolm launch --resume")
    return f"job {known[-1]} is requeued"


def logs(run_dir: Path, lines: int = 20) -> str:
    """Where the logs of the newest start are, and the ends of its job's and its failed ranks' logs."""
    run_folders(run_dir)
    listed = starts(Record(run_dir).events())
    if not listed:
        return f"{run_dir}: has not started yet"
    folder = run_dir / "logs" / listed[-1]["attempt"]
    out = []
    names = [folder / "job.txt", folder / "rank.txt", *sorted(folder.glob("rank_*.txt"))[:1]]
    names += [folder / f"rank_{w['rank']:05d}.txt" for w in failures(folder)]
    for path in dict.fromkeys(names):
        if path.exists():
            text = path.read_text(errors="replace").splitlines()[-lines:]
            out += [f"== {path}", *text, ""]
    return "\n".join(out)
