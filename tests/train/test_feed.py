"""What ranks read: once in a replica, the same on every layout, and a reader's failure ends all of them."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from data.shard_server import serving
from ranks import run_ranks

from esolm_megatron.config import ConfigError, check
from esolm_megatron.data.prepare import PrepareConfig, prepare
from esolm_megatron.data.shards import ShardReader
from esolm_megatron.data.stream import TokenStream
from esolm_megatron.data.stream.shuffle import Order
from esolm_megatron.errors import DataError
from esolm_megatron.train.feed import most_corrupt_rows

pytestmark = pytest.mark.gloo

SOURCE = Path(__file__).parents[2] / "esolm_megatron"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two sources."""
    top = tmp_path_factory.mktemp("feed")
    for name in ("data", "train"):
        values = {"inputs": [str(SOURCE / name)], "output": str(top / name), "validation_fraction": 0.2}
        prepare(PrepareConfig(**values, block_tokens=1024, shard_tokens=4096, num_processes=1), progress=False)
    return top


def config(runs, data, **sections):
    tree = {
        "name": "run", "runs_dir": str(runs), "seed": 3,
        "model": {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "seq_length": 32},
        "objective": {"alpha_0": 0.5},
        "train": {"num_steps": 4, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32", "device": "cpu",
                  "log_every_steps": 1},
        "optim": {"lr": 1e-2, "warmup_steps": 1, "ema_decay": 0},
        "data": data,
        "evaluate": {"every_steps": 4, "num_sequences": 4},
        "checkpoint": {"every_steps": 2, "keep_last": 10},
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return check(tree)


def mixture(folders, weights=(3, 1), **fields):
    named = zip(("data", "train"), weights, strict=True)
    return {"sources": {name: {"path": str(folders / name), "weight": w} for name, w in named}, **fields}


def run(config):
    """One rank: how its training ended, and in how many seconds."""
    from esolm_megatron.train.trainer import train

    dist.barrier = lambda: None  # the training leaves the group itself
    began = time.perf_counter()
    try:
        outcome = train(config)
        return outcome.step, "", time.perf_counter() - began
    except Exception as error:
        return -1, f"{type(error).__name__}: {error}", time.perf_counter() - began


def lines(runs, file="metrics.jsonl"):
    return [json.loads(line) for line in (Path(runs) / "run" / file).read_text().splitlines()]


def losses(runs):
    return {x["step"]: x["loss"] for x in lines(runs) if "loss" in x}


def collect(config):
    """One rank: where it stands, whether it has opened the shards, and its first three batches."""
    from esolm_megatron.parallel.engine import Engine
    from esolm_megatron.train.feed import Feed
    from esolm_megatron.train.guard import Guard
    from esolm_megatron.train.preflight import resolve

    config = resolve(config)
    engine = Engine(config)
    feed = Feed(config, engine, Guard(config.guard, config.run_dir, writes=False))
    batches = feed.batches(5)
    found = [next(batches) for _ in range(3)]
    batches.close()
    return engine.topology.data_rank, feed.stream is not None, found


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, {"tensor_size": 2}), (2, {"pipeline_size": 2}), (2, {"context_size": 2}), (4, {"tensor_size": 2}),
        (4, {"tensor_size": 2, "pipeline_size": 2}), (4, {"context_size": 2, "pipeline_size": 2}),
    ],
    ids=str,
)  # fmt: skip
def test_one_rank_of_a_replica_reads_and_all_get_its_rows(folders, tmp_path, world, parallel):
    made = config(tmp_path, mixture(folders), parallel=parallel)
    size = world // int(np.prod(list(parallel.values())))
    whole = TokenStream(made.data, seq_length=32, global_batch_size=8, seed=3)
    readers = 0
    for rank, reads, batches in run_ranks(collect, world, made):
        readers += reads
        for number, batch in batches:
            truth = whole.batch(number)
            for name in ("tokens", "valid", "rows", "samples"):
                assert np.array_equal(getattr(batch, name), getattr(truth, name)[rank::size]), name
            assert [d.tolist() for d in batch.documents] == [d.tolist() for d in truth.documents[rank::size]]
    assert readers == size


def test_layouts_train_on_the_same_mixture_and_log_it(folders, tmp_path):
    for name, world, parallel in (("one", 1, {}), ("two", 2, {"tensor_size": 2}), ("data", 2, {})):
        made = config(tmp_path / name, mixture(folders), parallel=parallel)
        assert {step for step, _, _ in run_ranks(run, world, made)} == {4}
    one = losses(tmp_path / "one")
    assert len(set(one.values())) == 4
    for name in ("two", "data"):
        assert losses(tmp_path / name) == pytest.approx(one, rel=1e-5)
    last = [x for x in lines(tmp_path / "two") if "sources" in x][-1]["sources"]
    assert {name: count["samples"] for name, count in last.items()} == {"data": 24, "train": 8}
    assert last["train"]["epochs"] > 0


def damage(folder, keep=()):
    """Make every training shard but some unreadable, without changing its size."""
    reader = ShardReader(folder)
    for shard in reader.manifest.shards:
        if shard.split == "train" and shard.name not in keep:
            path = folder / "shards" / shard.name
            path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (2, {"pipeline_size": 2}), (2, {}), (4, {"tensor_size": 2})])
def test_a_damaged_shard_ends_all_ranks(folders, tmp_path, world, parallel):
    folder = shutil.copytree(folders / "data", tmp_path / "data")
    damage(folder)
    found = run_ranks(run, world, config(tmp_path, {"path": str(folder)}, parallel=parallel))
    for step, text, seconds in found:
        assert step == -1
        assert "crc32" in text
        assert "at offset" in text
        assert "shards/train-" in text
        assert seconds < 60
    assert not (tmp_path / "run" / "metrics.jsonl").exists(), "no step was made"


def test_a_server_that_says_nothing_ends_all_ranks_with_its_shard_and_not_by_the_watchdog(folders, tmp_path):
    with serving(folders / "data") as server:
        fields = {"num_lanes": 1, "shuffle_window": 20, "prefetch_shards": 1, "timeout_s": 1.0, "retries": 1}
        data = {"path": server.url, "cache_dir": str(tmp_path / "cache"), **fields}
        quick = {"min_limit_s": 0.5, "step_factor": 1.01}
        made = config(tmp_path, data, train={"num_steps": 60}, evaluate={"every_steps": 0}, watchdog=quick)
        stream = TokenStream(made.data, seq_length=32, global_batch_size=8, seed=3)
        assert 2 * fields["timeout_s"] < stream.patience_s() < 10
        early = {s.name for step in range(5) for _, s in stream.remote_shards(step)}
        late = next(s.name for step in range(5, 60) for _, s in stream.remote_shards(step) if s.name not in early)
        server.faults[late] = [("stall", 100)]
        for step, text, _ in run_ranks(run, 2, made):
            assert step == -1
            assert f"{late}: at offset 100: nothing came for 1 s (after 2 tries)" in text
    assert len(losses(tmp_path)) >= 5


def break_second_batch(config):
    from esolm_megatron.data.stream import TokenStream

    honest = TokenStream.batch

    def batch(self, step):
        if step == 2 and self.data_rank == 1:
            raise ZeroDivisionError("a bug in the thread that reads")
        return honest(self, step)

    TokenStream.batch = batch
    return run(config)


def test_a_bug_in_the_thread_that_reads_ends_all_ranks_with_its_traceback(folders, tmp_path):
    found = run_ranks(
        break_second_batch, 4, config(tmp_path, {"path": str(folders / "data")}, parallel={"tensor_size": 2})
    )
    assert [text.startswith("ZeroDivisionError") for _, text, _ in found].count(True) == 1, "where it happened, itself"
    for _, text, _ in found:
        assert "a bug in the thread that reads" in text
        assert text.startswith("ZeroDivisionError") or "in batch" in text
    assert list(losses(tmp_path)) == [1, 2]


def damaged_run(folder, runs, world, **fields):
    data = {"path": str(folder), "on_corrupt": "skip", **fields}
    return run_ranks(run, world, config(runs, data, evaluate={"every_steps": 0}, train={"num_steps": 12}))


def test_blank_rows_are_counted_listed_and_equal_on_all_layouts(folders, tmp_path):
    folder = shutil.copytree(folders / "data", tmp_path / "data")
    reader = ShardReader(folder)
    names = [s.name for s in reader.manifest.shards if s.split == "train"]
    damage(folder, keep=names[len(names) // 3 :])
    for name, world in (("one", 1), ("two", 2)):
        assert {step for step, _, _ in damaged_run(folder, tmp_path / name, world)} == {12}
    one, two = (
        [{k: v for k, v in e.items() if k != "time"} for e in lines(tmp_path / n, "events.jsonl")]
        for n in ("one", "two")
    )
    assert one == two
    assert len(one) > 5
    assert {e["event"] for e in one} == {"corrupt_row"}
    assert all({"shard", "block", "offset", "row", "sample", "batch"} <= e.keys() for e in one)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert [x for x in lines(tmp_path / "one") if "corrupt_rows" in x][-1]["corrupt_rows"] == len(one)


def test_batches_that_are_blank_all_over_weigh_nothing_until_there_are_too_many(folders, tmp_path):
    folder = shutil.copytree(folders / "data", tmp_path / "data")
    damage(folder)
    found = damaged_run(folder, tmp_path, 2, max_corrupt_rows=20)
    for step, text, _ in found:
        assert step == -1
        assert "data.max_corrupt_rows = 20: 24 rows could not be read" in text
    assert losses(tmp_path) == {1: 0.0, 2: 0.0}
    assert len(lines(tmp_path, "events.jsonl")) == 24
    found = damaged_run(folder, tmp_path, 2, max_corrupt_rows=30)
    assert all("32 rows could not be read" in text for _, text, _ in found), "those before the checkpoint count on"


def poisoned(config):
    """One rank: the same, where all ranks object to the batches 6 and 7."""
    from esolm_megatron.train import trainer

    honest = trainer._Run._objection

    def objection(self, number, loss, norm):
        return "a bad batch" if number in (6, 7) else honest(self, number, loss, norm)

    trainer._Run._objection = objection
    return run(config)


def test_blank_rows_that_a_rollback_reads_again_are_counted_and_listed_once(folders, tmp_path):
    folder = shutil.copytree(folders / "data", tmp_path / "data")
    damage(folder)
    data = {"path": str(folder), "on_corrupt": "skip", "max_corrupt_rows": 8 * 12}
    guard = {"rollback_after": 2, "rollback_skip_batches": 0}
    made = config(tmp_path, data, evaluate={"every_steps": 0}, train={"num_steps": 12}, guard=guard)
    assert [(step, text) for step, text, _ in run_ranks(poisoned, 2, made)] == [(12, "")] * 2
    found = lines(tmp_path, "events.jsonl")
    (back,) = (e for e in found if e["event"] == "rollback")
    assert (back["step"], back["target"]) == (6, 4), "batches 4 and 5 are read again"
    listed = [(e["batch"], e["row"]) for e in found if e["event"] == "corrupt_row"]
    assert sorted(listed) == [(batch, row) for batch in range(14) for row in range(8)]
    assert lines(tmp_path)[-1]["corrupt_rows"] == 8 * 12


@pytest.mark.parametrize(
    "shards", [[7000] * 8, [7000] * 13, [7000] * 40, [7000] * 3 + [40] * 900], ids=["8", "13", "40", "unequal"]
)
def test_any_one_shard_may_be_lost_at_every_moment_of_a_run(shards):
    """With what is set where nothing is set. A shard of the default size has some 7,000 rows of 2,048 tokens."""
    data = config("runs", {"path": "tokens"}).data
    order = Order(np.array(shards), (3,), data.num_lanes, data.shuffle_window)
    read = order.sequences(np.arange(order.num_sequences))
    owners = np.repeat(np.arange(len(shards)), shards)[read]
    so_far = np.arange(1, len(read) + 1)[255::256]
    allowed = np.array([most_corrupt_rows(data.max_corrupt_rows, int(rows)) for rows in so_far])
    for lost in np.flatnonzero(np.array(shards) <= len(read) / 8)[:60]:
        assert (np.cumsum(owners == lost)[255::256] <= allowed).all()
    assert (so_far > allowed)[so_far > 1200].all(), "a run on nothing ends"


def test_a_limit_in_rows_is_a_limit_in_rows():
    assert config("runs", {"path": "tokens", "max_corrupt_rows": 3}).data.max_corrupt_rows == 3
    assert most_corrupt_rows(3, 10**6) == 3
    assert most_corrupt_rows(10**6, 1) == 10**6


def test_weights_may_change_for_steps_to_come_only(folders, tmp_path):
    first = config(tmp_path, mixture(folders))
    assert run_ranks(run, 1, first)[0][0] == 4
    longer = {"num_steps": 8}
    for change, weights, message in (
        (
            [{"step": 3, "weights": {"train": 2}}],
            (3, 1),
            "weights from batch 3 on are not those that step 4 was trained on",
        ),
        ([], (1, 1), "weights from batch 0 on are not those"),
    ):
        other = config(tmp_path, mixture(folders, weights, weight_changes=change), train=longer)
        ((step, text, _),) = run_ranks(run, 1, other)
        assert step == -1
        assert message in text
    later = config(tmp_path, mixture(folders, weight_changes=[{"step": 4, "weights": {"data": 0}}]), train=longer)
    assert run_ranks(run, 1, later)[0][0] == 8
    last = [x for x in lines(tmp_path) if "sources" in x][-1]["sources"]
    assert {name: count["samples"] for name, count in last.items()} == {"data": 24, "train": 40}


def test_resuming_on_other_data_says_what_has_changed(folders, tmp_path):
    folder = shutil.copytree(folders / "data", tmp_path / "data")
    made = config(tmp_path, {"path": str(folder)})
    assert run_ranks(run, 1, made)[0][0] == 4
    shutil.rmtree(folder)
    shutil.copytree(folders / "train", folder)
    ((step, text, _),) = run_ranks(run, 1, config(tmp_path, {"path": str(folder)}, train={"num_steps": 8}))
    assert step == -1
    assert "data: is not what step 4 was trained on:" in text
    assert "source data: fingerprint was " in text
    assert "tokens was " in text


def test_a_checkpoint_of_before_there_were_sources_is_resumed(folders, tmp_path):
    made = config(tmp_path, {"path": str(folders / "data")})
    assert run_ranks(run, 1, made)[0][0] == 4
    file = tmp_path / "run" / "checkpoints" / "step_00000004" / "manifest.json"
    tree = json.loads(file.read_text())
    tree["data_fingerprint"] = tree["data_fingerprint"]["data"]["fingerprint"]
    for name in ("sources", "weight_changes"):
        del tree["config"]["data"][name]
    file.write_text(json.dumps(tree))
    longer = {"num_steps": 6}
    assert run_ranks(run, 1, config(tmp_path, {"path": str(folders / "data")}, train=longer))[0][0] == 6
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]


def test_sizes_and_sources_that_do_not_fit_are_refused(folders, tmp_path):
    with pytest.raises(ConfigError, match="round them"):
        TokenStream(config(tmp_path, mixture(folders, (0.333333, 1.2345))).data, seq_length=32, global_batch_size=8)
    with pytest.raises(DataError, match="data: split 'train' has no row of seq_length"):
        TokenStream(config(tmp_path, mixture(folders)).data, seq_length=5000, global_batch_size=8)
