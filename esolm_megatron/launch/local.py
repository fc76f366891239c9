"""Starts the processes of a run on this machine.

torchrun would do, but it kills its workers on the signals that ask a run to save and stop, and buries a worker's one-line
error under its own traceback.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from esolm_megatron.train.ending import Ending

GRACE_S = 5.0
HANG_GRACE_S = 15.0
"""After a hang: a rank that holds Python's lock writes its stacks a little later than those that wait for it."""


def run_local(
    command: Sequence[str],
    num_processes: int,
    *,
    env: Mapping[str, str] | None = None,
    output: Callable[[int], Path] | None = None,
    on_failure: Callable[[int, int], None] | None = None,
    on_signal: Callable[[int], None] | None = None,
    limit_s: float | None = None,
) -> int:
    """Exit status of `command` run as ranks 0 to num_processes - 1, by `verdict`; 0 only if all of them are.

    SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 are passed on. When a rank fails, the others are ended.

    env: more of the environment. output: the file that a rank's words go to. on_failure: called with rank and return code
    of the first that fails. on_signal: called with each signal that comes. limit_s: after it, all are ended.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = str(max(1, (os.cpu_count() or 1) // num_processes))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_processes), **(env or {})}
    ranks: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: Any) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)
        if on_signal is not None:
            on_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, pass_on)
    for rank in range(num_processes):
        mine = {"OMP_NUM_THREADS": threads, **os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with contextlib.ExitStack() as open_files:
            file = None if output is None else open_files.enter_context(output(rank).open("ab"))
            files = {"stdout": file, "stderr": file}
            # its own group: a terminal's Ctrl-C reaches only us
            ranks.append(
                subprocess.Popen(command, env=mine, process_group=0, preexec_fn=_die_with(os.getpid()), **files)  # type: ignore[call-overload]  # noqa: PLW1509
            )
    return _wait(ranks, on_failure, None if limit_s is None else time.monotonic() + limit_s)


def _die_with(parent: int) -> Callable[[], None] | None:
    """For a new process: the kernel kills it when its parent dies, even by SIGKILL; None where there is no such thing.

    A rank that outlived us would go on writing into the run folder beside the ranks that are started next.
    """
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl

    def arm() -> None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

    return arm


def _wait(
    ranks: Sequence[subprocess.Popen[bytes]], on_failure: Callable[[int, int], None] | None, deadline: float | None
) -> int:
    ended: dict[int, int] = {}  # in the order of time: what comes after the first failure is mostly its consequence
    failed = False
    while True:
        for rank, process in enumerate(ranks):
            code = process.poll()
            if code is None or rank in ended:
                continue
            ended[rank] = 128 - code if code < 0 else code
            if code not in _IN_ORDER and not failed:
                failed = True  # the others wait for the dead one in a collective; they cannot finish
                deadline = min(
                    deadline or math.inf, time.monotonic() + (HANG_GRACE_S if code == Ending.HUNG else GRACE_S)
                )
                if on_failure is not None:
                    on_failure(rank, code)
        if len(ended) == len(ranks):
            return verdict(list(ended.values()))
        if deadline is not None and time.monotonic() > deadline:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
        time.sleep(0.05)


_IN_ORDER = (Ending.FINISHED, Ending.STOPPED)


def verdict(codes: Sequence[int]) -> int:
    """The exit status of a run whose ranks ended with `codes`, in the order of time.

    The first that says why it failed; else the first that failed; else STOPPED if any was; else 0.
    """
    failed = [code for code in codes if code not in _IN_ORDER]
    said = [code for code in failed if code in set(Ending) - {Ending.FAILED}]
    return (said or failed or [max(codes)])[0]
