"""`data.on_corrupt=skip` leaves out what is lost for everybody and for ever, and nothing that may be back in a minute."""

import errno
import os
import resource
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
from shard_server import serving

from esolm_megatron.data.shards import ShardCorrupt, ShardMissing, remote
from esolm_megatron.data.shards import shard_cache as cache
from esolm_megatron.data.shards.format import LocalTrouble
from esolm_megatron.data.stream import TokenStream
from esolm_megatron.errors import DataError

SIZES = {
    "seq_length": 37,
    "global_batch_size": 12,
    "seed": 5,
    "num_lanes": 3,
    "shuffle_window": 5,
    "on_corrupt": "skip",
}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.01)


@pytest.fixture
def copy(prepared, tmp_path):
    """A copy of the prepared folder that a test may damage."""
    return shutil.copytree(prepared, tmp_path / "copy")


@pytest.fixture
def server(copy):
    with serving(copy) as found:
        yield found


def there(server, folder, **fields):
    values = {"retries": 1, "timeout_s": 20, "prefetch_shards": 2, "cache_dir": str(folder)}
    return TokenStream(server.url, **{**SIZES, **values, **fields})


def first_shard(data):
    """Name of the shard of the first row, and where it is stored there."""
    source = data.sources["data"]
    (place,), (start,) = source.locate(np.array([0]))
    record, manifest = source.reader.blocks[source.blocks[place]], source.reader.manifest
    return manifest.shards[int(record["shard"])].name, int(record["token_offset"]) + 2 * int(start)  # two bytes a token


def refused(data, *words):
    """What ends a run that skips damage: no damage, and with shard and offset."""
    name, offset = first_shard(data)
    with pytest.raises(DataError) as caught:
        data.batch(0)
    assert not isinstance(caught.value, (ShardMissing, ShardCorrupt))
    data.close()
    for word in (name, f"wanted by the row at offset {offset} of {name}", *words):
        assert word in str(caught.value)
    return caught.value


def blank(data, steps=10):
    """Shards of the blank rows, and the tokens, of the first steps."""
    batches = [data.batch(step) for step in range(steps)]
    data.close()
    return {d.shard for b in batches for d in b.damage}, np.concatenate([b.tokens for b in batches])


@pytest.mark.parametrize(
    "fault", [500, 503, 429, 403, 401, ("cut", 700), ("reset", 700), ("stall", 700), ("drip", 700)], ids=str
)
def test_trouble_that_outlasts_the_tries_ends_the_run_and_the_next_start_reads_all(prepared, server, tmp_path, fault):
    slow = isinstance(fault, tuple) and fault[0] in ("stall", "drip")
    data = there(server, tmp_path / "cache", timeout_s=0.2 if slow else 20)
    server.faults[first_shard(data)[0]] = [fault]
    refused(data)
    server.faults.clear()
    lost, tokens = blank(there(server, tmp_path / "cache"))
    assert not lost
    assert np.array_equal(tokens, blank(TokenStream(prepared, **SIZES))[1])


def test_a_server_that_is_gone_ends_the_run(server, tmp_path):
    data = there(server, tmp_path / "cache")
    server.server.shutdown()
    server.server.server_close()
    refused(data, "Connection refused", "after 2 tries")


@pytest.mark.parametrize("fault", [404, 410, ("flip", 3000), "cut", "longer"], ids=str)
def test_what_is_stored_wrong_is_blank_rows_after_a_restart_too(copy, server, tmp_path, fault):
    data = there(server, tmp_path / "one")
    name = first_shard(data)[0]
    path = copy / "shards" / name
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-700])
    elif fault == "longer":
        path.write_bytes(path.read_bytes() + bytes(3 << 20))
    else:
        server.faults[name] = [fault]
    lost, tokens = blank(data)
    assert lost == {name}
    requests = server.requests[f"shards/{name}"]
    assert requests == (1 if isinstance(fault, int) else 2), "one budget for all who ask"
    for folder in ("one", "two"):
        again, same = blank(there(server, tmp_path / folder))
        assert again == lost
        assert np.array_equal(same, tokens)


def test_wrong_bytes_are_damage_only_if_they_come_twice(server, tmp_path):
    data = there(server, tmp_path / "a")
    name = first_shard(data)[0]
    server.faults[name] = [("flip", 3000), ("flip", 4000)]
    refused(data, "the manifest says", "after 2 tries")
    server.faults[name] = [("flip", 3000)]
    refused(there(server, tmp_path / "b", retries=0), "after one try")
    server.faults[name] = [("flip", 3000), ("flip", 3000), 500]
    refused(there(server, tmp_path / "c", retries=2), "HTTP 500", "after 3 tries")


def test_a_shard_whose_whole_folder_is_gone_may_come_back(copy, server, tmp_path):
    far, near = there(server, tmp_path / "cache"), TokenStream(copy, **SIZES)
    copy.rename(tmp_path / "away")
    refused(far, "HTTP 404", "neither is the manifest")
    refused(near, "No such file", "neither is the manifest")
    (tmp_path / "away").rename(copy)
    assert not blank(near)[0], "what passes is not remembered"


def test_what_failed_ahead_of_its_time_is_tried_again_when_it_is_wanted(server, tmp_path, monkeypatch):
    data = there(server, tmp_path / "cache")
    (place, shard), *_ = data.remote_shards(0)
    server.faults[shard.name] = [500]
    place.bring(shard)
    refused_at_once = server.requests[f"shards/{shard.name}"]
    refused(data, "HTTP 500")
    assert server.requests[f"shards/{shard.name}"] == refused_at_once == 2
    server.faults.clear()
    monkeypatch.setattr(cache, "_FRESH_S", 0)
    assert not data.batch(0).damage


def test_a_disk_that_damages_the_cache_ends_the_run(server, tmp_path):
    data = there(server, tmp_path / "cache")
    name = first_shard(data)[0]
    reader = data.sources["data"].reader
    (shard,) = (s for s in reader.manifest.shards if s.name == name)
    path = tmp_path / "cache" / f"{shard.sha256}.data"
    for requests in (1, 2):
        assert not data.batch(0).damage
        assert server.requests[f"shards/{name}"] == requests
        data.close()
        path.write_bytes(bytes(path.stat().st_size))
    refused(data, "data.cache_dir", "look at that disk")


def test_a_block_that_was_stored_wrong_is_blank_though_its_shard_is_whole(server, tmp_path):
    """The index says another crc32 than the shard that the manifest names: fetching it again changes nothing."""
    data = there(server, tmp_path / "cache")
    name = first_shard(data)[0]
    data.sources["data"].reader.blocks["token_crc"] ^= 1
    assert name in {d.shard for d in data.batch(0).damage}
    assert server.requests[f"shards/{name}"] == 1


def test_a_full_cache_disk_names_the_shard(server, tmp_path, monkeypatch):
    data = there(server, tmp_path / "cache")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert isinstance(refused(data, "No space left", f"for {server.url}/shards/", "free "), LocalTrouble)


@contextmanager
def no_files_left():
    """Whatever is opened inside fails, as in a process that has too many files open."""
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_many_open_files_end_the_run(copy, server, tmp_path):
    for data in (TokenStream(copy, **SIZES), there(server, tmp_path / "cache")):
        name = first_shard(data)[0]
        with no_files_left(), pytest.raises(DataError, match="Too many open files") as caught:
            data.batch(0)
        assert name in str(caught.value)
        assert "wanted by the row at offset" in str(caught.value)
        assert not blank(data)[0], "it is not remembered"


def failing(monkeypatch, call, code, times):
    """Have os.`call` fail for shards so many times; returns how often it was called for one."""
    honest, calls = getattr(os, call), []

    def fake(file, *args, **keywords):
        if call == "open" and not str(file).endswith(".tar"):
            return honest(file, *args, **keywords)
        calls.append(file)
        if len(calls) <= times:
            raise OSError(code, os.strerror(code))
        return honest(file, *args, **keywords)

    monkeypatch.setattr(os, call, fake)
    return calls


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.EIO], ids=os.strerror)
@pytest.mark.parametrize("call", ["open", "preadv"])
def test_trouble_of_this_machine_ends_the_run(copy, monkeypatch, call, code):
    data = TokenStream(copy, **SIZES)
    calls = failing(monkeypatch, call, code, 10**9)
    assert isinstance(refused(data, os.strerror(code)), LocalTrouble)
    assert len(calls) == 1 + (code in (errno.ESTALE, errno.EIO))


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO], ids=os.strerror)
@pytest.mark.parametrize("call", ["open", "preadv"])
def test_a_file_server_that_was_started_anew_is_asked_once_more(prepared, copy, monkeypatch, call, code):
    data, expected = TokenStream(copy, **SIZES), TokenStream(prepared, **SIZES).batch(0)
    failing(monkeypatch, call, code, 1)
    assert np.array_equal(data.batch(0).tokens, expected.tokens)


def test_a_cached_copy_that_cannot_be_read_is_fetched_again(prepared, server, tmp_path, monkeypatch):
    data, expected = there(server, tmp_path / "cache"), TokenStream(prepared, **SIZES).batch(0)
    honest, calls = os.preadv, []

    def broken(file, *args):
        calls.append(file)
        if len(calls) == 1:
            os.pwrite(file, bytes(512), 0)  # whoever reads it all finds something else than was stored
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return honest(file, *args)

    monkeypatch.setattr(os, "preadv", broken)
    batch = data.batch(0)
    assert np.array_equal(batch.tokens, expected.tokens)
    assert not batch.damage
    assert server.requests[f"shards/{first_shard(data)[0]}"] == 2


def test_a_missing_shard_is_still_blank_rows(copy):
    data = TokenStream(copy, **SIZES)
    name = first_shard(data)[0]
    (copy / "shards" / name).unlink()
    assert blank(data)[0] == {name} == blank(TokenStream(copy, **SIZES))[0]
