"""How a run ends: exit status of every process, and `ended.json` in the run folder. No torch.

    code  how          start it again?
    0     finished     no: the last step is saved
    1     failed       after a look at the log: an error that was not foreseen, or a full disk
    2     bad_config   after mending what was said; nothing was started
    75    stopped      yes: a signal asked for it, and the step is saved (EX_TEMPFAIL: try again later)
    80    hung         yes: the watchdog ended it; logs/stacks_rank_*.txt in the run folder say where each rank was
    81    bad_numbers  no: it went back to earlier checkpoints as often as allowed; report.json says what was seen
    82    corrupted    yes, but without the machine that is named: a rank's weights or losses differ from its replicas'
    83    killed       yes: a rank was killed from outside; a launcher saw which, and on which machine
    84    unhealthy    yes, but without the machine that is named: the health check before training failed
    128+n              yes: killed by signal n, or a second signal came while stopping

Exit codes get lost between ranks, launchers and schedulers; the file does not. It says `running` while the run does, so a
run that is gone and still says `running` was killed.
"""

from __future__ import annotations

import json
import os
import signal
import time
from enum import IntEnum
from pathlib import Path
from typing import Any


class Ending(IntEnum):
    """Exit status of a run's processes."""

    FINISHED = 0
    FAILED = 1
    BAD_CONFIG = 2
    STOPPED = 75
    HUNG = 80
    BAD_NUMBERS = 81
    CORRUPTED = 82
    KILLED = 83
    UNHEALTHY = 84

    @property
    def restart(self) -> bool:
        """Whether a launcher should start the run again by itself."""
        return self in {Ending.STOPPED, Ending.HUNG, Ending.CORRUPTED, Ending.KILLED, Ending.UNHEALTHY}


MARKER = "ended.json"
LOCKED = "a call that holds Python's lock did not return; logs/stacks_rank_*.txt in the run folder say which"
"""Detail of a hang after which no rank could write MARKER itself."""


def write_json(path: Path, tree: Any) -> None:
    """Replace a small JSON file in one go, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}")
    new.write_text(json.dumps(tree, indent=1) + "\n")
    os.replace(new, path)


def mark_running(run_dir: Path, step: int) -> None:
    """Say that the run goes on from `step`."""
    tree = {"how": "running", "exit_code": None, "restart": None, "step": step}
    write_json(run_dir / MARKER, {**tree, "time": time.time()})


def mark(run_dir: Path, ending: Ending, step: int | None, detail: str = "") -> None:
    """Say how the run ended."""
    tree = {"how": ending.name.lower(), "exit_code": int(ending), "restart": ending.restart, "step": step}
    write_json(run_dir / MARKER, {**tree, "detail": detail, "time": time.time()})


def read(run_dir: Path) -> dict[str, Any] | None:
    """What the marker says; None before the first start."""
    path = run_dir / MARKER
    return json.loads(path.read_text()) if path.exists() else None


class StopRequest:
    """Remembers that a signal asked the run to stop; a second one ends the process at once.

    Not so in a job of SLURM, which sends its signals twice and kills what does not end in time.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self.signal is not None and "SLURM_JOB_ID" not in os.environ:
            os._exit(128 + number)
        self.signal = number
