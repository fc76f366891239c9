import gzip
import json
import sys
from pathlib import Path

import datasets
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from esolm_megatron.config import ConfigError
from esolm_megatron.data.prepare import hf_datasets
from esolm_megatron.data.prepare.inputs import (
    Bad,
    Meter,
    _parse_line,
    _split,
    check_input,
    cut,
    find_inputs,
    read_documents,
)
from esolm_megatron.data.prepare.text_field import TextField

TEXT, BODY = TextField.of("text"), TextField.of("body")


@pytest.mark.parametrize("piece_bytes", [1, 7, 64, 10_000])
def test_each_line_is_in_one_piece(tmp_path, piece_bytes):
    path = tmp_path / "a.jsonl"
    texts = ["x" * n + "é" for n in (1, 0, 60, 3, 200, 5)]
    path.write_text("\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts), encoding="utf-8")
    found = [document[0] for piece in cut(path, piece_bytes, TEXT) for document in read_documents(piece, TEXT)]
    assert found == texts


def test_find_inputs(tmp_path):
    for name in ("b/x.py", "b/.hidden/y.py", "a/z.md", "a/z.bin", "c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("t")
    folder = str(tmp_path)
    names = [
        Path(p).relative_to(tmp_path).as_posix()
        for p in find_inputs([f"{folder}/c.txt", folder, f"{folder}/*/z.*"]).files
    ]
    assert names == ["c.txt", "a/z.md", "b/x.py"]
    with pytest.raises(ConfigError) as error:
        find_inputs([f"{folder}/none/*.txt", f"{folder}/a/z.bin", folder])
    assert [line.split(" = ")[0] for line in str(error.value).splitlines()] == ["inputs.0", "inputs.1"]


@pytest.fixture(autouse=True)
def _forget_datasets():
    """Names of these tests are relative to the present folder, which is another one in each."""
    hf_datasets._opened.cache_clear()


TEXTS = [f"{n} été 東京 " + "x" * (n * 37 % 211) for n in range(700)]


def lines(texts=TEXTS):
    return "".join(json.dumps({"id": n, "body": text}) + "\n" for n, text in enumerate(texts)).encode()


def write_parquet(path, group_rows=50):
    table = pyarrow.table({"id": range(len(TEXTS)), "body": TEXTS})
    parquet.write_table(table, path, row_group_size=group_rows)


def write_zst(path, data, frame_bytes=10_007):
    """Several frames, as zstd and pzstd write them."""
    packed = [zstandard.compress(data[n : n + frame_bytes]) for n in range(0, len(data), frame_bytes)]
    path.write_bytes(b"".join(packed))


def write_saved(path):
    datasets.Dataset.from_dict({"id": range(len(TEXTS)), "body": TEXTS}).save_to_disk(path)


def write_streamed(folder):
    folder.mkdir()
    for part in range(3):
        (folder / f"{part}.jsonl").write_bytes(lines(TEXTS[part * 300 : part * 300 + 300]))


INPUTS = {
    "a.jsonl": lambda path: path.write_bytes(lines()),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines())),
    "a.jsonl.zst": lambda path: write_zst(path, lines()),
    "a.parquet": write_parquet,
    "hf://saved": write_saved,
    "hf://streamed?split=train": write_streamed,
}


@pytest.fixture(params=INPUTS)
def kind(request, tmp_path, monkeypatch):
    """An input of each kind, by its name, in the present folder."""
    monkeypatch.chdir(tmp_path)
    INPUTS[request.param](tmp_path / request.param.removeprefix("hf://").partition("?")[0])
    return request.param


def read_all(path, piece_bytes=1 << 20):
    return [document[0] for piece in cut(path, piece_bytes, BODY) for document in read_documents(piece, BODY)]


def test_every_kind_of_input_gives_the_same_documents(kind):
    for piece_bytes in (5000, 1 << 20):
        assert read_all(kind, piece_bytes) == TEXTS
    check_input(kind, BODY)
    with pytest.raises(ConfigError, match=r"text_field = 'text': .*fields id \(no text\), body"):
        check_input(kind, TEXT)
    with pytest.raises(ConfigError, match=r"text_field = 'id'"):
        check_input(kind, TextField.of("id"))


def test_what_can_be_cut_is_cut(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, write in INPUTS.items():
        write(tmp_path / name.removeprefix("hf://").partition("?")[0])
    counts = {name: len(cut(name, 5000, BODY)) for name in INPUTS}
    assert counts["a.jsonl.gz"] == counts["a.jsonl.zst"] == 1
    assert counts["hf://streamed?split=train"] == 3
    assert min(counts[name] for name in ("a.jsonl", "a.parquet", "hf://saved")) > 5


def test_meter_ends_at_the_size_of_the_piece_and_never_falls(kind):
    for piece in cut(kind, 5000, BODY):
        meter, seen = Meter(), [0]
        for _ in read_documents(piece, BODY, meter=meter):
            seen.append(meter.done)
        assert seen == sorted(seen)
        assert meter.done == piece.bytes


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.99])
def test_a_packed_file_that_is_cut_is_an_error_and_not_an_end(tmp_path, name, share):
    """zstandard's own reader ends there without a word."""
    path = tmp_path / name
    INPUTS[name](path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises((EOFError, OSError)):
        read_all(path)
    if name == "a.jsonl.zst":
        path.write_bytes(data[:40] + bytes([data[40] ^ 255]) + data[41:])
        with pytest.raises(OSError):
            read_all(path)


@pytest.mark.parametrize("chunks", [[b"a\nb", b"c\n\nd", b"", b"e", b"f"], [b"", b"\n"], [b"x"], [], [b"a\n", b"b\n"]])
def test_lines_of_chunks_are_the_lines_of_the_whole(chunks):
    assert list(_split(chunks)) == b"".join(chunks).splitlines(keepends=True)


def test_rows_without_text_are_told(tmp_path):
    table = pyarrow.table({"body": ["a", None, "c"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    (piece,) = cut(tmp_path / "a.parquet", 1 << 20, BODY)
    assert list(read_documents(piece, BODY)) == [("a", b"a", 0), Bad("field 'body' is null", 1), ("c", b"c", 2)]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://", "a name is missing; write hf://NAME"),
        ("hf://x?splits=train", "no option 'splits'; known: config, split, revision"),
        ("hf://nobody/has-this-one", "cannot be opened: .*the network, or give a local folder"),
    ],
)
def test_datasets_that_cannot_be_opened(address, message, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=message):
        check_input(address, TEXT)


def test_split_of_a_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_bytes(lines(TEXTS[:5]))
    (tmp_path / "d" / "test.jsonl").write_bytes(lines(TEXTS[5:7]))
    assert read_all("hf://d") == TEXTS[:5]
    assert read_all("hf://d?split=test") == TEXTS[5:7]
    with pytest.raises(ConfigError, match=r"hf://d\?split=none: cannot be opened"):
        check_input("hf://d?split=none", BODY)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.parquet", "hf://saved"])
def test_missing_package_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    INPUTS[name](tmp_path / name.removeprefix("hf://"))
    for module in ("zstandard", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"needs the package (zstandard|pyarrow|datasets); pip install .*\[data\]"):
        check_input(name, BODY)


ODD = [
    "\\ud800",
    "NaN",
    "1e999",
    "\\ud83d\\ude80",
    "\t",
    "\xff",
    "123456789012345678901234567890",
    "\x01",
    "\ufeff",
    "]",
    "1} x",
]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(
    "line", ['{"o": %s, "text": "t"}', '{"text": "a%sb"}', '%s{"text": "t", "text": "u"}', '{"o": "%s", "text": "t"}']
)
def test_lines_are_parsed_as_json_parses_them(odd, line):
    for data in ((line % odd).encode("utf-8", "surrogatepass"), (line % odd).encode("latin-1", "replace")):
        try:
            text = json.loads(data)["text"]
            expected = (text, text.encode(), 7)
        except ValueError:
            expected = Bad
        found = _parse_line(data, TEXT, 7)
        assert (type(found) if isinstance(found, Bad) else found) == expected
