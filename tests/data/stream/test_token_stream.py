import hashlib
import shutil
import threading
import time

import numpy as np
import pytest
from small_corpora import small_config, write_documents

from esolm_megatron.data.prepare import prepare
from esolm_megatron.data.shards import ShardCorrupt, ShardReader
from esolm_megatron.data.stream import TokenStream, ValidationSet
from esolm_megatron.data.stream.shuffle import permutation
from esolm_megatron.errors import DataError

L = 37
LAYOUTS = [(1, 13), (3, 5), (16, 512), (5, 1), (7, 11)]


def stream(folder, **changes):
    return TokenStream(folder, **{"seq_length": L, "global_batch_size": 12, "seed": 5, **changes})


def storage_rows(folder, split="train", length=L):
    """All full rows of a split by reading its blocks one after the other."""
    reader, rows, starts = ShardReader(folder), [], []
    for block in reader.split_blocks(split).tolist():
        values = np.empty(int(reader.blocks[block]["num_tokens"]), reader.dtype)
        reader.read_into(block, 0, values)
        for begin in range(0, len(values) - length + 1, length):
            rows.append(values[begin : begin + length].tolist())
            documents = reader.documents(block) - begin
            starts.append(documents[(documents > 0) & (documents < length)].tolist())
    return rows, starts


@pytest.mark.parametrize(("lanes", "window"), LAYOUTS)
def test_every_sequence_once_an_epoch_in_an_order_of_its_own(prepared, lanes, window):
    data = stream(prepared, num_lanes=lanes, shuffle_window=window)
    n = data.sources["data"].num_sequences
    orders = [data.sources["data"].order.sequences(np.arange(epoch * n, (epoch + 1) * n)) for epoch in range(3)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(n))
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[1], orders[2])
    other = stream(prepared, num_lanes=lanes, shuffle_window=window, seed=6)
    assert not np.array_equal(other.sources["data"].order.sequences(np.arange(n)), orders[0])


def test_rows_of_an_epoch_are_the_rows_of_the_shards(prepared):
    rows, starts = storage_rows(prepared)
    data = stream(prepared, global_batch_size=len(rows), num_lanes=3, shuffle_window=5)
    assert data.sources["data"].num_sequences == len(rows) > 200
    batch = data.batch(0)
    expected = sorted(zip(rows, starts, strict=True))
    found = zip(batch.tokens.tolist(), [documents.tolist() for documents in batch.documents], strict=True)
    assert sorted(found) == expected
    assert any(starts)
    assert batch.tokens.dtype == np.int64
    assert batch.valid.all()
    assert (
        data.sources["data"].tokens_left_out
        == data.sources["data"].reader.manifest.splits["train"].tokens - len(rows) * L
    )
    assert data.vocab_size == 258


def test_small_data_is_one_full_permutation(prepared):
    """No trace of the storage order: the mean distance of neighbours is that of an even shuffle, n / 3."""
    data = stream(prepared)
    n = data.sources["data"].num_sequences
    order = data.sources["data"].order.sequences(np.arange(n))
    assert (data.sources["data"].order.num_lanes, data.sources["data"].order.shuffle_window) == (1, n)
    assert abs(np.abs(np.diff(order)).mean() - n / 3) < n / 15


def test_global_batches_do_not_depend_on_the_number_of_ranks(prepared):
    whole = stream(prepared, num_lanes=3, shuffle_window=5)
    for size in (2, 3, 4):
        parts = [stream(prepared, num_lanes=3, shuffle_window=5, data_rank=r, data_size=size) for r in range(size)]
        for step in (0, 1, 40):
            batch = whole.batch(step)
            for rank, part in enumerate(parts):
                mine = part.batch(step)
                assert np.array_equal(mine.tokens, batch.tokens[rank::size])
                assert np.array_equal(mine.rows, batch.rows[rank::size])
                assert np.array_equal(mine.samples, batch.samples[rank::size])
                assert [d.tolist() for d in mine.documents] == [d.tolist() for d in batch.documents[rank::size]]
    assert np.array_equal(whole.batch(40).samples, 480 + np.arange(12))


def test_any_step_of_a_new_stream_equals_the_step_of_an_old_one(prepared):
    old = stream(prepared, num_lanes=3, shuffle_window=5)
    batches = [old.batch(step) for step in range(2 * old.sources["data"].num_sequences // 12 + 2)]
    for step in reversed(range(len(batches))):
        new = stream(prepared, num_lanes=3, shuffle_window=5).batch(step)
        assert np.array_equal(new.tokens, batches[step].tokens)
    assert not np.array_equal(batches[0].tokens, batches[1].tokens)


def test_a_far_step_reads_only_its_own_blocks_and_comes_at_once(prepared):
    data = stream(prepared, num_lanes=3, shuffle_window=5)
    began = time.perf_counter()
    batch = data.batch(10**9)
    assert time.perf_counter() - began < 1
    assert batch.samples[0] == 12 * 10**9
    assert 0 < data.sources["data"].reader._checked.sum() <= 12


def test_the_order_never_changes():
    """Written down once: a run must be resumable by a later version."""
    assert permutation(7, 5, "window", 0, 1, 2).tolist() == [3, 4, 6, 2, 1, 5, 0]


@pytest.mark.parametrize(
    ("lanes", "window", "digest"),
    [
        (16, 512, "4cb10d3a173eb3384de62455c833bcad612b2c8edb5e2de59c9e586d79e7b8cc"),
        (3, 5, "60b433303cfe3237b6e9b13853a4e8094cfccb2f0d0b9313d7b1cbfb0f96b7d7"),
    ],
)
def test_the_batches_of_one_source_never_change(prepared, lanes, window, digest):
    """Those of the version that knew one local folder only."""
    data, found = stream(prepared, num_lanes=lanes, shuffle_window=window), hashlib.sha256()
    for step in range(80):
        batch = data.batch(step)
        for array in (batch.tokens, batch.samples, *batch.documents):
            found.update(array.tobytes())
    assert found.hexdigest() == digest


def test_fewer_sequences_than_a_batch(prepared, tmp_path):
    n = stream(prepared).sources["data"].num_sequences
    data = stream(prepared, global_batch_size=2 * n + 1)
    tokens = data.batch(0).tokens
    assert sorted(tokens[:n].tolist()) == sorted(tokens[n : 2 * n].tolist())
    assert not np.array_equal(tokens[:n], tokens[n : 2 * n])


def test_a_single_sequence(tmp_path):
    write_documents(tmp_path / "a.jsonl", 3)
    prepare(small_config(tmp_path / "a.jsonl", tmp_path / "out", validation_fraction=0), progress=False)
    total = ShardReader(tmp_path / "out").manifest.splits["train"].tokens
    data = stream(tmp_path / "out", seq_length=total, global_batch_size=4)
    assert data.sources["data"].num_sequences == 1
    assert (data.batch(3).tokens == data.batch(0).tokens[0]).all()
    with pytest.raises(
        DataError, match=rf"no row of seq_length = {total + 1} tokens \(its longest block has {total}\)"
    ):
        stream(tmp_path / "out", seq_length=total + 1)
    with pytest.raises(DataError, match="split 'validation' is empty; prepare with another validation_fraction"):
        ValidationSet(tmp_path / "out", seq_length=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 13, "data_size": 2}, "global_batch_size = 13: must be a multiple of data_size = 2"),
        ({"data_rank": 2, "data_size": 2}, "data_rank = 2: must be from 0 to data_size - 1 = 1"),
        ({"num_lanes": 0}, "num_lanes = 0: Input should be greater than or equal to 1"),
        ({"seq_length": 0}, "seq_length = 0: must be 1 or more"),
        ({"seq_length": 5000}, "no row of seq_length = 5000 tokens"),
    ],
)
def test_wrong_sizes(prepared, changes, message):
    with pytest.raises(DataError, match=message):
        stream(prepared, **changes)


def test_validation_is_every_token_once(prepared):
    data = ValidationSet(prepared, seq_length=L)
    batch = data.rows(range(len(data)))
    reader, tokens = ShardReader(prepared), []
    for block in reader.split_blocks("validation").tolist():
        values = np.empty(int(reader.blocks[block]["num_tokens"]), reader.dtype)
        reader.read_into(block, 0, values)
        tokens += values.tolist()
    assert batch.tokens[batch.valid].tolist() == tokens
    assert (~batch.valid).any()
    assert (batch.tokens[~batch.valid] == 256).all()
    ends = [row[valid] == 256 for row, valid in zip(batch.tokens, batch.valid, strict=True)]
    for end, starts in zip(ends, batch.documents, strict=True):
        inside = np.flatnonzero(end[:-1]) + 1
        assert np.array_equal(inside, starts)
    some = data.rows([5, 2])
    assert np.array_equal(some.tokens, batch.tokens[[5, 2]])
    assert some.rows.tolist() == some.samples.tolist() == [5, 2]
    with pytest.raises(DataError, match=rf"row {len(data)}: the split has rows 0 to {len(data) - 1}"):
        data.rows([0, len(data)])


def test_prefetch_gives_the_batches_in_order(prepared):
    data = stream(prepared)
    with data.prefetch(3, 9, depth=2) as batches:
        found = list(batches)
    assert [batch.samples[0] // 12 for batch in found] == [3, 4, 5, 6, 7, 8]
    assert all(np.array_equal(b.tokens, data.batch(3 + n).tokens) for n, b in enumerate(found))


def test_prefetch_stops_when_closed(prepared):
    before = threading.active_count()
    batches = stream(prepared).prefetch(0, depth=2)
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(batches)


def test_prefetch_raises_what_happened_in_the_thread(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "copy")
    data = stream(folder)
    for path in (folder / "shards").iterdir():
        path.write_bytes(path.read_bytes()[:512])
    batches = data.prefetch(0, 5, depth=2)
    for _ in range(2):
        with pytest.raises(ShardCorrupt, match="cut at offset 512"):
            next(batches)
    assert not batches._thread.is_alive()
