"""Starts the processes of a run on this machine.

torchrun would do, but it kills its workers on the signals that ask a run to save and stop, and buries a worker's one-line
error under its own traceback.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from typing import Any

GRACE_S = 5.0


def run_local(command: Sequence[str], num_processes: int) -> int:
    """Exit status of `command` run as ranks 0 to num_processes - 1; 0 only if all of them are.

    SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 are passed on. When a rank fails, the others are ended.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = str(max(1, (os.cpu_count() or 1) // num_processes))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_processes)}
    ranks: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: Any) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, pass_on)
    for rank in range(num_processes):
        env = {"OMP_NUM_THREADS": threads, **os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(subprocess.Popen(command, env=env, process_group=0))  # a terminal's Ctrl-C reaches only us
    return _wait(ranks)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    deadline = None
    while True:
        codes = [process.poll() for process in ranks]
        failed = [code for code in codes if code]
        if None not in codes:
            return 0 if not failed else next((128 - code if code < 0 else code) for code in failed)
        if failed and deadline is None:  # the others wait for the dead one in a collective; they cannot finish
            deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
        time.sleep(0.05)
