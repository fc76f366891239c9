"""What the parts of a launched run write down for each other. No torch.

RUN/
launches/001/     one for each `esolm launch`: config.yaml cluster.yaml launch.json revision.txt changes.diff
packages.txt script.sh code/ (the snapshot that the job runs)
jobs.jsonl        one line for each start of the job, and for how it ended
owner.json        the start that may write into the run folder
logs/JOB.COUNT/   each start's own: job, ranks, srun, health
stop_requested    `esolm jobs stop` was here: do not start again
ended.json        see train/ending.py
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esolm_megatron.train.ending import Ending, write_json

_STEP = re.compile(r"step_(\d+)")


def newest_step(run_dir: Path) -> int:
    """The newest whole checkpoint, as its folder says; 0 where there is none. Hashes are not checked."""
    found = [0]
    for folder in (run_dir / "checkpoints").glob("step_*"):
        name = _STEP.fullmatch(folder.name)
        if name and (folder / "manifest.json").exists():
            found.append(int(name[1]))
    return max(found)


def failure_file(logs: Path, rank: int) -> Path:
    """Where a rank of one start says why it failed."""
    return logs / f"failed_rank_{rank:05d}.json"


@dataclass(frozen=True)
class Record:
    """jobs.jsonl and owner.json of a run."""

    run_dir: Path

    def write(self, event: str, **values: Any) -> None:
        """Add one line: one write, so that lines of two processes do not mix."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values}) + "\n"
        file = os.open(self.run_dir / "jobs.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def events(self, launch: str | None = None) -> list[dict[str, Any]]:
        """All lines, or those of one launch; a line that was cut by a crash is left out."""
        path, out = self.run_dir / "jobs.jsonl", []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                out.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return [event for event in out if launch is None or event.get("launch") == launch]

    def claim(self, attempt: str) -> None:
        """From now on only the processes of `attempt` may write."""
        write_json(self.run_dir / "owner.json", {"attempt": attempt})

    def owner(self) -> str | None:
        """The start that may write; None before the first, and where the disk does not answer."""
        try:
            return str(json.loads((self.run_dir / "owner.json").read_text())["attempt"])
        except OSError:
            return None


def starts(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every start, with what is known of its end: how, detail, again; how is `lost` where it never said."""
    out: dict[str, dict[str, Any]] = {}
    for event in events:
        if event["event"] == "start":
            out[event["attempt"]] = {**event, "how": None, "again": None, "told": False}
        elif event["attempt"] in out:
            found = out[event["attempt"]]
            if event["event"] == "end":
                found.update({k: event.get(k) for k in ("how", "detail", "again", "exclude")}, ended=event["time"])
            elif event["event"] == "signal":
                found["told"] = True
    listed = list(out.values())
    for earlier in listed[:-1]:  # SLURM started the job again, and the one before had no time to say anything
        if earlier["how"] is None:
            earlier.update(how="stopped" if earlier["told"] else "lost", again=True, detail="ended by SLURM")
    return listed


def fruitless(listed: list[dict[str, Any]], step: int) -> int:
    """Failed starts in a row since the newest checkpoint became that of `step`.

    Preemptions and time limits do not count, nor does what came before a person started the run again.
    """
    count = 0
    for start in reversed(listed):
        if start["step"] != step or start["again"] is False:
            break
        count += start["how"] not in ("stopped", "finished")
    return count


@dataclass(frozen=True)
class Cause:
    """How a start ended. nodes: machines to leave out from now on."""

    ending: Ending
    detail: str
    nodes: tuple[str, ...] = ()
    hopeless: bool = False
    """A restart would meet the same."""

    @property
    def how(self) -> str:
        """The word for it."""
        return self.ending.name.lower()
