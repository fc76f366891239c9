"""Ends a process whose run no longer moves, after writing down where it stands.

Every rank has one. What stops one rank stops all of them in their next collective, so that all of them write their stacks;
only a rank that is itself frozen by the system cannot.
"""

from __future__ import annotations

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
from types import TracebackType

from esolm_megatron.sections import WatchdogConfig
from esolm_megatron.train.ending import Ending, mark

_MEDIAN_OF = 64
_GIL_HELD_S = 30.0


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
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

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
        self._doing, self._since, self._limit = doing, time.monotonic(), limit

    def _watch(self) -> None:
        while not self._finished.wait(min(1.0, self.config.min_limit_s / 4)):
            if self.config.enabled:
                # a thread of C: it fires even where a stuck library holds Python's lock, so that nothing here runs
                faulthandler.dump_traceback_later(self._limit + _GIL_HELD_S, exit=True)
            doing, waited, limit = self._doing, time.monotonic() - self._since, self._limit
            if self.config.enabled and waited > limit:
                self._end(
                    f"rank {self.rank}: {doing} after step {self.step} has taken {waited:.1f} s, allowed are {limit:.1f}"
                )

    def _end(self, what: str) -> None:
        try:
            path = stacks_file(self.run_dir, self.rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                file.write(f"{what}\n\n")
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._finished.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
