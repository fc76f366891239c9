"""Checkpoints: whatever boxes went in come out, in any other boxes; a kill or a damaged file costs one step, never two."""

import contextlib
import itertools
import json
import logging
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from esolm_megatron.checkpoint import Checkpoint, CheckpointError, Piece, tensorfile
from esolm_megatron.checkpoint import folder as ckpt
from esolm_megatron.checkpoint.folder import DamagedCheckpoint
from esolm_megatron.config import check

SHAPES = {"a.weight": (13, 7), "b.bias": (11,), "c": (), "d": (3, 5, 2)}


def config():
    return check(
        {
            "name": "t",
            "model": {"num_layers": 2, "hidden_size": 8, "num_heads": 2, "vocab_size": 11, "seq_length": 5},
            "objective": {"alpha_0": 0.25},
            "train": {"num_steps": 9, "global_batch_size": 2, "micro_batch_size": 2},
            "data": {"path": "nowhere"},
        }
    )


def manifest(step):
    return {
        "step": step,
        "config": config().model_dump(mode="json"),
        "numbers": {"adam": step, 7: 0.1},
        "shape": (1, 2),
    }


def random_boxes(offset, shape, generator, depth=4):
    """A random cut of a box into boxes of uneven sizes."""
    cuts = [d for d, n in enumerate(shape) if n > 1]
    if depth == 0 or not cuts:
        return [(offset, shape)]
    d = generator.choice(cuts)
    at = generator.randrange(1, shape[d])
    left, right, start = list(shape), list(shape), list(offset)
    left[d], right[d], start[d] = at, shape[d] - at, offset[d] + at
    return random_boxes(offset, tuple(left), generator, depth - 1) + random_boxes(
        tuple(start), tuple(right), generator, depth - 1
    )


def cut(whole, offset, shape):
    return whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]


def save(run, step, tensors, world=3, seed=0, probe=None, drop=None, twice=None):
    """Save {(kind, name): tensor} in random boxes, dealt at random to `world` ranks."""
    generator, ranks = random.Random(seed), [[] for _ in range(world)]
    for (kind, name), whole in tensors.items():
        for offset, shape in random_boxes((0,) * whole.dim(), tuple(whole.shape), generator):
            piece = Piece(kind, name, tuple(whole.shape), offset, cut(whole, offset, shape))
            generator.choice(ranks).append(piece)
    staging = ckpt.staging_folder(run, step)
    for rank, pieces in enumerate(ranks):
        ckpt.write_rank(staging, rank, pieces)
    ckpt.commit(staging, ckpt.step_folder(run, step), manifest(step), world, probe)
    return ckpt.step_folder(run, step)


def state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        (kind, name): torch.randn(shape, generator=generator) for kind in ckpt.KINDS for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize("seed", range(4))
def test_any_boxes_come_back_whole_and_in_any_other_boxes(tmp_path, seed):
    tensors, generator = state(seed), random.Random(100 + seed)
    saved = Checkpoint.open(save(tmp_path, 5, tensors, world=1 + 2 * seed, seed=seed), verify=True)
    assert saved.step == 5
    for kind in ckpt.KINDS:
        assert sorted(saved.names(kind)) == sorted(SHAPES)
    for (kind, name), whole in tensors.items():
        assert saved.shape(name) == SHAPES[name]
        assert torch.equal(saved.read(kind, name), whole)
        for offset, shape in random_boxes((0,) * whole.dim(), tuple(whole.shape), generator, depth=3):
            assert torch.equal(saved.read_box(kind, name, offset, shape), cut(whole, offset, shape))


def test_manifest_and_probe_come_back(tmp_path):
    probe = {"tokens": torch.arange(5), "logits_weight": torch.randn(5, 3), "flag": torch.tensor([True])}
    saved = Checkpoint.open(save(tmp_path, 12, state(), probe=probe), verify=True)
    assert check(saved.config_tree) == config()
    assert saved.manifest["numbers"] == {"adam": 12, "7": 0.1}
    assert saved.manifest["world_size"] == 3
    assert saved.kinds() == list(ckpt.KINDS)
    assert {k: v.tolist() for k, v in saved.probe().items()} == {k: v.tolist() for k, v in probe.items()}


def test_low_precision_is_read_as_fp32_and_strided_views_are_written_right(tmp_path):
    whole = torch.arange(42.0).view(6, 7)
    staging = ckpt.staging_folder(tmp_path, 1)
    pieces = [
        Piece("weight", "x", (7, 6), (0, 0), whole.t()),
        Piece("ema", "x", (7, 6), (0, 0), whole.t().bfloat16()),
        Piece("ema", "empty", (7, 6), (7, 0), whole[:0, :6]),
    ]
    ckpt.write_rank(staging, 0, pieces)
    ckpt.commit(staging, ckpt.step_folder(tmp_path, 1), manifest(1), 1)
    saved = Checkpoint.open(ckpt.step_folder(tmp_path, 1))
    for kind in ("weight", "ema"):
        assert saved.read(kind, "x").dtype == torch.float32
        assert torch.equal(saved.read(kind, "x"), whole.t())
    assert saved.names("ema") == ["x"]


def test_more_files_than_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr(ckpt, "_OPEN_FILES", 2)
    tensors = state(3)
    saved = Checkpoint.open(save(tmp_path, 1, tensors, world=7))
    for (kind, name), whole in tensors.items():
        assert torch.equal(saved.read(kind, name), whole)


def stage(run, *pieces, step=1):
    staging = ckpt.staging_folder(run, step)
    for rank, own in enumerate(pieces):
        ckpt.write_rank(staging, rank, own)
    ckpt.commit(staging, ckpt.step_folder(run, step), manifest(step), len(pieces))


def test_a_file_of_tensors_is_what_was_announced(tmp_path):
    wide, narrow = tensorfile.Entry("w", torch.float32, (3,)), tensorfile.Entry("n", torch.bfloat16, (1,))
    tensors = {"w": torch.ones(3), "n": torch.ones(1).bfloat16()}
    facts = tensorfile.write_tensors(tmp_path / "x", [wide, narrow], tensors.values())
    assert facts == tensorfile.FileFacts((tmp_path / "x").stat().st_size, tensorfile.sha256_of(tmp_path / "x"))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "x").items())
    for entries, words in (([narrow, wide], "wide to narrow"), ([wide, wide], "more than once")):
        with pytest.raises(ValueError, match=words):
            tensorfile.write_tensors(tmp_path / "y", entries, tensors.values())
    with pytest.raises(ValueError, match=r"tensor w is torch.float32 \(4,\), announced as torch.float32 \(3,\)"):
        tensorfile.write_tensors(tmp_path / "y", [wide], [torch.ones(4)])


def box(offset, rows, whole=(6, 2)):
    return Piece("weight", "x", whole, offset, torch.ones(rows, 2))


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (([box((0, 0), 3)], [box((4, 0), 2)]), "x: gap: .* 10 of the 12"),
        (([box((0, 0), 4)], [box((3, 0), 3)]), r"x: overlap .*rank_00000.*rank_00001"),
        (([box((0, 0), 4)], [box((2, 0), 2)]), "overlap"),  # as many elements as the whole has, yet not the whole
        (([box((0, 0), 3)], [box((3, 0), 3, (7, 2))]), r"whole shape is \(7, 2\), another rank \(6, 2\)"),
        (([box((5, 0), 3)],), "reaches out"),
        (([Piece("momentum", "x", (2,), (0,), torch.ones(2))],), "unknown kind 'momentum'; use one of weight"),
        (([Piece("weight", "x", (2,), (0,), torch.ones(2).long())],), "int64 is no floating type"),
        (([Piece("weight", "x", (2, 1), (0,), torch.ones(2))],), "differ in length"),
        (([box((0, 0), 6), box((0, 0), 6)],), "more than once"),
    ],
)
def test_what_is_not_a_whole_state_is_not_committed(tmp_path, pieces, words):
    with pytest.raises(CheckpointError, match=words):
        stage(tmp_path, *pieces)
    assert ckpt.complete_steps(tmp_path) == []


def test_reading_refuses_gaps_too(tmp_path):
    """As a commit of another program could have left them."""
    saved = Checkpoint.open(save(tmp_path, 1, state()))
    saved._index["a.weight"].kinds["ema"].pop()
    with pytest.raises(CheckpointError, match="gap"):
        saved.read_box("ema", "a.weight", (0, 0), (1, 1))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda c: c.read("weight", "nope"), "holds no tensor nope; it has"),
        (lambda c: c.read("fp8", "c"), "c has no fp8; it has ema, exp_avg"),
        (lambda c: c.read_box("weight", "b.bias", (5,), (7,)), r"\(7,\) at \(5,\) is not inside the whole \(11,\)"),
        (lambda c: c.read_box("weight", "b.bias", (0, 0), (1, 1)), "is not inside"),
    ],
)
def test_wrong_questions_are_answered_with_a_sentence(tmp_path, call, words):
    saved = Checkpoint.open(save(tmp_path, 1, state()))
    with pytest.raises(CheckpointError, match=words):
        call(saved)


def test_commit_wants_every_rank_and_overwrites_nothing(tmp_path):
    staging, final = ckpt.staging_folder(tmp_path, 1), ckpt.step_folder(tmp_path, 1)
    ckpt.write_rank(staging, 0, [box((0, 0), 6)])
    with pytest.raises(CheckpointError, match="its manifest has no step"):
        ckpt.commit(staging, final, {"config": {}}, 2)
    with pytest.raises(CheckpointError, match="rank 1 of 2 has not finished"):
        ckpt.commit(staging, final, manifest(1), 2)
    ckpt.write_rank(staging, 1, [])
    (staging / "rank_00001.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="rank_00001.safetensors: 3 where rank 1 wrote"):
        ckpt.commit(staging, final, manifest(1), 2)
    ckpt.write_rank(staging, 1, [])
    ckpt.write_rank(staging, 2, [box((0, 0), 6)])  # of a larger world whose save died here
    ckpt.commit(staging, final, manifest(1), 2)
    assert sorted(path.name for path in final.iterdir() if "rank" in path.name) == [
        f"rank_0000{r}.{end}" for r in (0, 1) for end in ("json", "safetensors")
    ]
    before = {path.name: path.read_bytes() for path in final.iterdir()}
    ckpt.write_rank(staging, 0, [Piece("weight", "x", (1,), (0,), torch.zeros(1))])
    with pytest.raises(CheckpointError, match="never overwritten"):
        ckpt.commit(staging, final, manifest(1), 1)
    assert {path.name: path.read_bytes() for path in final.iterdir()} == before


def test_a_full_disk_is_an_error_and_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1, state())
    staging = ckpt.staging_folder(tmp_path, 2)
    ckpt.write_rank(staging, 0, [box((0, 0), 6)])
    (staging / "rank_00000.safetensors").unlink()
    (staging / "rank_00000.safetensors").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"rank 0 cannot write .*No space left"):
        ckpt.write_rank(staging, 0, [Piece("weight", "x", (99999,), (0,), torch.zeros(99999))])
    with pytest.raises(CheckpointError, match="rank 0 of 1 has not finished"):
        ckpt.commit(staging, ckpt.step_folder(tmp_path, 2), manifest(2), 1)
    assert ckpt.newest(tmp_path).step == 1


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 16
    path.write_bytes(data)


DAMAGE = {
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-5]),
    "bit": flip,
    "gone": Path.unlink,
}


@pytest.mark.parametrize("file", ["rank_00001.safetensors", "rank_00001.json", "manifest.json", "probe.safetensors"])
@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_named_and_the_step_before_is_used(tmp_path, caplog, file, how):
    probe = {"tokens": torch.arange(64)}
    save(tmp_path, 1, state(1))
    newest = save(tmp_path, 2, state(2), probe=probe)
    DAMAGE[how](newest / file)
    with pytest.raises(DamagedCheckpoint, match=file):
        Checkpoint.open(newest, verify=True)
    with caplog.at_level(logging.WARNING):
        found = ckpt.newest(tmp_path)
    assert found.step == 1
    assert torch.equal(found.read("weight", "a.weight"), state(1)["weight", "a.weight"])
    assert file in caplog.text
    assert "step 2 is damaged" in caplog.text


def test_a_changed_number_in_the_manifest_is_noticed(tmp_path):
    path = save(tmp_path, 1, state()) / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"alpha_0": 0.25', '"alpha_0": 0.35'))
    assert path.read_text() != text
    with pytest.raises(DamagedCheckpoint, match="manifest.json: its content has changed"):
        Checkpoint.open(path.parent)


def test_files_are_hashed_beside_each_other(tmp_path, monkeypatch):
    """Each waits for another: one after the other they would wait for ever."""
    folder = save(tmp_path, 1, state(), world=3)
    together, honest = threading.Barrier(2), ckpt.sha256_of

    def wait_and_hash(path):
        together.wait(timeout=10)
        return honest(path)

    monkeypatch.setattr(ckpt, "sha256_of", wait_and_hash)
    assert Checkpoint.open(folder, verify=True).step == 1  # three ranks' two files each: pairs come out even


def test_a_damaged_step_can_be_moved_away_and_saved_again(tmp_path):
    save(tmp_path, 1, state(1))
    for _ in range(2):
        flip(save(tmp_path, 2, state(2)) / "rank_00000.safetensors")
        assert ckpt.newest(tmp_path, move_damaged=True).step == 1
    save(tmp_path, 2, state(2))
    assert ckpt.newest(tmp_path).step == 2
    assert len(list((tmp_path / "checkpoints").glob("step_00000002.damaged-*"))) == 2


def test_no_checkpoint_is_none_but_only_damaged_ones_are_an_error(tmp_path):
    assert ckpt.newest(tmp_path) is None
    for step in (1, 2):
        (save(tmp_path, step, state()) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="all 2 checkpoints"):
        ckpt.newest(tmp_path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        Checkpoint.open(ckpt.step_folder(tmp_path, 3))


def test_a_newer_format_names_the_package_that_reads_it(tmp_path):
    save(tmp_path, 1, state())
    path = save(tmp_path, 2, state()) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99, "written_by": "7.5.3"}))
    with pytest.raises(
        CheckpointError, match=r"version 99, .* reads up to 2; esolm-megatron 7.5.3 wrote it: install"
    ) as e:
        ckpt.newest(tmp_path)
    assert not isinstance(e.value, DamagedCheckpoint), "refused, not skipped"


def old_checkpoint(run):
    """What the code of format version 1 wrote for `save(..., 7, weight and ema of state(1), world=2)`."""
    return shutil.copytree(Path(__file__).parents[1] / "fixtures" / "checkpoint_v1", ckpt.step_folder(run, 7))


def test_format_version_1_still_loads(tmp_path):
    assert json.loads((old_checkpoint(tmp_path) / "manifest.json").read_text())["version"] == 1
    found = ckpt.newest(tmp_path, verify=True)
    assert found.step == 7
    assert found.kinds() == ["weight", "ema"]
    for kind, name in itertools.product(found.kinds(), SHAPES):
        assert torch.equal(found.read(kind, name), state(1)[kind, name])
    assert found.probe()["tokens"].tolist() == [0, 1, 2, 3, 4]
    assert check(found.config_tree) == config()


def test_a_version_that_is_no_longer_read_names_what_migrates_it(tmp_path, monkeypatch):
    old_checkpoint(tmp_path)
    monkeypatch.setattr(ckpt, "READS", (2,))
    monkeypatch.setattr(ckpt, "MIGRATED_BY", {1: "esolm convert --to-version-2 FOLDER"})
    with pytest.raises(
        CheckpointError, match=r"version 1, .* reads 2 to 2; migrate it: esolm convert --to-version-2"
    ) as e:
        ckpt.newest(tmp_path)
    assert not isinstance(e.value, DamagedCheckpoint), "refused, not skipped"


def test_every_version_up_to_this_one_loads_or_names_its_tool():
    assert {*ckpt.READS, *ckpt.MIGRATED_BY} == set(range(1, ckpt.VERSION + 1))


def test_prune_keeps_the_newest_that_open(tmp_path):
    for step in (3, 20, 100, 100000001):
        save(tmp_path, step, state())
    (ckpt.step_folder(tmp_path, 100000001) / "rank_00000.json").unlink()
    (ckpt.staging_folder(tmp_path, 7) / "x").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000002.deleted-0" / "x").mkdir(parents=True)
    (tmp_path / "checkpoints" / "notes").mkdir()
    with pytest.raises(CheckpointError, match="keep_last = 0"):
        ckpt.prune(tmp_path, 0)
    assert ckpt.prune(tmp_path, 2) == [3]
    assert ckpt.complete_steps(tmp_path) == [20, 100, 100000001]
    assert ckpt.newest(tmp_path).step == 100
    left = ["notes", "step_00000007.tmp-0", "step_00000020", "step_00000100", "step_100000001"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == left
    assert ckpt.prune(tmp_path, 1, remove_unfinished=True) == [20]
    assert not ckpt.staging_folder(tmp_path, 7).exists()
    assert ckpt.prune(tmp_path / "elsewhere", 1) == []


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [
        (1, 0, [9]),
        (2, 0, [8, 9]),
        (1, 3, [3, 6, 9]),
        (2, 4, [4, 8, 9]),
        (3, 5, [5, 7, 8, 9]),
        (1, 1, list(range(1, 10))),
    ],
)
def test_prune_keeps_multiples_for_ever(tmp_path, keep_last, keep_every, left):
    for step in range(1, 10):
        save(tmp_path, step, {("weight", "c"): torch.ones(())}, world=1)
        ckpt.prune(tmp_path, keep_last, keep_every)
    assert ckpt.complete_steps(tmp_path) == left


def test_prune_never_removes_the_newest_whole_one(tmp_path):
    for step in range(1, 5):
        save(tmp_path, step, {("weight", "c"): torch.ones(())}, world=1)
    for step in (3, 4):
        (ckpt.step_folder(tmp_path, step) / "rank_00000.safetensors").unlink()
    assert ckpt.prune(tmp_path, 1, 3) == [1]
    assert ckpt.newest(tmp_path).step == 2


def test_a_listing_appears_whole(tmp_path):
    """The first rank waits for this name: it must not be there before its last byte is."""
    assert ckpt.missing_ranks(tmp_path / "x", 2) == [0, 1]
    big = [Piece("weight", f"t{i}", (1,), (0,), torch.ones(1)) for i in range(400)]
    partial, done = set(), threading.Event()

    def look():
        while not done.is_set():
            with contextlib.suppress(OSError):
                data = (tmp_path / "x" / "rank_00001.json").read_bytes()
                if not data.endswith(b"}\n"):
                    partial.add(len(data))
            time.sleep(0.0002)  # a thread that never waits would keep the interpreter from the writer

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(40):
            ckpt.write_rank(tmp_path / "x", 1, big)
            assert ckpt.missing_ranks(tmp_path / "x", 2) == [0]
    finally:
        done.set()
        watcher.join()
    assert partial == set()


def in_child(work, *, kill_at=None):
    """Run `work` in a real process, which SIGKILL ends before its file operation number `kill_at`; whether it finished."""
    child = os.fork()
    if child == 0:
        try:
            count = itertools.count()
            operations = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")

            def hook(event, _):
                if event in operations and next(count) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

            if kill_at is not None:
                sys.addaudithook(hook)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), "the child failed by itself"
    return code == 0


def test_kill_before_each_file_operation_of_a_save(tmp_path):
    """Whatever the last operation was, the step before or the new one is there, whole, and the next save goes through."""
    save(tmp_path, 0, state(0), world=2)

    def work():
        save(tmp_path, step, state(step), world=2, probe={"tokens": torch.arange(3)})
        ckpt.prune(tmp_path, 1)

    step = 1
    for kill_at in itertools.count():
        finished = in_child(work, kill_at=kill_at)
        found = ckpt.newest(tmp_path)
        assert found.step == ckpt.complete_steps(tmp_path)[-1] in (step - 1, step), f"killed before operation {kill_at}"
        for (kind, name), whole in state(found.step).items():
            assert torch.equal(found.read(kind, name), whole)
        for other in ckpt.complete_steps(tmp_path):
            Checkpoint.open(ckpt.step_folder(tmp_path, other), verify=True)
        if finished:
            break
        step = found.step + 1
    assert kill_at > 12
    assert ckpt.complete_steps(tmp_path) == [step]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step_{step:08d}"]


def test_kill_at_any_moment_leaves_the_newest_step_whole(tmp_path):
    """A real process that does nothing but save and prune, killed with SIGKILL, again and again on the same run."""
    random.seed(0)
    reached, unfinished = -1, 0
    for attempt in range(8):
        child = os.fork()
        if child == 0:
            try:
                done = ckpt.newest(tmp_path)
                for step in range(0 if done is None else done.step + 1, 10**6):
                    save(tmp_path, step, state(step), world=4, seed=step)
                    ckpt.prune(tmp_path, 2)
            finally:
                os._exit(1)
        time.sleep(0.25 + random.random() * 0.1)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "the child stopped by itself"
        unfinished += any((tmp_path / "checkpoints").glob("*.tmp-*"))
        found = ckpt.newest(tmp_path)
        if found is None:
            continue
        assert found.step == ckpt.complete_steps(tmp_path)[-1] >= reached, f"attempt {attempt}"
        for (kind, name), whole in state(found.step).items():
            assert torch.equal(found.read(kind, name), whole)
        reached = found.step
    assert reached > 10
    assert unfinished, "no kill hit a save, so nothing was tested"
