"""Saving beside the steps: what was copied is what lands, whatever training, other ranks, disks and signals do meanwhile."""

import itertools
import logging
import os
import resource
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from esolm_megatron.checkpoint import Checkpoint, CheckpointError, Piece, complete_steps, newest, step_folder
from esolm_megatron.checkpoint import folder as checkpoint
from esolm_megatron.config import check
from esolm_megatron.train.saver import HostMemory, Saver

ROWS, COLUMNS = 5, 7


def config(folder, timeout_s=60.0, **fields):
    return check(
        {
            "name": "run",
            "runs_dir": str(folder),
            "model": {"num_layers": 2, "hidden_size": 8, "num_heads": 2, "vocab_size": 11, "seq_length": 5},
            "objective": {"alpha_0": 0.25},
            "train": {"num_steps": 9, "global_batch_size": 2, "micro_batch_size": 2},
            "data": {"path": "nowhere"},
            "parallel": {"timeout_s": timeout_s},
            "checkpoint": {"every_steps": 1, **fields},
        }
    )


class Alone:
    """One rank."""

    topology = SimpleNamespace(rank=0, world_size=1)

    def any_rank(self, flag):
        return flag

    def all_ranks(self, number):
        return [number]


class Together:
    """Ranks of a gloo group, as an Engine offers them."""

    def __init__(self):
        self.topology = SimpleNamespace(rank=dist.get_rank(), world_size=dist.get_world_size())

    def any_rank(self, flag):
        value = torch.tensor(int(flag))
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def all_ranks(self, number):
        out = [None] * dist.get_world_size()
        dist.all_gather_object(out, number)
        return out


def parts(rank=0, world=1, value=1.0, columns=COLUMNS):
    """This rank's rows of a tensor, and the tensor itself, which a step changes."""
    own = torch.full((ROWS, columns), float(value))
    return [Piece("weight", "x", (ROWS * world, columns), (ROWS * rank, 0), own)], own


def manifest(step):
    return {"step": step, "config": {}}


def values(folder, step):
    """The distinct numbers in a checkpoint."""
    return Checkpoint.open(step_folder(folder / "run", step), verify=True).read("weight", "x").unique().tolist()


@pytest.fixture
def slow_disk(monkeypatch):
    """Writes wait until the event is set."""
    go, write = threading.Event(), checkpoint.write_rank
    monkeypatch.setattr(checkpoint, "write_rank", lambda *args: go.wait(30) and write(*args))
    return go


def test_what_lands_is_what_was_copied(tmp_path, slow_disk):
    pieces, own = parts(value=3)
    with Saver(config(tmp_path), Alone()) as saver:
        saver.save(1, pieces, manifest(1), {"tokens": torch.arange(4)})
        own.fill_(8)  # the next step, while nothing is written yet
        assert complete_steps(tmp_path / "run") == []
        slow_disk.set()
    assert values(tmp_path, 1) == [3]
    assert newest(tmp_path / "run").probe()["tokens"].tolist() == [0, 1, 2, 3]


def test_copies_take_all_dtypes_and_shapes_in_memory_that_is_reused():
    memory, tensors = HostMemory(), [
        torch.randn(3, 5).t(), torch.randn(()), torch.randn(7).bfloat16(), torch.randn(2, 3, 1).double(), torch.empty(0, 3)
    ]  # fmt: skip
    pieces = [Piece("weight", str(i), tuple(t.shape), (0,) * t.dim(), t) for i, t in enumerate(tensors)]
    memory.reserve(pieces)
    place = memory._bytes.data_ptr()
    for number in range(3):
        for tensor in tensors:
            tensor.fill_(number)
        copies = memory.copies(iter(pieces))
        assert memory._bytes.data_ptr() == place
        for tensor, copy in zip(tensors, copies, strict=True):
            assert torch.equal(copy.tensor, tensor)
            assert copy.tensor.dtype == tensor.dtype
            assert copy.tensor.numel() == 0 or copy.tensor.data_ptr() != tensor.data_ptr()
    assert len({c.tensor.data_ptr() for c in copies if c.tensor.numel()}) == 4


def test_the_next_save_waits_for_the_one_before_and_says_so(tmp_path, slow_disk, caplog):
    pieces, own = parts()
    with Saver(config(tmp_path, keep_last=9), Alone()) as saver:
        assert saver.save(1, pieces, manifest(1)) < 0.5
        own.fill_(2)
        threading.Timer(0.6, slow_disk.set).start()
        stopped = saver.save(2, pieces, manifest(2))
        assert stopped > 0.5
        assert complete_steps(tmp_path / "run") == [1]
    assert [values(tmp_path, 1), values(tmp_path, 2)] == [[1], [2]]
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert line.startswith("step 2: training waited 0.")
    assert "checkpoint of step 1" in line


def test_old_steps_go_after_the_commit_and_multiples_stay(tmp_path):
    with Saver(config(tmp_path, keep_last=2, keep_every=4), Alone()) as saver:
        for step in range(1, 8):
            saver.save(step, parts()[0], manifest(step))
            saver.drain()
            assert newest(tmp_path / "run").step == step
    assert complete_steps(tmp_path / "run") == [4, 6, 7]


def test_a_step_that_another_process_saved_is_kept(tmp_path, caplog):
    for value in (1, 2):
        with Saver(config(tmp_path), Alone()) as saver:
            saver.save(1, parts(value=value)[0], manifest(1))
    assert values(tmp_path, 1) == [1]
    assert "is there already" in caplog.text
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000001"]


def test_an_earlier_process_cannot_write_into_this_ones_folder(tmp_path):
    """Two processes save the same step of a run of two ranks: neither takes the other's files for its own."""

    class Half(Alone):
        topology = SimpleNamespace(rank=0, world_size=2)

    old, new = Saver(config(tmp_path), Half()), Saver(config(tmp_path), Half())
    assert old.attempt != new.attempt
    new.save(1, parts(0, 2, value=5)[0], manifest(1))
    checkpoint.write_rank(checkpoint.staging_folder(tmp_path / "run", 1, old.attempt), 1, parts(1, 2, value=9)[0])
    time.sleep(0.2)
    assert complete_steps(tmp_path / "run") == []
    checkpoint.write_rank(checkpoint.staging_folder(tmp_path / "run", 1, new.attempt), 1, parts(1, 2, value=5)[0])
    new.drain()
    assert values(tmp_path, 1) == [5]
    old.close()
    new.close()


def test_a_staging_folder_that_is_taken_away_is_an_error(tmp_path, monkeypatch):
    def write_and_lose(folder, *args):
        write(folder, *args)
        (folder / "rank_00000.json").unlink()

    write = checkpoint.write_rank
    monkeypatch.setattr(checkpoint, "write_rank", write_and_lose)
    with pytest.raises(CheckpointError, match="removed by another process"), Saver(config(tmp_path), Alone()) as saver:
        saver.save(1, parts()[0], manifest(1))


def test_any_error_of_the_thread_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_rank", lambda *args: 1 / 0)
    saver = Saver(config(tmp_path), Alone())
    saver.save(3, parts()[0], manifest(3))
    with pytest.raises(CheckpointError, match="step 3 cannot be saved: ZeroDivisionError"):
        saver.drain()
    assert saver.failed
    with pytest.raises(CheckpointError, match="step 3"):
        saver.save(4, parts()[0], manifest(4))


def test_older_steps_that_cannot_be_removed_are_no_reason_to_end(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise PermissionError("not yours")

    monkeypatch.setattr(checkpoint, "prune", refuse)
    with Saver(config(tmp_path, keep_last=1), Alone()) as saver:
        saver.save(1, parts()[0], manifest(1))
    assert complete_steps(tmp_path / "run") == [1]
    assert "cannot be removed: not yours" in caplog.text


def test_an_exception_in_the_loop_still_lets_the_save_finish(tmp_path, slow_disk):
    saver = Saver(config(tmp_path), Alone())

    def loop():
        with saver:
            saver.save(1, parts()[0], manifest(1))
            threading.Timer(0.3, slow_disk.set).start()
            raise KeyError

    with pytest.raises(KeyError):
        loop()
    assert values(tmp_path, 1) == [1]


# real ranks


def _stays_slow(rank, slow):
    """Rank `slow` writes only after the file `go` appears beside the run."""
    write = checkpoint.write_rank

    def wait(folder, *args):
        while rank == slow and not (folder.parents[2] / "go").exists():
            time.sleep(0.01)
        write(folder, *args)

    checkpoint.write_rank = wait


def _commit_waits_for_all(folder):
    ranks = Together()
    rank, world = ranks.topology.rank, ranks.topology.world_size
    _stays_slow(rank, 1)
    pieces, own = parts(rank, world, value=3)
    seen = []
    with Saver(config(folder), ranks) as saver:
        stopped = saver.save(1, pieces, manifest(1))
        for step in range(20):  # training goes on
            own.fill_(100 + step)
            assert not ranks.any_rank(saver.failed)
            seen.append(complete_steps(folder / "run"))
            time.sleep(0.01)
        if rank == 0:
            (folder / "go").touch()
    return stopped, seen, complete_steps(folder / "run")


@pytest.mark.gloo
def test_commit_waits_for_every_rank_and_training_does_not(tmp_path):
    for stopped, seen, after in run_ranks(_commit_waits_for_all, 3, tmp_path):
        assert stopped < 1
        assert seen == [[]] * 20
        assert after == [1]
    assert values(tmp_path, 1) == [3]


def _file_limit_on_rank_1(folder, by_step):
    """A real limit of the operating system: rank 1 may write no file of more than 64 kB after the first save."""
    ranks, start = Together(), time.monotonic()
    rank, world = ranks.topology.rank, ranks.topology.world_size
    try:
        with Saver(config(folder), ranks) as saver:
            saver.save(1, parts(rank, world, 1, columns=10**5)[0], manifest(1))
            saver.drain()
            if rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
            saver.save(2, parts(rank, world, 2, columns=10**5)[0], manifest(2))
            while by_step:
                if ranks.any_rank(saver.failed):
                    saver.check()
                time.sleep(0.01)
    except CheckpointError as error:
        return str(error), time.monotonic() - start
    return None


@pytest.mark.gloo
@pytest.mark.parametrize("by_step", [True, False])
def test_an_error_on_one_rank_reaches_all_at_the_next_step_or_the_end(tmp_path, by_step):
    others, own, third = run_ranks(_file_limit_on_rank_1, 3, tmp_path, by_step)
    assert "rank_00001.safetensors: [Errno 27] File too large" in own[0]
    assert others[0] == third[0]
    assert "another rank could not write" in third[0]
    assert max(seconds for _, seconds in (others, own, third)) < 20, "nobody waits for the time limit"
    assert complete_steps(tmp_path / "run") == [1]
    assert values(tmp_path, 1) == [1]


def _one_never_writes(folder):
    ranks = Together()
    _stays_slow(ranks.topology.rank, 2)
    saver = Saver(config(folder, timeout_s=0.5), ranks)
    saver.save(1, parts(ranks.topology.rank, 3)[0], manifest(1))
    while not ranks.any_rank(saver.failed):
        time.sleep(0.01)
    try:
        saver.check()
    except CheckpointError as error:
        return str(error)


@pytest.mark.gloo
def test_a_rank_that_never_writes_is_named(tmp_path):
    first, *others = run_ranks(_one_never_writes, 3, tmp_path)
    assert "1 of 3 ranks had not written their part 0.5 s after rank 0; first of them: rank 2" in first
    assert all("another rank" in text for text in others)


def test_kill_before_each_file_operation_leaves_whole_checkpoints(tmp_path):
    """SIGKILL in the saver's thread, before its first, second, ... file operation, until a save survives."""
    operations = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
    step = 1
    with Saver(config(tmp_path), Alone()) as saver:
        saver.save(0, parts(value=0)[0], manifest(0))
    for kill_at in itertools.count():
        child = os.fork()
        if child == 0:
            count = itertools.count()

            def hook(event, _):
                if event in operations and next(count) == kill_at:  # noqa: B023
                    os.kill(os.getpid(), signal.SIGKILL)

            try:
                pieces, own = parts(value=step)
                sys.addaudithook(hook)
                with Saver(config(tmp_path, keep_last=1), Alone()) as saver:
                    saver.save(step, pieces, manifest(step))
                    own.fill_(-1)
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL), "the child failed by itself"
        found = newest(tmp_path / "run")
        assert found.step in (step - 1, step), f"killed before operation {kill_at}"
        for whole in complete_steps(tmp_path / "run"):
            assert values(tmp_path, whole) == [whole]
        if code == 0:
            break
        step = found.step + 1
    assert kill_at > 12
