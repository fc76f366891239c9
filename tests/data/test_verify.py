import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from small_corpora import small_config, stored_documents

from esolm_megatron.cli import main
from esolm_megatron.config import ConfigError
from esolm_megatron.data.prepare import prepare
from esolm_megatron.data.shards import ShardReader
from esolm_megatron.data.verify import show, verify


def test_verify_accepts_what_prepare_made(prepared):
    report = verify(prepared)
    manifest = ShardReader(prepared).manifest
    assert report.ok, report.problems
    assert report.tokens == {name: split.tokens for name, split in manifest.splits.items()}
    assert report.documents == {name: split.documents for name, split in manifest.splits.items()}


def test_statistics_are_those_of_the_documents(prepared, documents):
    report, texts = verify(prepared), [text.encode() for text in documents[1]]
    lengths = [len(text) + 1 for text in texts]
    assert report.longest_document == max(lengths)
    assert report.median_document == np.median(lengths)
    assert report.bytes_per_token == pytest.approx(sum(map(len, texts)) / sum(lengths))
    assert report.unused_vocabulary == pytest.approx(1 - (len({*b"".join(texts)}) + 1) / 257)


def test_a_document_over_many_blocks_is_one(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 5000)
    (tmp_path / "b.txt").write_text("y" * 10)
    prepare(small_config(tmp_path, tmp_path / "out", validation_fraction=0), progress=False)
    report = verify(tmp_path / "out")
    assert report.blocks == 5
    assert (report.longest_document, report.documents["train"]) == (5001, 2)


def test_the_picture_is_a_png_with_something_on_it(prepared, tmp_path):
    path = tmp_path / "a.png"
    verify(prepared, plot=path)
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert width > 900
    assert height > 300
    place, packed = 8, b""
    while place < len(data):
        size, kind = struct.unpack(">I4s", data[place : place + 8])
        packed += data[place + 8 : place + 8 + size] if kind == b"IDAT" else b""
        place += size + 12
    assert len({*zlib.decompress(packed)}) > 50
    with pytest.raises(ConfigError, match=r"plot = .*a\.jpg': must end in \.png"):
        verify(prepared, plot=tmp_path / "a.jpg")


def test_command_line(prepared, tmp_path, capsys):
    assert main(["data", "verify", str(prepared), f"plot={tmp_path}/p.png"]) == 0
    said = capsys.readouterr().out
    for part in ("sound", "bytes of text for each token", "of the vocabulary is unused", "longest"):
        assert part in said
    assert (tmp_path / "p.png").exists()
    assert main(["data", "show", str(prepared), "rows=3", "seq_length=97"]) == 0
    said = capsys.readouterr().out
    assert said.count("a document starts") == sum(len(r.parts) - r.continues for r in show(prepared, "train", 3, 97))
    assert "row 2" in said


def test_rows_are_cut_where_documents_start(prepared):
    rows = show(prepared, "validation", 40, 97)
    texts = stored_documents(prepared, "validation")
    assert not rows[0].continues
    assert any(row.continues for row in rows)
    assert any(len(row.parts) > 1 for row in rows)
    found: list[str] = []
    for row in rows:
        for place, part in enumerate(row.parts):
            if place or not row.continues:
                found.append("")
            found[-1] += part
    end = "<|endoftext|>"
    for text, shown in zip(texts, found[:-1], strict=False):
        if "\ufffd" not in shown:  # a row may end within a letter
            assert shown == text + end


def test_damage_is_told_with_the_shard(prepared, tmp_path):
    folder = Path(shutil.copytree(prepared, tmp_path / "copy"))
    path = sorted((folder / "shards").iterdir())[0]
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    report = verify(folder)
    assert not report.ok
    assert path.name in report.problems[0]
