import io
import json
import shutil
import subprocess

import numpy as np
import pytest
import webdataset

from esolm_megatron.data.prepare.tasks import SCAN_DTYPE
from esolm_megatron.data.shards import ShardCorrupt, ShardMissing, ShardReader
from esolm_megatron.data.shards.writer import Packer, ShardWriter, npy_bytes
from esolm_megatron.data.stream import TokenStream, ValidationSet
from esolm_megatron.data.verify import verify
from esolm_megatron.errors import DataError


@pytest.fixture
def copy(prepared, tmp_path):
    """A copy of the prepared folder that a test may damage."""
    return shutil.copytree(prepared, tmp_path / "copy")


def test_plain_webdataset_reads_the_same_tokens(prepared):
    reader = ShardReader(prepared)
    urls = [str(reader.shard_path(n)) for n in range(len(reader.manifest.shards))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, handler=webdataset.reraise_exception))
    assert len(samples) == len(reader.blocks)
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    for block, sample in enumerate(samples):
        tokens = np.load(io.BytesIO(sample["tokens.npy"]), allow_pickle=False)
        values = np.empty(len(tokens), reader.dtype)
        reader.read_into(block, 0, values)
        assert tokens.dtype == np.uint16
        assert np.array_equal(tokens, values)
        assert np.array_equal(np.load(io.BytesIO(sample["docs.npy"]), allow_pickle=False), reader.documents(block))


def test_system_tar_finds_no_fault(prepared):
    for path in sorted((prepared / "shards").iterdir())[:3]:
        listed = subprocess.run(["tar", "-tvf", path], capture_output=True, text=True, check=True).stdout
        assert listed.count("1970-01-01 ") == listed.count("\n") > 0 or "0/0" in listed


def test_look_ahead_is_the_next_token(prepared):
    reader = ShardReader(prepared)
    train = reader.split_blocks("train")
    full = [b for b in train[:-1] if reader.blocks[b]["num_tokens"] == reader.manifest.block_tokens]
    assert len(full) > 5
    for block in full:
        last, first = np.empty(1, reader.dtype), np.empty(1, reader.dtype)
        reader.read_into(block, reader.manifest.block_tokens, last)
        reader.read_into(block + 1, 0, first)
        assert last == first


@pytest.mark.parametrize(
    "array", [np.arange(7, dtype="<u2"), np.empty(0, "<u4"), np.ones((2, 3), bool), np.zeros(3, SCAN_DTYPE)]
)
def test_npy_files_are_those_of_numpy(array):
    out = io.BytesIO()
    np.save(out, array)
    assert npy_bytes(array) == out.getvalue()


@pytest.mark.parametrize("lengths", [[0], [6], [7], [4, 0, 0, 1, 13, 6], [30], [6, 6, 6]])
def test_packer_loses_and_invents_nothing(tmp_path, lengths):
    writer = ShardWriter(tmp_path, "s", 14)
    packer = Packer(writer, "s", 7, np.dtype("<u4"), 99)
    expected, starts = [], []
    for length in lengths:
        starts.append(len(expected))
        expected += [*range(length), 99]
        packer.add(np.arange(length))
    packer.close()
    tokens, found, place = [], [], 0
    for shard in writer.shards:
        data = (tmp_path / shard["name"]).read_bytes()
        for offset, count, _, document_offset, documents, _ in shard["blocks"]:
            tokens += np.frombuffer(data, "<u4", count, offset).tolist()
            found += [place + start for start in np.frombuffer(data, "<u4", documents, document_offset).tolist()]
            place += count
    assert tokens == expected
    assert found == starts
    assert (packer.documents, packer.tokens) == (len(lengths), len(expected))


def touch_everything(folder):
    """Read every row of both splits."""
    for split in ("train", "validation"):
        data = ValidationSet(folder, split=split, seq_length=101)
        data.rows(range(len(data)))


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["token", "document"])
def test_flipped_bit_is_found_at_first_touch(copy, what):
    reader = ShardReader(copy)
    block = int(reader.split_blocks("train")[3])
    record = reader.blocks[block]
    path, offset = reader.shard_path(int(record["shard"])), int(record[f"{what}_offset"])
    flip(path, offset + 1)
    message = rf"{path.name}: {what}s of block {block} at offset {offset} have crc32 .*copy or prepare"
    reader.documents(block - 1)
    for _ in range(2):
        with pytest.raises(ShardCorrupt, match=message):
            reader.read_into(block, 0, np.empty(3, reader.dtype))
    with pytest.raises(ShardCorrupt, match=message):
        touch_everything(copy)
    report = verify(copy)
    assert not report.ok
    assert [p for p in report.problems if "has sha256" in p and path.name in p]
    assert [p for p in report.problems if f"offset {offset}" in p]


def test_flipped_header_is_found_by_verify(copy):
    path = sorted((copy / "shards").iterdir())[0]
    flip(path, 5)
    assert [p for p in verify(copy).problems if path.name in p and "sha256" in p]


def test_missing_and_cut_shards_are_found_at_the_start(copy):
    paths = sorted((copy / "shards").iterdir())
    data = paths[0].read_bytes()
    paths[0].write_bytes(data[:-512])
    with pytest.raises(ShardCorrupt, match=rf"{paths[0].name}: cut or replaced at offset {len(data) - 512}"):
        TokenStream(copy, seq_length=11, global_batch_size=1)
    paths[0].unlink()
    with pytest.raises(ShardMissing, match=rf"{paths[0].name}: No such file"):
        TokenStream(copy, seq_length=11, global_batch_size=1)


def test_shard_cut_while_it_is_read_is_an_error(copy):
    stream = TokenStream(copy, seq_length=11, global_batch_size=4)
    for path in (copy / "shards").iterdir():
        path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ShardCorrupt, match=r"\.tar: cut at offset 700 after it was opened"):
        stream.batch(0)


def test_damaged_index_and_manifest(copy):
    flip(copy / "blocks.npy", 300)
    with pytest.raises(ShardCorrupt, match=r"blocks\.npy: does not match manifest\.json"):
        ShardReader(copy)
    tree = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**tree, "seed": "x"}))
    with pytest.raises(ShardCorrupt, match=r"manifest\.json: field seed"):
        ShardReader(copy)
    (copy / "manifest.json").write_text(json.dumps({**tree, "format_version": 2}))
    with pytest.raises(ShardCorrupt, match="has format_version 2, this program reads 1"):
        ShardReader(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(ShardCorrupt, match="is no manifest"):
        ShardReader(copy)


def test_unknown_split(prepared):
    with pytest.raises(DataError, match="split = 'test': must be one of train, validation"):
        ShardReader(prepared).split_blocks("test")
