"""Processes that do tasks: started anew, told through a connection what to do, gone with the process that started them.

Each runs `main` below in a fresh interpreter that imports what a task needs and no more: not the program that called
`prepare`, which needs no guard against being run twice and may have threads. What all tasks of a phase share, as the
tokenizer, is sent to a process once.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, cast

from esolm_megatron.data.prepare.tasks import Advance, Task
from esolm_megatron.errors import DataError

Work = Callable[[Task, Advance], None]

_TELL_S = 0.2
_START = "import sys; sys.path[:] = {!r}; from esolm_megatron.data.prepare.workers import main; main({})"


@contextlib.contextmanager
def workers(count: int) -> Iterator[Callable[[Work, list[Task], Advance], None]]:
    """A function that does work with tasks, in this process or in `count`, the same for all calls.

    It tells how many bytes are done. Whatever ends this process, or the block, ends the others at once.
    """
    if count < 2:
        yield _run_here
        return
    with contextlib.ExitStack() as stack:
        yield partial(_run_in, [stack.enter_context(_started()) for _ in range(count)])


@contextlib.contextmanager
def _started() -> Iterator[Connection]:
    """The connection to a process of its own, which ends when its standard input does."""
    ours, theirs = Pipe()
    command = [sys.executable, "-c", _START.format(sys.path, theirs.fileno())]
    with ours, subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[theirs.fileno()]):
        theirs.close()
        yield ours


def _run_here(work: Work, todo: list[Task], shown: Advance) -> None:
    finished = 0
    for task in todo:
        work(task, lambda done, before=finished: shown(before + done))  # type: ignore[misc]
        finished += task.bytes
        shown(finished)


def _run_in(connections: list[Connection], work: Work, todo: list[Task], shown: Advance) -> None:
    left, finished = iter(todo), 0
    doing = dict(zip(connections, left, strict=False))
    under_way = dict.fromkeys(doing, 0)
    shared = pickle.dumps(work)
    for connection, task in doing.items():
        _talk(connection.send_bytes, shared)
        _talk(connection.send, task)
    while doing:
        for connection in cast("list[Connection]", wait(list(doing))):
            said = _talk(connection.recv)
            if isinstance(said, Exception):
                raise said
            if said is None:
                finished += doing.pop(connection).bytes
                if (following := next(left, None)) is not None:
                    doing[connection] = following
                    _talk(connection.send, following)
            under_way[connection] = said or 0
        shown(finished + sum(under_way.values()))


def _talk(act: Callable[..., Any], *said: Any) -> Any:
    try:
        return act(*said)
    except (EOFError, ConnectionError) as error:
        raise DataError(
            "a process of prepare died, as for want of memory; start it again, it continues; if it dies again, "
            "lower task_bytes or num_processes"
        ) from error


def main(handle: int) -> None:
    """Do what comes through a connection, for ever: work, then tasks to do it with."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_input, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    connection, work = Connection(handle), cast(Work, None)
    with contextlib.suppress(EOFError, ConnectionError):  # then the other one is dead, or done
        while True:
            said = connection.recv()
            if isinstance(said, Task):
                connection.send(_outcome(work, said, connection))
            else:
                work = said


def _end_with_input() -> None:
    """End this process when the one that started it has, however: the next run must not meet its writes."""
    os.read(0, 1)
    os._exit(1)


def _outcome(work: Work, task: Task, connection: Connection) -> Exception | None:
    """None, or what went wrong, in a form that can be sent; now and then it is told how far the task is."""
    told = time.monotonic()

    def advance(done: int) -> None:
        nonlocal told
        if time.monotonic() > told + _TELL_S:
            connection.send(done)
            told = time.monotonic()

    try:
        work(task, advance)
        return None
    except Exception as error:
        story = traceback.format_exc()
        error.add_note(f"in a process of prepare:\n{story}")
        with contextlib.suppress(Exception):
            return pickle.loads(pickle.dumps(error))
        return RuntimeError(story)
