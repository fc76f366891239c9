"""s3:// by way of s3fs, from a real HTTP server on loopback that speaks S3."""

import socket
import time

import numpy as np
import pytest

from esolm_megatron.data.shards import ShardCorrupt, ShardMissing, remote
from esolm_megatron.data.stream import TokenStream
from esolm_megatron.errors import DataError

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 's3fs' 'moto[server]'")
server = pytest.importorskip("moto.server", reason="moto is not installed: pip install 's3fs' 'moto[server]'")


@pytest.fixture(autouse=True)
def aws(monkeypatch, tmp_path):
    """What a user would set, and nothing of this machine's."""
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.01)
    for name in ("AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.delenv("AWS_PROFILE")
    for name, value in {"ACCESS_KEY_ID": "me", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    import s3fs

    yield
    s3fs.S3FileSystem.clear_instance_cache()  # they remember the endpoint


@pytest.fixture(scope="module")
def endpoint():
    running = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    yield "http://{}:{}".format(*running.get_host_and_port())
    running.stop()


@pytest.fixture
def bucket(endpoint, monkeypatch, prepared):
    """A boto3 client, and a bucket that holds the prepared folder."""
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    client = boto3.client("s3")
    client.create_bucket(Bucket="tokens")
    for path in (p for p in prepared.rglob("*") if p.is_file()):
        client.upload_file(str(path), "tokens", f"mine/{path.relative_to(prepared)}")
    return client


def stream(cache, path="s3://tokens/mine", **fields):
    values = {"retries": 2, "timeout_s": 20.0, "cache_dir": str(cache), "num_lanes": 3, "shuffle_window": 5}
    return TokenStream(path, seq_length=37, global_batch_size=12, seed=5, **{**values, **fields})


def test_batches_from_s3_equal_local_ones(bucket, prepared, tmp_path):
    here = TokenStream(prepared, seq_length=37, global_batch_size=12, seed=5, num_lanes=3, shuffle_window=5)
    there = stream(tmp_path / "cache")
    steps = here.sources["data"].num_sequences // 12
    with there.prefetch(0, steps) as batches:
        for step, batch in enumerate(batches):
            assert np.array_equal(batch.tokens, here.batch(step).tokens)
    assert there.facts() == here.facts()


def test_faults_on_s3_are_named(bucket, prepared, tmp_path):
    with pytest.raises(ShardMissing, match=r"s3://tokens/nothing/manifest.json.*look at data.path"):
        stream(tmp_path / "a", "s3://tokens/nothing")
    data = stream(tmp_path / "b")
    name = data.remote_shards(0)[0][1].name
    whole = (prepared / "shards" / name).read_bytes()
    bucket.put_object(Bucket="tokens", Key=f"mine/shards/{name}", Body=whole[:700])
    with pytest.raises(
        ShardCorrupt, match=rf"s3://tokens/mine/shards/{name}: cut or replaced at offset 700.*after 3 tries"
    ):
        data.batch(0)
    bucket.delete_object(Bucket="tokens", Key=f"mine/shards/{name}")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ShardMissing, match=rf"s3://tokens/mine/shards/{name}"):
        stream(tmp_path / "c").batch(0)


def test_an_endpoint_that_says_nothing_is_an_error_in_time(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(DataError, match=r"s3://tokens/mine/manifest.json: at offset 0: .*after 2 tries"):
            stream(tmp_path / "cache", timeout_s=0.5, retries=1)
        assert time.monotonic() - began < 15
