"""Ends a process whose run no longer moves, after writing down where it stands.

Every rank has one. What stops one rank stops all of them in their next collective, so that all of them write their stacks;
only a rank that is itself frozen by the system cannot. Where a stuck call holds Python's lock, no thread of Python runs:
there faulthandler writes the stacks, and a timer of the C library ends the process (`_CExit`).
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from esolm_megatron.config.sections import WatchdogConfig
from esolm_megatron.train.ending import Ending, mark

_MEDIAN_OF = 64
_LOCKED_S = 3.0
"""How much later than the watching thread C acts, and so only where that thread cannot; a launcher kills later still."""
_DUMPING_S = 3.0
"""What faulthandler gets for writing the stacks before the timer ends the process."""
_WRITING_S = 60.0
"""What the watching thread gets for the same, on a disk that may hang too."""


def stacks_file(run_dir: Path, rank: int) -> Path:
    """Where a rank writes its stacks."""
    return run_dir / "logs" / f"stacks_rank_{rank:05d}.txt"


class Watchdog:
    """A thread that expects `step_done` often enough; use it with `with`.

    Until the first step, and inside `slow`, slow_limit_s holds; otherwise step_factor x the median of steps, at least
    min_limit_s. When time is up: all threads' stacks into `stacks_file`, ended.json, and exit status Ending.HUNG.
    """

    def __init__(self, config: WatchdogConfig, run_dir: Path, rank: int):
        self.config, self.run_dir, self.rank = config, run_dir, rank
        self.step: int | None = None
        self.patience_s = 0.0
        """What a step may take besides: data that is far away may need so long to come, or to fail."""
        self._steps: deque[float] = deque(maxlen=_MEDIAN_OF)
        self._doing, self._since, self._limit = "start", time.monotonic(), config.slow_limit_s
        self._stacks: IO[str] | None = None
        self._exit = _CExit(Ending.HUNG)
        self._armed = float("inf")
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def run_starts(self) -> None:
        """The run folder is there: from now on stacks go into it also where Python's lock is held; before, to stderr.

        What an earlier start left in the file stays.
        """
        if not self.config.enabled:
            return
        path = stacks_file(self.run_dir, self.rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stacks = path.open("a")  # C can open no file then, so that one must be open
        self._arm()

    def step_done(self, step: int, seconds: float | None) -> None:
        """A step ended. seconds: what it took, or None where that says nothing about the next one."""
        if seconds is not None:
            self._steps.append(seconds)
        self.step = step
        self._expect("step", self.step_limit)

    @property
    def step_limit(self) -> float:
        """Seconds that the next step may take."""
        if not self._steps:
            return self.config.slow_limit_s
        return max(self.config.min_limit_s, self.config.step_factor * statistics.median(self._steps)) + self.patience_s

    @contextmanager
    def slow(self, doing: str) -> Iterator[None]:
        """What is inside may take slow_limit_s."""
        self._expect(doing, max(self.config.slow_limit_s, self.step_limit))
        yield
        self._expect("step", self.step_limit)

    def _expect(self, doing: str, limit: float) -> None:
        changed, self._doing = doing != self._doing, doing
        self._since, self._limit = time.monotonic(), limit
        # the watching thread arms C now and then, but may never run again once the lock is gone
        if changed or self._since + limit < self._armed:
            self._arm()

    def _watch(self) -> None:
        while not self._finished.wait(min(1.0, self.config.min_limit_s / 4)):
            self._arm()
            doing, waited, limit = self._doing, time.monotonic() - self._since, self._limit
            if self.config.enabled and waited > limit:
                self._end(
                    f"rank {self.rank}: {doing} after step {self.step} has taken {waited:.1f} s, allowed are {limit:.1f}"
                )

    def _arm(self) -> None:
        """Tell C to write the stacks and to end the process, unless it is told again in time."""
        if not self.config.enabled or self._finished.is_set():
            return
        self._armed = self._since + self._limit
        seconds = max(self._armed - time.monotonic(), 0.0) + _LOCKED_S
        ends_later = self._exit.arm(seconds + _DUMPING_S)
        faulthandler.dump_traceback_later(seconds, exit=not ends_later, file=self._stacks or sys.stderr)

    def _end(self, what: str) -> None:
        try:
            faulthandler.cancel_dump_traceback_later()
            self._exit.arm(_WRITING_S)
            path = stacks_file(self.run_dir, self.rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(f"{time.strftime('%F %T')} {what}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.flush()
                os.fsync(file.fileno())
            mark(self.run_dir, Ending.HUNG, self.step, what)
            sys.stderr.write(f"watchdog: {what}; stacks are in {path}\n")
            sys.stderr.flush()
        finally:  # whatever the disk does, the process must go
            os._exit(Ending.HUNG)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._finished.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._exit.disarm()
        if self._stacks is not None:
            self._stacks.close()
            path = stacks_file(self.run_dir, self.rank)
            if path.exists() and not path.stat().st_size:
                path.unlink()


class _SignalEvent(ctypes.Structure):
    """struct sigevent of Linux, as far as a call of a function in a new thread needs it."""

    _fields_ = (
        ("value", ctypes.c_int64),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("rest", ctypes.c_char * 64),
    )


class _CExit:
    """Ends this process with a status after some time, by the C library alone: it needs no lock of Python's.

    A POSIX timer whose function is `_exit` itself. faulthandler can end a process too, but only with status 1, after which a
    launcher would not start the run again. Where there are no such timers, `arm` says so.
    """

    _IN_A_THREAD = 2  # SIGEV_THREAD
    _MONOTONIC = 1

    def __init__(self, status: int):
        self._timer: ctypes.c_void_p | None = None
        if not sys.platform.startswith("linux") or ctypes.sizeof(ctypes.c_void_p) != 8:
            return
        self._libc = ctypes.CDLL(None)
        end = ctypes.cast(self._libc._exit, ctypes.c_void_p)
        event = _SignalEvent(value=status, notify=self._IN_A_THREAD, function=end)
        timer = ctypes.c_void_p()
        try:
            failed = self._libc.timer_create(self._MONOTONIC, ctypes.byref(event), ctypes.byref(timer))
        except AttributeError:  # before glibc 2.34 it was in a library of its own
            return
        if not failed:
            self._timer = timer

    def arm(self, seconds: float) -> bool:
        """End the process that much later, and not before; False where that cannot be done."""
        if self._timer is None:
            return False
        whole = int(seconds)
        when = (ctypes.c_long * 4)(0, 0, whole, int((seconds - whole) * 1e9))  # struct itimerspec: no period
        return self._libc.timer_settime(self._timer, 0, ctypes.byref(when), None) == 0

    def disarm(self) -> None:
        """Do not end it."""
        self.arm(0)
