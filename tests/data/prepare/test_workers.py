"""The processes of `prepare`: what they are made of, what they tell, and what becomes of their errors."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_corpora import folder_bytes, small_config, write_documents

from esolm_megatron.data.prepare import prepare, tasks
from esolm_megatron.data.prepare.inputs import cut
from esolm_megatron.data.prepare.tasks import Task
from esolm_megatron.data.prepare.workers import workers
from esolm_megatron.errors import DataError

SCRIPT = """
import sys, threading, time
from pathlib import Path
from small_corpora import small_config
from esolm_megatron.data.prepare import prepare
print("started")
lock = threading.Lock()
threading.Thread(target=lambda: lock.acquire() and time.sleep(1000), daemon=True).start()
prepare(small_config(Path(sys.argv[1]), Path(sys.argv[2]), num_processes=2), progress=False)
"""


def python(*words):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    done = subprocess.run(
        [sys.executable, *map(str, words)], env=environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_program_with_threads_and_without_a_guard_is_not_run_again(tmp_path):
    write_documents(tmp_path / "text.jsonl", 541)
    (tmp_path / "run.py").write_text(SCRIPT)
    assert python(tmp_path / "run.py", tmp_path / "text.jsonl", tmp_path / "out") == "started\n"
    prepare(small_config(tmp_path / "text.jsonl", tmp_path / "whole"), progress=False)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("module", "left_out"),
    [
        (
            "workers",
            "torch pydantic yaml rich tokenizers tiktoken esolm_megatron.config.tree esolm_megatron.config.sections",
        ),
        (
            "preparation",
            "torch yaml rich tokenizers tiktoken esolm_megatron.config.tree esolm_megatron.config.sections",
        ),
    ],
)
def test_what_starts_often_imports_little(module, left_out):
    code = f"import sys, esolm_megatron.data.prepare.{module}; print(*(m for m in '{left_out}'.split() if m in sys.modules))"
    assert python("-c", code) == "\n"


def as_tasks(path, size):
    return [Task(number, (piece,)) for number, piece in enumerate(cut(path, size))]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_all_tasks_are_done_and_told(tmp_path, count):
    write_documents(tmp_path / "text.jsonl", 541)
    (tmp_path / "work").mkdir()
    todo, seen = as_tasks(tmp_path / "text.jsonl", 3001), []
    rules = tasks.Rules.of(small_config(tmp_path / "text.jsonl", tmp_path))
    with workers(count) as run:
        for _ in range(2):
            seen.append(0)
            run(Scan(rules, tmp_path), todo, seen.append)
    assert all(tasks.scan_path(tmp_path, task).exists() for task in todo)
    assert len(todo) > 9
    middle = seen.index(0, 1)
    for told in (seen[:middle], seen[middle:]):
        assert told == sorted(told)
        assert told[-1] == sum(task.bytes for task in todo)


class Scan:
    """Work that other processes can be sent."""

    def __init__(self, rules, folder):
        self.rules, self.folder = rules, folder

    def __call__(self, task, advance):
        tasks.scan(task, advance, self.rules, self.folder)


class Odd(Exception):
    """An error that cannot be sent: it wants two words and passes on one."""

    def __init__(self, one, two):
        super().__init__(one + two)


class Fail:
    def __init__(self, error):
        self.error = error

    def __call__(self, task, advance):
        if task.number == 3:
            raise self.error if self.error is not None else Odd("odd", "error")


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (DataError("cut short"), DataError, "^cut short"),
        (OSError(28, "No space left"), OSError, "No space left"),
        (EOFError("of a file"), EOFError, "^of a file"),
        (None, RuntimeError, "odderror"),
    ],
)
def test_an_error_of_a_task_is_that_of_the_run(tmp_path, error, kind, text):
    """Also one that looks like that of a connection: only a process that is gone is called dead."""
    write_documents(tmp_path / "text.jsonl", 541)
    with pytest.raises(kind, match=text) as found, workers(2) as run:
        run(Fail(error), as_tasks(tmp_path / "text.jsonl", 3001), lambda count: None)
    if error is not None:
        assert "in __call__" in found.value.__notes__[0]
        assert getattr(found.value, "errno", None) == getattr(error, "errno", None)


class Sleep:
    """Work that takes longer than a test may; with `fails`, the first task fails once all are under way."""

    def __init__(self, folder, fails):
        self.folder, self.fails = folder, fails

    def __call__(self, task, advance):
        (self.folder / f"pid-{os.getpid()}").touch()
        until(lambda: len(pids(self.folder)) == 2)
        if self.fails and task.number == 0:
            raise DataError("enough")
        time.sleep(1000)


def pids(folder):
    return [int(path.name.removeprefix("pid-")) for path in folder.glob("pid-*")]


def alive(folder):
    """Those of the processes that still run; what has ended and is not yet waited for does not."""
    found = []
    for pid in pids(folder):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
    return found


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_error_ends_processes_that_are_busy(tmp_path):
    write_documents(tmp_path / "text.jsonl", 541)
    with pytest.raises(DataError, match="enough"), workers(2) as run:
        run(Sleep(tmp_path, True), as_tasks(tmp_path / "text.jsonl", 3001), lambda count: None)
    assert len(pids(tmp_path)) == 2
    assert not alive(tmp_path)


BUSY = """
import sys
import time
from pathlib import Path
from test_workers import Sleep, as_tasks, workers
folder = Path(sys.argv[1])
with workers(2) as run:
    run(Sleep(folder, False), as_tasks(folder / "text.jsonl", 3001), lambda count: None)
"""


def test_busy_processes_end_with_the_one_that_started_them(tmp_path):
    write_documents(tmp_path / "text.jsonl", 541)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", BUSY, str(tmp_path)], env=environment)
    until(lambda: len(alive(tmp_path)) == 2)
    process.kill()
    process.wait()
    until(lambda: not alive(tmp_path), 20)
