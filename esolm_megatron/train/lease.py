"""One writer for a run folder: a file that says who it is, and whose time of change says that it lives.

No locks, which shared file systems often lack. The file is made by an exclusive open, and so is one beside it by whoever
takes over from a dead holder. Whether a holder on another machine lives is judged by the file system's own clock.
A start of a job that SLURM has begun again may write whoever holds the folder: it claims it in owner.json, and the
processes of the start before end by that (launch/rank.py).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from esolm_megatron.errors import ConfigError, UserError
from esolm_megatron.train.ending import Ending

NAME = "writer.json"
BEAT_S = 15.0
DEAD_S = 90.0
"""After so long without a beat a holder elsewhere is dead; its own disk may have been away for some of it."""


class Lease:
    """While entered, this process is the writer of `run_dir`.

    Raises:
        UserError: another one is, and lives; says who, and since when. ConfigError: the folder cannot be made.
    """

    def __init__(self, run_dir: Path):
        """Not entered yet."""
        self.path, self.token = run_dir / NAME, uuid.uuid4().hex
        self._done = threading.Event()

    def __enter__(self) -> Lease:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"runs_dir: {self.path.parent} cannot be made: {error.strerror}; choose another"
            ) from error
        mine = {
            "token": self.token,
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "job": os.environ.get("SLURM_JOB_ID"),
            **_self(),
        }
        while True:
            try:
                with os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "w") as file:
                    json.dump(mine, file)
                break
            except FileExistsError:
                self._take_over()
        threading.Thread(target=self._beat, name="lease", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if _read(self.path).get("token") == self.token:
            self.path.unlink(missing_ok=True)
        with suppress(OSError):  # refused before it wrote anything
            self.path.parent.rmdir()

    def _take_over(self) -> None:
        """Put the holder's file out of the way, if it is dead."""
        holder, silent = _read(self.path), self._silence_s(self.path)
        if silent is None:
            return  # it has just been given back
        if not holder and silent < BEAT_S:  # it is being written
            time.sleep(0.1)
            return
        who = f"process {holder.get('pid')} on {holder.get('host')}" + (
            f", job {holder['job']}" if holder.get("job") else ""
        )
        if not _has_claimed(self.path.parent) and not _is_dead(holder, silent):
            raise UserError(
                f"{self.path.parent}: {who} writes this run since {holder.get('since')}, with a sign of life {silent:.0f} s ago; "
                f"stop it, or choose another name=... (if its machine has died, start again after {DEAD_S:.0f} s of silence)"
            )
        with self._taking() as alone:
            if alone and _read(self.path).get("token") == holder.get("token"):  # and nobody was quicker
                self.path.unlink(missing_ok=True)
                sys.stderr.write(f"{self.path.parent}: {who} left this run without a word; taken over\n")

    @contextmanager
    def _taking(self) -> Iterator[bool]:
        """Whether this process, and no other, may judge the holder again and remove its file."""
        gate = self.path.with_name(f"{NAME}.taking")
        try:
            os.close(os.open(gate, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            with suppress(FileNotFoundError):  # who died at this very point has kept it for long
                if (self._silence_s(gate) or 0) > DEAD_S:
                    gate.unlink()
            time.sleep(0.1)
            yield False
            return
        try:
            yield True
        finally:
            gate.unlink(missing_ok=True)

    def _silence_s(self, path: Path) -> float | None:
        """Seconds since a file was touched, by the clock of the file system; None if it is not there any more."""
        probe = self.path.with_name(f"{NAME}.{self.token}")
        try:
            probe.touch()
            return probe.stat().st_mtime - path.stat().st_mtime
        except FileNotFoundError:
            return None
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._done.wait(BEAT_S):
            with suppress(OSError):  # a disk that is away for a while
                os.utime(self.path)
                found = _read(self.path).get("token")
                if found is not None and found != self.token:
                    sys.stderr.write(f"{self.path.parent}: another process has taken over this run; ending\n")
                    sys.stderr.flush()
                    os._exit(Ending.STOPPED)


def _self() -> dict[str, Any]:
    """This process, so that another one can tell whether it lives. world: the kernel and the numbers that `pid` is one of."""
    world = ""
    with suppress(OSError):
        world = f"{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='utf-8').strip()} {os.readlink('/proc/self/ns/pid')}"
    return {"host": os.uname().nodename, "pid": os.getpid(), "world": world, "begun": _begun(os.getpid())}


def _begun(pid: int) -> str | None:
    """When a process began, in the kernel's own count; None if it does not run."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] in "ZX" else after_name[19]


def _has_claimed(run_dir: Path) -> bool:
    """Whether this process is of the start that launch/job.py has given the folder to."""
    return "ESOLM_ATTEMPT" in os.environ and _read(run_dir / "owner.json").get("attempt") == os.environ["ESOLM_ATTEMPT"]


def _is_dead(holder: dict[str, Any], silent_s: float) -> bool:
    if silent_s > DEAD_S:
        return True
    here = _self()
    return (
        bool(here["world"]) and holder.get("world") == here["world"] and _begun(int(holder["pid"])) != holder["begun"]
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):  # gone, or not written yet
        return {}
