"""What `prepare` does when it, its processes, its inputs or its disk give out."""

import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_corpora import folder_bytes, small_config, stored_documents, write_documents

from esolm_megatron.config import ConfigError
from esolm_megatron.data.prepare import prepare
from esolm_megatron.data.prepare.tasks import SCAN_DTYPE, Task, mark_duplicates, scan_path
from esolm_megatron.errors import DataError

SCRIPT = """
import json, resource, sys
from pathlib import Path
from small_corpora import small_config
from esolm_megatron.config import UserError
from esolm_megatron.data.prepare import prepare
if __name__ == "__main__":
    options = json.loads(sys.argv[3])
    if limit := options.pop("file_limit", None):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        prepare(small_config(Path(sys.argv[1]), Path(sys.argv[2]), **options), progress=False)
    except UserError as error:
        sys.exit(str(error))
    print(max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""


@pytest.fixture
def start(tmp_path):
    """Starts a prepare in processes of its own."""
    (tmp_path / "run.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}

    def started(text, folder, **options):
        command = [sys.executable, str(tmp_path / "run.py"), str(text), str(folder), json.dumps(options)]
        return subprocess.Popen(
            command, start_new_session=True, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    return started


def workers(group):
    """Processes of a pool in a group, from what the system says of each."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z" and "prepare.workers" in (path / "cmdline").read_text():
                found.append(int(path.name))
        except (OSError, IndexError):
            continue
    return found


def wait_until(true, process, seconds=60):
    end = time.monotonic() + seconds
    while not (found := true()) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    return found


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path, start):
    """SIGKILL to its main process alone, or to all, at any moment; the next one starts at once beside what dies."""
    text, options, draw = tmp_path / "text.jsonl", {"task_bytes": 40_009, "num_processes": 2}, random.Random(5)
    write_documents(text, 80_021)
    prepare(small_config(text, tmp_path / "whole", task_bytes=40_009), progress=False)
    folder, kills = tmp_path / "killed", 0
    for number in range(40):
        process = start(text, folder, **options)
        try:
            process.wait(draw.uniform(0.3, 1.4) if number < 20 else 200)
            if process.returncode == 0:
                break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL) if number % 2 else os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills >= 3
    assert folder_bytes(folder) == folder_bytes(tmp_path / "whole")


def test_workers_end_with_the_process_that_started_them(tmp_path, start):
    text = tmp_path / "text.jsonl"
    write_documents(text, 20_011)
    process = start(text, tmp_path / "out", num_processes=2)
    assert wait_until(lambda: list((tmp_path / "out").glob("work/scan-*.npy")), process)
    assert workers(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 20
    while workers(process.pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not workers(process.pid)
    process.communicate()


def test_a_worker_that_dies_ends_the_run_with_a_message(tmp_path, start):
    text, folder = tmp_path / "text.jsonl", tmp_path / "out"
    write_documents(text, 10_007)
    process = start(text, folder, num_processes=2)
    assert wait_until(lambda: list(folder.glob("work/scan-*.npy")), process)
    os.kill(workers(process.pid)[0], signal.SIGKILL)
    assert "a process of prepare died, as for want of memory; start it again" in process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert not workers(process.pid)
    prepare(small_config(text, folder, num_processes=1), progress=False)
    prepare(small_config(text, tmp_path / "whole"), progress=False)
    assert folder_bytes(folder) == folder_bytes(tmp_path / "whole")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_file_that_may_not_grow_is_one_clear_error(tmp_path, start, processes):
    text, folder = tmp_path / "text.jsonl", tmp_path / "out"
    write_documents(text, 541)
    options = {"num_processes": processes, "tokenizer": "bytes", "shard_tokens": 5003, "block_tokens": 5003}
    process = start(text, folder, file_limit=9_000, **options)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert f"{folder}: cannot write: file too large (" in said
    assert "make space and start again: it continues" in said
    assert "Traceback" not in said
    assert not [*folder.glob("*.tmp.*"), *folder.glob("*/*.tmp.*")]
    prepare(small_config(text, folder, shard_tokens=5003, block_tokens=5003), progress=False)
    prepare(small_config(text, tmp_path / "whole", shard_tokens=5003, block_tokens=5003), progress=False)
    assert folder_bytes(folder) == folder_bytes(tmp_path / "whole")


def test_a_full_disk_is_one_clear_error_and_nothing_finished_is_lost(tmp_path):
    """A real file system of 1 MB, most of it taken by a file that is then deleted."""
    disk, text = tmp_path / "disk", tmp_path / "text.jsonl"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("may not mount")
    try:
        write_documents(text, 541)
        (disk / "ballast").write_bytes(bytes(850_000))
        with pytest.raises(
            DataError, match=r"out: cannot write: no space left on device \(0 MB are free\); make space"
        ):
            prepare(small_config(text, disk / "out"), progress=False)
        finished = {path: path.read_bytes() for path in (disk / "out" / "work").glob("task-*.json")}
        assert finished
        (disk / "ballast").unlink()
        summary = prepare(small_config(text, disk / "out"), progress=False)
        assert summary.tasks_resumed == len(finished)
        prepare(small_config(text, tmp_path / "whole"), progress=False)
        assert folder_bytes(disk / "out") == folder_bytes(tmp_path / "whole")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_memory_does_not_grow_with_the_input(tmp_path, start, suffix):

    peaks = []
    for megabytes in (4, 40):
        text = tmp_path / f"{megabytes}{suffix}"
        line = (json.dumps({"text": "%08d " + "word and other words, " * 90}) + "\n").encode()
        with gzip.open(text, "wb", 1) if suffix.endswith("gz") else open(text, "wb") as file:
            for number in range(megabytes * 1_000_000 // len(line)):
                file.write(line % number)
        options = {"task_bytes": 1_000_000, "block_tokens": 1 << 17, "shard_tokens": 1 << 20, "num_processes": 2}
        process = start(text, tmp_path / f"out{megabytes}{suffix}", **options)
        said, error = process.communicate(timeout=200)
        assert process.returncode == 0, error
        peaks.append(int(said) / 1024)
    assert peaks[1] < peaks[0] + 12, f"MB of memory: {peaks}"


def stdin_config(folder, **changes):
    return small_config("-", folder, **changes)


def test_standard_input_gives_what_the_file_would(tmp_path):
    write_documents(tmp_path / "stdin.jsonl", 541)
    data = (tmp_path / "stdin.jsonl").read_bytes()
    summary = prepare(stdin_config(tmp_path / "out"), progress=False, stdin=io.BytesIO(data))
    assert summary.tasks > 4
    prepare(small_config(tmp_path / "stdin.jsonl", tmp_path / "file"), progress=False)
    a, b = folder_bytes(tmp_path / "out"), folder_bytes(tmp_path / "file")
    assert {name for name in a if a[name] != b[name]} == {"prepare.json", "manifest.json"}  # the names of the inputs
    again = prepare(stdin_config(tmp_path / "out"), progress=False, stdin=io.BytesIO(data))
    assert again.manifest == summary.manifest
    with pytest.raises(ConfigError, match=r"inputs: - has 6 bytes.*was begun with \d+ bytes.*give the same text again"):
        prepare(stdin_config(tmp_path / "out"), progress=False, stdin=io.BytesIO(b"{}\n{}\n"))
    assert folder_bytes(tmp_path / "out") == a


class Cut(io.BytesIO):
    """Text whose source goes away in the middle."""

    def read(self, size=-1):
        if self.tell() > 0:
            raise KeyboardInterrupt
        return super().read(20_000)


def test_standard_input_that_was_interrupted_is_asked_for_again(tmp_path):
    write_documents(tmp_path / "a.jsonl", 541)
    data, folder = (tmp_path / "a.jsonl").read_bytes(), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare(stdin_config(folder), progress=False, stdin=Cut(data))
    with pytest.raises(ConfigError, match="- is standard input, and it is empty; pipe the text in, from its start"):
        prepare(stdin_config(folder), progress=False, stdin=io.BytesIO())
    prepare(stdin_config(folder), progress=False, stdin=io.BytesIO(data))
    prepare(stdin_config(tmp_path / "whole"), progress=False, stdin=io.BytesIO(data))
    assert folder_bytes(folder) == folder_bytes(tmp_path / "whole")


def test_after_standard_input_is_read_a_killed_run_needs_it_no_more(tmp_path):
    write_documents(tmp_path / "a.jsonl", 541)
    data, folder = (tmp_path / "a.jsonl").read_bytes(), tmp_path / "out"
    prepare(stdin_config(tmp_path / "whole"), progress=False, stdin=io.BytesIO(data))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(data), limit[1]))
    try:
        with pytest.raises(DataError, match="cannot write: file too large"):  # shards larger than all of the text
            prepare(
                stdin_config(
                    folder, task_bytes=1 << 20, block_tokens=1 << 20, shard_tokens=1 << 20, validation_fraction=0
                ),
                progress=False,
                stdin=io.BytesIO(data),
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    changes = {"task_bytes": 1 << 20, "block_tokens": 1 << 20, "shard_tokens": 1 << 20, "validation_fraction": 0}
    prepare(stdin_config(folder, **changes), progress=False, stdin=io.BytesIO())
    prepare(stdin_config(tmp_path / "other", **changes), progress=False, stdin=io.BytesIO(data))
    assert folder_bytes(folder) == folder_bytes(tmp_path / "other")


def test_standard_input_as_one_document(tmp_path):
    data = b"one\ntwo\n"
    config = stdin_config(tmp_path / "out", stdin_format="text", validation_fraction=0)
    prepare(config, progress=False, stdin=io.BytesIO(data))
    assert stored_documents(tmp_path / "out", "train") == ["one\ntwo\n"]


@pytest.mark.parametrize("at_once", [3, 40, 1 << 20])
def test_duplicates_are_marked_alike_however_many_are_compared_at_once(tmp_path, at_once):
    draw, seen = np.random.default_rng(1), set()
    (tmp_path / "work").mkdir()
    tasks = [Task(number, ()) for number in range(5)]
    hashes = [draw.integers(0, 60, count).astype(SCAN_DTYPE) for count in (17, 0, 31, 1, 50)]
    for task, values in zip(tasks, hashes, strict=True):
        np.save(scan_path(tmp_path, task), values)
    mark_duplicates(tmp_path, tasks, at_once)
    for task, values in zip(tasks, hashes, strict=True):
        marks = np.load(tmp_path / "work" / f"duplicate-{task.number:05d}.npy")
        for value, mark in zip(values.tolist(), marks, strict=True):
            assert mark == (value in seen)
            seen.add(value)


def test_an_older_folder_is_continued_where_the_new_options_have_their_defaults(prepared, documents, tmp_path):
    folder = Path(shutil.copytree(prepared, tmp_path / "copy"))
    tree = json.loads((folder / "prepare.json").read_text())
    for name in ("min_document_bytes", "stdin", "pinned"):
        del tree[name]
    (folder / "prepare.json").write_text(json.dumps(tree))
    prepare(small_config(documents[0], folder), progress=False)
    with pytest.raises(ConfigError, match="min_document_bytes: was 1, now 2"):
        prepare(small_config(documents[0], folder, min_document_bytes=2), progress=False)
    del tree["document_hash"]  # of before xxh3: other documents would validate
    (folder / "prepare.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="document_hash: was None, now 'xxh3_64'; choose another folder"):
        prepare(small_config(documents[0], folder), progress=False)
