"""Remote shards: a real HTTP server, real processes and kills, a real full disk."""

import base64
import fcntl
import http.server
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from shard_server import serving
from small_corpora import small_config

from esolm_megatron.config import ConfigError, DataConfig, load
from esolm_megatron.data.prepare import prepare
from esolm_megatron.data.shards import ShardCorrupt, ShardMissing, ShardReader, remote
from esolm_megatron.data.shards.format import LocalTrouble
from esolm_megatron.data.shards.shard_cache import open_folder
from esolm_megatron.data.stream import TokenStream, ValidationSet
from esolm_megatron.errors import DataError


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.01)


@pytest.fixture
def server(prepared):
    with serving(prepared) as found:
        yield found


@pytest.fixture(scope="session")
def many(documents, tmp_path_factory):
    """The same documents in many small shards."""
    folder = tmp_path_factory.mktemp("many") / "out"
    prepare(small_config(documents[0], folder, block_tokens=509, shard_tokens=1018), progress=False)
    return folder


def config(path, cache, **fields):
    values = {"retries": 2, "timeout_s": 20, "num_lanes": 3, "shuffle_window": 5, "prefetch_shards": 2}
    return DataConfig(path=str(path), cache_dir=str(cache), **{**values, **fields})


def stream(path, cache, **fields):
    return TokenStream(config(path, cache, **fields), seq_length=37, global_batch_size=12, seed=5)


def local(prepared):
    return TokenStream(prepared, seq_length=37, global_batch_size=12, seed=5, num_lanes=3, shuffle_window=5)


def equal(a, b):
    return np.array_equal(a.tokens, b.tokens) and np.array_equal(a.valid, b.valid) and (
        [d.tolist() for d in a.documents] == [d.tolist() for d in b.documents]
    )  # fmt: skip


def shards_fetched(server):
    return {name: count for name, count in server.requests.items() if name.startswith("shards/")}


def shard_of(data, step):
    """The shard of the first row of a step."""
    return data.remote_shards(step)[0][1]


def test_batches_from_http_equal_local_ones_and_each_shard_is_fetched_once(prepared, server, tmp_path):
    here, there = local(prepared), stream(server.url, tmp_path / "cache")
    steps = 2 * here.sources["data"].num_sequences // 12
    with there.prefetch(0, steps) as batches:
        for step, batch in enumerate(batches):
            assert equal(batch, here.batch(step))
    assert there.facts() == here.facts()
    assert set(shards_fetched(server).values()) == {1}
    requests = server.requests.total()
    again = stream(server.url, tmp_path / "cache")
    assert equal(again.batch(steps - 1), here.batch(steps - 1))
    assert server.requests.total() == requests, "all is there"
    for path in (tmp_path / "cache").glob("*.small"):
        os.utime(path, (time.time() - 100,) * 2)
    stream(server.url, tmp_path / "cache")
    assert server.requests.total() == requests + 1, "a manifest of a while ago may be another one now"


def test_pipe_and_fsspec(prepared, tmp_path):
    import fsspec

    batch = local(prepared).batch(3)
    command = f"pipe:cat {prepared}/{{name}}"
    assert equal(stream(command, tmp_path / "a").batch(3), batch)
    files = fsspec.filesystem("memory")
    files.put(str(prepared), "/bucket", recursive=True)
    assert equal(stream("memory://bucket", tmp_path / "b").batch(3), batch)
    with pytest.raises(ShardMissing, match=r"memory://nothing/manifest.json"):
        stream("memory://nothing", tmp_path / "c")
    with pytest.raises(DataError, match=r"at offset 0: .*the command ended with status 7.*after 3 tries"):
        stream("pipe:exit 7 {name}", tmp_path / "d")
    with pytest.raises(DataError, match=r"at offset 0: nothing came for 0.2 s"):
        stream("pipe:sleep 30 # {name}", tmp_path / "d", timeout_s=0.2, retries=0)


def test_a_pipe_in_a_process_that_has_a_thousand_files_open(prepared, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2048:  # a usual soft limit is 1024, the hard one far above
        resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1024)]
    try:
        data = stream(f"pipe:cat {prepared}/{{name}}", tmp_path / "cache")
        assert equal(data.batch(0), local(prepared).batch(0))
        data.close()
    finally:
        for file in opened:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    "fault", [500, 503, 429, ("cut", 700), ("reset", 700), ("flip", 3000), ("stall", 700)], ids=str
)
def test_faults_that_pass_are_tried_again(prepared, server, tmp_path, fault):
    data = stream(server.url, tmp_path / "cache", timeout_s=1 if "stall" in str(fault) else 20)
    name = shard_of(data, 0).name
    server.faults[name] = [fault, fault, None]
    assert equal(data.batch(0), local(prepared).batch(0))
    assert server.requests[f"shards/{name}"] == 3
    assert not list((tmp_path / "cache").glob("*.part"))


@pytest.mark.parametrize(
    ("fault", "kind", "message", "requests"),
    [
        (500, DataError, r"at offset 0: HTTP 500 .*after 3 tries", 3),
        (404, ShardMissing, r"HTTP 404", 1),
        (403, LocalTrouble, r"HTTP 403", 1),
        (("cut", 700), DataError, r"at offset 700: .*the connection ended \d+ bytes early.*after 3 tries", 3),
        (("reset", 700), DataError, r"at offset \d+: .*[Rr]eset.*after 3 tries", 3),
        (
            ("flip", 3000),
            ShardCorrupt,
            r"\d+ bytes with sha256 \w{16}\.\.\., the manifest says \d+ with \w{16}.*after 3 tries",
            3,
        ),
        (("stall", 700), DataError, r"at offset \d+: nothing came for 0.2 s.*after 3 tries", 3),
        (("drip", 700), DataError, r"at offset \d+ after 0.\d s: slower than data.min_mb_per_s = 1.*after 3 tries", 3),
    ],
    ids=str,
)
def test_faults_that_stay_are_errors_that_name_shard_and_offset(server, tmp_path, fault, kind, message, requests):
    data = stream(
        server.url,
        tmp_path / "cache",
        timeout_s={"stall": 0.2, "drip": 0.6}.get(fault[0], 20) if isinstance(fault, tuple) else 20,
    )
    name = shard_of(data, 0).name
    server.faults[name] = [fault]
    for _ in range(2):
        with pytest.raises(kind, match=message) as caught:
            data.batch(0)
        assert type(caught.value) is kind
        assert name in str(caught.value)
        assert f"wanted by the row at offset {first_row(data)} of {name}" in str(caught.value)
    assert server.requests[f"shards/{name}"] == requests, "one budget for all who ask"


def first_row(data):
    """Where the first row of a run is stored in its shard."""
    source = data.sources["data"]
    (place,), (start,) = source.locate(np.array([0]))
    return int(source.reader.blocks[source.blocks[place]]["token_offset"]) + 2 * int(start)  # two bytes a token


def test_prefetch_and_reader_share_one_budget(server, tmp_path):
    data = stream(server.url, tmp_path / "cache")
    name = shard_of(data, 0).name
    server.faults[name] = [500]
    with data.prefetch(0, 5) as batches, pytest.raises(DataError, match=f"{name}.*HTTP 500"):
        next(batches)
    assert server.requests[f"shards/{name}"] == 3


def test_a_rotten_copy_in_the_cache_is_fetched_again_once(prepared, server, tmp_path):
    data = stream(server.url, tmp_path / "cache")
    shard = shard_of(data, 0)
    data.batch(0)
    data.close()
    path = tmp_path / "cache" / f"{shard.sha256}.data"
    rotten = bytearray(path.read_bytes())
    rotten[::7] = bytes(len(rotten[::7]))
    path.write_bytes(rotten)
    again = stream(server.url, tmp_path / "cache")
    assert equal(again.batch(0), local(prepared).batch(0))
    assert server.requests[f"shards/{shard.name}"] == 2
    again.close()
    path.write_bytes(rotten)
    with pytest.raises(
        LocalTrouble, match=rf"data.cache_dir = .*{shard.name} was damaged there twice .*look at that disk"
    ):
        again.batch(0)
    assert server.requests[f"shards/{shard.name}"] == 2
    assert not path.exists()


def test_a_short_file_in_the_cache_is_replaced(prepared, server, tmp_path):
    data = stream(server.url, tmp_path / "cache")
    shard = shard_of(data, 0)
    (tmp_path / "cache" / f"{shard.sha256}.data").write_bytes(b"short")
    assert equal(data.batch(0), local(prepared).batch(0))


def size_of(cache):
    total = 0
    for path in Path(cache).iterdir():
        with suppress(FileNotFoundError):  # other threads work there
            total += path.stat().st_size
    return total


def smallest_cache(url, cache, **fields):
    """Bytes that the refusal of a cache that is too small asks for."""
    with pytest.raises(DataError, match="fetched ahead take") as caught:
        stream(url, cache, cache_gb=1e-9, **fields)
    return int(1e9 * float(re.search(r"take (\S+) GB", str(caught.value))[1])) + 1


def test_the_smallest_cache_that_is_not_refused_fetches_nothing_twice(many, tmp_path):
    shards = [s for s in ShardReader(many).manifest.shards if s.split == "train"]
    fields = {"num_lanes": 1, "shuffle_window": 20}
    here = TokenStream(many, seq_length=37, global_batch_size=12, seed=5, **fields)
    with serving(many) as server:
        limit = smallest_cache(server.url, tmp_path / "cache", prefetch_shards=1, **fields)
        assert sum(s.bytes for s in shards) > 2 * limit, "else little has to go"
        data = stream(server.url, tmp_path / "cache", cache_gb=limit / 1e9, prefetch_shards=1, **fields)
        steps = data.sources["data"].num_sequences // 12
        with data.prefetch(0, steps) as batches:
            for step, batch in enumerate(batches):
                assert equal(batch, here.batch(step))
                assert size_of(tmp_path / "cache") <= limit
        fetched = shards_fetched(server)
    assert max(fetched.values()) == 1, "no shard is fetched twice in an epoch"
    assert len(fetched) >= len(shards) - 2
    assert len(list((tmp_path / "cache").glob("*.data"))) < len(shards) / 2


def test_a_cache_that_cannot_hold_what_is_read_in_turns_is_refused_at_the_start(server, tmp_path):
    with pytest.raises(
        DataError, match=r"data.cache_gb = 2e-05: the shards .* take 0.0\d+ GB; raise it, or lower data.num_lanes"
    ):
        stream(server.url, tmp_path / "cache", cache_gb=2e-5)
    assert not shards_fetched(server)


def test_a_file_in_use_is_never_dropped(prepared, server, tmp_path):
    data = stream(server.url, tmp_path / "cache", timeout_s=0.2)
    first, second = (data.sources["data"].reader.manifest.shards[n] for n in (0, 1))
    place = data.sources["data"].place
    file = place.open(first)
    place.cache.limit = size_of(tmp_path / "cache") + 10
    with pytest.raises(
        LocalTrouble,
        match=rf"data.cache_gb = .* bytes short of room for {server.url}/shards/{second.name}, and all .* in use",
    ):
        place.open(second)
    assert os.pread(file, 10**7, 0) == (prepared / "shards" / first.name).read_bytes()
    place.close(file)
    place._failed.clear()
    place.close(place.open(second))
    assert not (tmp_path / "cache" / f"{first.sha256}.data").exists()


def test_shards_are_there_before_they_are_wanted(many, tmp_path):
    """The reader never downloads itself once the threads that look ahead have had a moment."""
    with serving(many) as server:
        data = stream(server.url, tmp_path / "cache", num_lanes=2, prefetch_shards=4)
        server.delay = 0.02
        place, there = data.sources["data"].place, []
        opened = place.open

        def open_and_look(shard):
            there.append(place._is_there(shard.sha256, shard.bytes))
            return opened(shard)

        place.open = open_and_look
        with data.prefetch(0, 18, depth=1) as batches:
            for _ in batches:
                time.sleep(0.1)
    assert len(there) > 9
    assert all(there[len(there) // 3 :]), there


PROGRAM = """
import sys
import threading
from esolm_megatron.data.shards import remote
from esolm_megatron.data.prepare import prepare
from esolm_megatron.data.shards.shard_cache import open_folder
from esolm_megatron.data.stream import TokenStream, ValidationSet
from esolm_megatron.config import ConfigError, DataConfig, load
remote._FIRST_WAIT_S = 0.01
config = DataConfig(path=sys.argv[1], cache_dir=sys.argv[2], num_lanes=3, shuffle_window=5, timeout_s=20)
data = TokenStream(config, seq_length=37, global_batch_size=12, seed=5, data_rank=int(sys.argv[3]), data_size=4)
for step in range(15):
    sys.stdout.write(data.batch(step).tokens.tobytes().hex()[:64] + "\\n")
    sys.stdout.flush()
"""


def reader(server, cache, rank):
    words = [sys.executable, "-c", PROGRAM, server.url, str(cache), str(rank)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_processes_of_a_node_fetch_each_shard_once(prepared, server, tmp_path):
    server.delay = 0.05
    processes = [reader(server, tmp_path / "cache", rank) for rank in range(4)]
    texts = [p.communicate(timeout=100) for p in processes]
    assert [p.returncode for p in processes] == [0] * 4, texts
    here = local(prepared)
    for rank, (text, _) in enumerate(texts):
        expected = [here.batch(step).tokens[rank::4].tobytes().hex()[:64] for step in range(15)]
        assert text.split() == expected
    assert set(shards_fetched(server).values()) == {1}
    assert server.requests["blocks.npy"] == 1


def test_who_waits_for_a_download_that_fails_does_not_try_it_all_again(server, tmp_path):
    streams = [stream(server.url, tmp_path / "cache") for _ in range(3)]  # locks are by file, as between processes
    assert server.requests["manifest.json"] == 1
    name = shard_of(streams[0], 0).name
    server.faults[name], server.delay = [500], 0.3
    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(data.batch, 0) for data in streams]:
            with pytest.raises(DataError, match=f"{name}.*HTTP 500.*after 3 tries"):
                future.result()
    assert server.requests[f"shards/{name}"] == 3
    server.faults, server.delay = {}, 0.0
    assert len(stream(server.url, tmp_path / "cache").batch(0).tokens), "a new start tries anew"


def test_a_killed_downloader_leaves_nothing_that_stops_others(prepared, server, tmp_path):
    data = stream(server.url, tmp_path / "cache", timeout_s=20)
    shard = next(s for _, s in data.remote_shards(0))
    server.faults[shard.name] = [("stall", 700), None]
    victim = reader(server, tmp_path / "cache", 0)
    lock, part = (tmp_path / "cache" / f"{shard.sha256}.{kind}" for kind in ("lock", "part"))
    deadline = time.time() + 60
    while not (part.exists() and server.requests[f"shards/{shard.name}"]):
        assert time.time() < deadline
        assert victim.poll() is None, victim.communicate()
        time.sleep(0.02)
    with open(lock, "r+") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert part.exists(), "what it had begun"
    assert equal(data.batch(0), local(prepared).batch(0))
    assert not part.exists()
    assert server.requests[f"shards/{shard.name}"] == 2


def test_what_a_killed_process_left_makes_room(server, tmp_path):
    data = stream(server.url, tmp_path / "cache")
    cache = data.sources["data"].place.cache
    for kind in ("part", "lock"):
        cache.path("0" * 64, kind).write_bytes(bytes(10**6) if kind == "part" else b"")
    cache.limit = size_of(cache.folder)
    data.batch(0)
    assert not cache.path("0" * 64, "part").exists()


def test_a_full_disk_is_said(server, tmp_path):
    """A real file system of 200 KB where one may be mounted."""
    cache = tmp_path / "cache"
    cache.mkdir()
    made = ["mount", "-t", "tmpfs", "-o", "size=60k", "none", str(cache)]
    if not shutil.which("mount") or subprocess.run(made, capture_output=True, check=False).returncode:
        pytest.skip("this process may not mount a tmpfs")
    try:
        data = stream(server.url, cache, on_corrupt="skip")
        said = rf"data.cache_dir = {cache}: No space left on device; free \d+ bytes on that disk for \S+/shards/train-\S+\.tar"
        with data.prefetch(0) as batches, pytest.raises(LocalTrouble, match=said):
            list(batches)
        assert max(shards_fetched(server).values()) == 1, "no use in trying again"
        assert not list(cache.glob("*.part"))
        data.close()
    finally:
        subprocess.run(["umount", "--lazy", str(cache)], check=True)


def damaged_stream(folder, **fields):
    values = {"num_lanes": 3, "shuffle_window": 5, "on_corrupt": "skip"}
    return DataConfig(path=str(folder), **{**values, **fields})


def test_blank_rows_are_the_same_for_every_number_of_ranks_and_after_a_restart(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "copy")
    reader = ShardReader(folder)
    numbers = np.unique(reader.blocks["shard"][reader.split_blocks("train")])
    missing, cut, flipped = (reader.shard_path(int(n)) for n in numbers[[0, 2, 4]])
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    record = reader.blocks[reader.blocks["shard"] == numbers[4]][1]
    data = bytearray(flipped.read_bytes())
    data[int(record["token_offset"]) + 5] ^= 1
    flipped.write_bytes(data)
    options = {"seq_length": 37, "global_batch_size": 8, "seed": 5}
    whole, sound = TokenStream(damaged_stream(folder), **options), TokenStream(damaged_stream(prepared), **options)
    steps = range(sound.sources["data"].num_sequences // 8)
    batches, lost = [], {}
    for step in steps:
        batch, good = whole.batch(step), sound.batch(step)
        batches.append(batch)
        bad = {d.row for d in batch.damage}
        for row in range(8):
            assert batch.valid[row].all() == (row not in bad)
            if row in bad:
                assert not batch.valid[row].any()
                assert not len(batch.documents[row])
            else:
                assert np.array_equal(batch.tokens[row], good.tokens[row])
        for d in batch.damage:
            lost.setdefault(d.shard, []).append(d)
            assert d.sample == step * 8 + d.row
            assert d.shard in d.error
    assert set(lost) == {missing.name, cut.name, flipped.name}
    place = (int(np.flatnonzero(reader.blocks == record)[0]), int(record["token_offset"]))
    assert {(d.block, d.offset) for d in lost[flipped.name]} == {place}
    assert "No such file" in lost[missing.name][0].error
    assert "cut at offset" in lost[cut.name][0].error
    for size in (2, 4, 8):
        parts = [TokenStream(damaged_stream(folder), **options, data_rank=r, data_size=size) for r in range(size)]
        for step in reversed(steps):
            for rank, part in enumerate(parts):
                mine = part.batch(step)
                assert np.array_equal(mine.tokens, batches[step].tokens[rank::size])
                assert np.array_equal(mine.valid, batches[step].valid[rank::size])
                assert [d for d in batches[step].damage if d.row % size == rank] == list(mine.damage)


def test_addresses_with_queries_blanks_and_passwords(prepared, tmp_path):
    """The query follows the file's name, blanks are quoted, the password goes into a header, and none is ever said."""
    folder = tmp_path / "my tokens"
    folder.symlink_to(prepared)
    seen = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers.get("Authorization")))
            if not self.path.endswith("?sig=secret%2Fone"):
                return self.send_error(403)
            return super().do_GET()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://me:pass%40word@127.0.0.1:{server.server_port}/my tokens"
        there = stream(f"{root}?sig=secret%2Fone", tmp_path / "cache")
        here = stream(str(prepared), tmp_path / "unused")
        equal(there.batch(3), here.batch(3))
        assert {path.partition("?")[0].rpartition("/")[0] for path, _ in seen} == {
            "/my%20tokens",
            "/my%20tokens/shards",
        }
        assert {header for _, header in seen} == {"Basic " + base64.b64encode(b"me:pass@word").decode()}
        with pytest.raises(DataError) as error:
            stream(f"{root}?sig=secret%2Ftwo", tmp_path / "other")
        server.shutdown()
    said = str(error.value)
    assert said.startswith(f"data.path = 'http://127.0.0.1:{server.server_port}/my tokens?...': http://127.0.0.1")
    assert "/my%20tokens/manifest.json?...: HTTP 403" in said
    for secret in ("secret", "pass", "me:"):
        assert secret not in said


def test_a_broken_path_is_named_with_its_setting(tmp_path):
    with pytest.raises(DataError, match=r"data.path = '.*/nowhere': .*manifest.json: No such file"):
        stream(str(tmp_path / "nowhere"), tmp_path / "cache")
    with pytest.raises(DataError, match=r"^data.path = '.*/nowhere': .*manifest.json: No such file"):
        ValidationSet(config(tmp_path / "nowhere", tmp_path / "cache"), seq_length=37)
    sources = {"web": {"path": str(tmp_path / "nowhere")}}
    with pytest.raises(DataError, match=r"^data.sources.web.path = '.*/nowhere': .*manifest.json: No such file"):
        ValidationSet(DataConfig(sources=sources), seq_length=37)


def test_addresses_that_differ_in_the_query_alone_are_two_places(prepared, many, tmp_path):
    """What messages leave out still tells the manifests in the cache apart."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path):
            self.directory = str(many if path.endswith("?version=2") else prepared)
            return super().translate_path(path)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        places = [config(f"http://127.0.0.1:{server.server_port}?version={n}", tmp_path / "cache") for n in (1, 2)]
        found = [ShardReader(open_folder(str(place.path), place)).fingerprint for place in places]
        server.shutdown()
    assert found == [ShardReader(folder).fingerprint for folder in (prepared, many)]


def test_a_password_does_not_follow_a_redirection(tmp_path):
    """The server that is sent on to may be another's."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers.get("Authorization"))
            self.send_response(302 if "/first/" in self.path else 200)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/second")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://me:password@127.0.0.1:{server.server_port}/first"
        assert remote.Remote(root, 0, 20).fetch("manifest.json", b"".join) == b""
        server.shutdown()
    assert seen == ["Basic " + base64.b64encode(b"me:password").decode(), None]


@pytest.mark.parametrize(
    "path",
    [
        "http://me:SECRET@127.0.0.1:9/t?sig=SECRET",
        "http://127.0.0.1:9/t?sig=a SECRET",
        "http://me:SEC@RET@127.0.0.1:9/t",
        "http://me:SEC/RET@127.0.0.1:9/t",
        "pipe:curl -sf -u me:SECRET http://127.0.0.1:9/{name}",
        "pipe:curl -sf -H 'Authorization: Bearer SECRET' 'http://127.0.0.1:9/{name}?sig=SECRET'",
        "pipe:API_TOKEN=SECRET false {name}",
    ],
)
def test_no_message_has_a_password(path, tmp_path):
    """Refused for want of a cache, beside other sources, or when it is fetched."""
    run = yaml.safe_load((Path(__file__).parents[3] / "configs" / "quickstart.yaml").read_text())
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**run, "data": {"path": path}}))
    sources = "data.sources={a: {path: x}}"
    for words in ([], [sources], [f"data.cache_dir={tmp_path}", sources]):
        with pytest.raises(ConfigError) as refused:
            load(tmp_path / "run.yaml", words)
        assert not re.search("SEC|RET", str(refused.value)), refused.value
    for make in (TokenStream, ValidationSet):
        options = {"seq_length": 37, **({"global_batch_size": 12} if make is TokenStream else {})}
        with pytest.raises((ConfigError, DataError), match="^data.path = ") as failed:
            make(config(path, tmp_path / "cache", retries=0), **options)
        assert not re.search("SEC|RET", str(failed.value)), failed.value
