"""Noise is drawn and packed beside the step before, and changes no number of the run."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from test_feed import config, lines, losses, run

from esolm_megatron.data.prepare import PrepareConfig, prepare
from esolm_megatron.data.stream import TokenStream
from esolm_megatron.model.attention import with_tensors

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ahead") / "data"
    source = Path(__file__).parents[2] / "esolm_megatron" / "train"
    values = {"inputs": [str(source)], "output": str(folder), "validation_fraction": 0.2}
    prepare(PrepareConfig(**values, block_tokens=1024, shard_tokens=4096, num_processes=1), progress=False)
    return {"path": str(folder)}


def run_watched(config):
    """One rank: the (step, thread) of each draw of a run."""
    from esolm_megatron.train import collate

    found, draw = [], collate.draw_step

    def watched(*args, key, **options):
        found.append((key[1], threading.current_thread().name))
        return draw(*args, key=key, **options)

    collate.draw_step = watched
    assert run(config)[0] == config.train.num_steps
    return found


def by_hand(config):
    """One rank: the losses of the steps of a run, each drawn when it is its turn."""
    from esolm_megatron.parallel.engine import Engine
    from esolm_megatron.train.collate import noising
    from esolm_megatron.train.preflight import resolve
    from esolm_megatron.train.schedule import learning_rate

    config = resolve(config)
    engine, t = Engine(config), config.train
    top = engine.topology
    stream = TokenStream(
        config.data, seq_length=32, global_batch_size=8, data_rank=top.data_rank, data_size=top.data_size, seed=3
    )
    noised = noising(config, engine)
    return [
        engine.train_step(noised(stream.batch(s), s + 1), learning_rate(s, config.optim, t.num_steps)).loss
        for s in range(t.num_steps)
    ]


@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (2, {}), (2, {"tensor_size": 2})], ids=["1", "dp2", "tp2"])
def test_every_step_is_drawn_beside_the_one_before(data, tmp_path, world, parallel):
    made = config(tmp_path, data, parallel=parallel, evaluate={"every_steps": 0})
    for draws in run_ranks(run_watched, world, made):
        assert [step for step, _ in draws[:4]] == [1, 2, 3, 4]
        assert {name.partition("_")[0] for _, name in draws} == {"ahead"}
    assert losses(tmp_path) == dict(enumerate(run_ranks(by_hand, world, made)[0], 1)), "to the last bit"
    told = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["drawn_ahead"] for line in told] == [1, 2, 3, 4]
    assert all(line["data_wait_s"] >= 0 for line in told)


def with_a_refused_step(config):
    """One rank: what is fed for steps 1, 1, 2 and 2 after a resume at batch 5, and how it was made."""
    from esolm_megatron.parallel.engine import Engine
    from esolm_megatron.train.collate import CollateAhead, noising
    from esolm_megatron.train.feed import Feed
    from esolm_megatron.train.guard import Guard
    from esolm_megatron.train.preflight import resolve

    config = resolve(config)
    engine = Engine(config)
    feed = Feed(config, engine, Guard(config.guard, config.run_dir, writes=False))
    noised = noising(config, engine)
    make = lambda batch, step: engine.stage(noised(batch, step))  # noqa: E731
    with CollateAhead(feed, 5, make) as ahead:
        got = [(number, staged.shares) for number, staged in map(ahead.next, (1, 1, 2, 2))]
    whole = TokenStream(config.data, seq_length=32, global_batch_size=8, seed=3)
    truth = [(n, make(whole.batch(n), step).shares) for n, step in ((5, 1), (6, 1), (7, 2), (8, 2))]
    return [_numbers(x) for x in (got, truth)], (ahead.drawn, ahead.again), threading.active_count()


def _numbers(found):
    """(number, all tensors of its micro-batches) as lists."""
    out = []
    for number, shares in found:
        tensors = []
        for share in shares:
            with_tensors(share, lambda x: tensors.append(x.tolist()) or x)  # noqa: B023
        out.append((number, tensors))
    return out


def test_after_a_refused_step_the_next_batch_is_noised_again(data, tmp_path):
    ((got, truth), counts, _), *_ = run_ranks(with_a_refused_step, 1, config(tmp_path, data))
    assert got == truth
    assert [number for number, _ in got] == [5, 6, 7, 8]
    assert counts == (2, 2)


def test_pinned_and_moved_batches_hold_the_same():
    """`with_tensors` reaches every tensor of a batch with documents, and keeps what is none."""
    from truth import make_config, share_of_step

    batch = share_of_step(make_config(data={"cross_document": False}), 0).micro_batches[0]
    seen = []
    moved = with_tensors(batch, lambda x: seen.append(x) or x.double())
    assert len(seen) >= 8 + 4 + 2
    assert moved.layout == batch.layout
    assert moved.documents.causal.query_sizes == batch.documents.causal.query_sizes
    assert moved.last.parts[0].runs.key_ends.dtype == moved.tokens.dtype == torch.float64
    assert np.array_equal(moved.last.fed.numpy(), batch.last.fed.numpy())
