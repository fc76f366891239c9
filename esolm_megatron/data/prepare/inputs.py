"""Documents from files, folders, standard input and Hugging Face datasets, in pieces that several processes read.

    .txt .py .md            a file is a document
    .jsonl                  a line is a document; cut by bytes, a line belongs to the piece in which it begins
    .jsonl.gz .jsonl.zst    the same, but a file is one piece: packed bytes can only be read from their start
    .parquet                a row is a document; cut by row groups
    hf://NAME?split=train   a row is a document; a streamed dataset is cut by its shards, a saved one by rows

A piece read again gives the same documents in the same order; that is what restarts rest on.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from esolm_megatron.data.prepare import hf_datasets
from esolm_megatron.errors import ConfigError, optional

STDIN = "-"
LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (".txt", ".py", ".md", *LINES, ".parquet")

_READ_BYTES = 1 << 16
_BUFFER_BYTES = 1 << 20
_ROWS = 256


@dataclass(frozen=True)
class Piece:
    """Part of an input: bytes [start, stop) of a file of lines, row groups of a parquet file, shards or rows of a dataset."""

    path: str
    start: int
    stop: int
    bytes: int = 0
    """What it adds to a task's size, as stored; 0 if that is not known."""
    entry: int = 0
    """Number of the entry of `inputs` that it is from."""


class Meter:
    """How much of a piece has been read, in the unit of `Piece.bytes`."""

    done: int = 0


def find_inputs(inputs: Iterable[str]) -> dict[str, int]:
    """The files and datasets that `inputs` (files, folders, globs, hf://) stand for, and the entry each is from.

    Entries in order, each one's files by path. Folders are searched through, but for names that begin with a dot. A file
    named twice is given once. Standard input, `-`, stands for nothing here: `prepare` copies it into a file first.

    Raises:
        ConfigError: an entry stands for no file of a known kind; one line for each such entry.
    """
    found: dict[str, int] = {}
    problems: list[str] = []
    for number, name in enumerate(inputs):
        path = Path(name)
        if name == STDIN:
            continue
        if name.startswith(hf_datasets.SCHEME):
            found.setdefault(name, number)
        elif path.is_file() and not name.endswith(SUFFIXES):
            problems.append(f"inputs.{number} = {name!r}: must end in one of {', '.join(SUFFIXES)}")
        else:
            files = [path] if path.is_file() else _below(path)
            if not files:
                problems.append(f"inputs.{number} = {name!r}: no file there that ends in one of {', '.join(SUFFIXES)}")
            for file in files:
                found.setdefault(str(file), number)
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def _below(path: Path) -> list[Path]:
    if path.is_dir():
        paths = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
    else:
        paths = Path(path.anchor).glob(path.relative_to(path.anchor).as_posix())
    return sorted((p for p in paths if p.name.endswith(SUFFIXES) and p.is_file()), key=lambda p: p.as_posix())


def check_input(path: str, text_field: str) -> None:
    """Nothing, if the input opens and what begins it (first line, columns) has its text in `text_field`.

    Raises:
        ConfigError: it cannot be read, has no such text, or needs a package that is not there.
    """
    fields: dict[str, bool] = {text_field: True}
    try:
        if path.startswith(hf_datasets.SCHEME):
            fields = hf_datasets.text_fields(path)
        elif path.endswith(".parquet"):
            fields = {name: "string" in str(kind) for name, kind in _parquet_schema(path)}
        elif path.endswith(LINES):
            fields = _line_fields(path, text_field)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: cannot be read: {error}; repair or leave out the file") from error
    if not fields.get(text_field):
        found = ", ".join(f"{name}{'' if text else ' (no text)'}" for name, text in fields.items())
        where = f"the first line of {path}" if path.endswith(LINES) else path
        raise ConfigError(f"text_field = {text_field!r}: {where} has no such text, but the fields {found or 'none'}")


def _line_fields(path: str, text_field: str) -> dict[str, bool]:
    line = next(_lines(Piece(path, 0, 1), Meter()), b"")
    try:
        tree = json.loads(line) if line.strip() else {text_field: ""}
    except ValueError as error:
        raise ConfigError(
            f"{path}: the first line cannot be read as JSON: {error}; repair or leave out the file"
        ) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the first line is no JSON object, but a {type(tree).__name__}; leave out the file")
    return {name: isinstance(value, str) for name, value in tree.items()}


def cut(path: str | Path, piece_bytes: int, text_field: str = "text", entry: int = 0) -> list[Piece]:
    """The pieces of an input, of about `piece_bytes` where its kind can be cut.

    Raises:
        OSError, ConfigError: it cannot be opened.
    """
    path = str(path)
    if path.startswith(hf_datasets.SCHEME):
        return [Piece(path, start, stop, size, entry) for start, stop, size in hf_datasets.cut(path, piece_bytes)]
    if path.endswith(".parquet"):
        return _cut_parquet(path, piece_bytes, text_field, entry)
    size = Path(path).stat().st_size
    step = piece_bytes if path.endswith(".jsonl") else size
    bounds = ((start, min(start + step, size)) for start in range(0, size, max(step, 1)))
    return [Piece(path, start, stop, stop - start, entry) for start, stop in bounds]


def read_documents(piece: Piece, text_field: str, meter: Meter | None = None) -> Iterator[tuple[str, bytes] | None]:
    """Text and UTF-8 bytes of each document of `piece`, in order; None for one that is no text.

    Raises:
        OSError, EOFError: the input cannot be read to its end.
    """
    meter = meter or Meter()
    if piece.path.endswith(LINES):
        for line in _lines(piece, meter):
            if not line.isspace():
                yield _parse_line(line, text_field)
    elif piece.path.startswith(hf_datasets.SCHEME):
        yield from map(_with_bytes, hf_datasets.read(piece.path, piece.start, piece.stop, text_field))
    elif piece.path.endswith(".parquet"):
        yield from map(_with_bytes, _parquet_texts(piece, text_field, meter))
    else:
        data = Path(piece.path).read_bytes()
        try:
            yield data.decode("utf-8"), data
        except UnicodeDecodeError:
            yield None
    meter.done = piece.bytes


def _parse_line(line: bytes, text_field: str) -> tuple[str, bytes] | None:
    try:
        text = _parse(line)[text_field]
        return text, text.encode("utf-8")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _parse(line: bytes) -> Any:
    """What `json.loads` makes of the line; nearly always by the parser of pydantic, which takes half of the time.

    That one refuses some lines that json takes, as those with half of a surrogate pair.
    """
    try:
        return from_json(line)
    except ValueError:
        return json.loads(line)


def _with_bytes(text: Any) -> tuple[str, bytes] | None:
    try:
        return text, text.encode("utf-8")
    except (AttributeError, UnicodeEncodeError):
        return None


def _lines(piece: Piece, meter: Meter) -> Iterator[bytes]:
    if piece.path.endswith((".gz", ".zst")):
        with open(piece.path, "rb") as stored:
            gz = piece.path.endswith(".gz")
            for line in gzip.GzipFile(fileobj=stored) if gz else _split(_unpack_zst(piece.path, stored)):
                meter.done = stored.tell()
                yield line
        return
    with open(piece.path, "rb", _BUFFER_BYTES) as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()
        place = file.tell()
        while place < piece.stop and (line := file.readline()):
            place += len(line)
            meter.done = place - piece.start
            yield line


def _unpack_zst(path: str, stored: Any) -> Iterator[bytes]:
    """Unpacked bytes of all frames; the package's own reader takes a cut file for one that has ended."""
    zstandard = optional("zstandard", path)
    frames = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame, inside = frames.decompressobj(), False
    try:
        while data := stored.read(_READ_BYTES):
            while data:
                inside = True
                yield frame.decompress(data)
                if not frame.eof:
                    break
                data, frame, inside = frame.unused_data, frames.decompressobj(), False
    except zstandard.ZstdError as error:
        raise OSError(f"{error}") from error
    if inside:
        raise EOFError("the file ends within a zstd frame")


def _split(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of bytes that come in chunks."""
    begun: list[bytes] = []
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        begun.append(first)
        if rest:
            yield b"".join([*begun, b"\n"])
            yield from (line + b"\n" for line in rest[:-1])
            begun = [rest[-1]]
    if last := b"".join(begun):
        yield last


def _parquet(path: str) -> Any:
    parquet = optional("pyarrow.parquet", path)
    try:
        return parquet.ParquetFile(path)
    except ValueError as error:  # ArrowInvalid
        raise OSError(str(error)) from error


def _parquet_schema(path: str) -> list[tuple[str, Any]]:
    with _parquet(path) as file:
        return list(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))


def _cut_parquet(path: str, piece_bytes: int, text_field: str, entry: int) -> list[Piece]:
    pieces: list[Piece] = []
    with _parquet(path) as file:
        start = size = 0
        for group in range(file.num_row_groups):
            columns = (file.metadata.row_group(group).column(n) for n in range(file.metadata.num_columns))
            size += sum(c.total_uncompressed_size for c in columns if c.path_in_schema == text_field)
            if size >= piece_bytes or group == file.num_row_groups - 1:
                pieces.append(Piece(path, start, group + 1, size, entry))
                start, size = group + 1, 0
    return pieces


def _parquet_texts(piece: Piece, text_field: str, meter: Meter) -> Iterator[Any]:
    groups = range(piece.start, piece.stop)
    with _parquet(piece.path) as file:
        total, seen = sum(file.metadata.row_group(group).num_rows for group in groups), 0
        try:
            for batch in file.iter_batches(_ROWS, row_groups=list(groups), columns=[text_field], use_threads=False):
                yield from batch.column(0).to_pylist()
                seen += len(batch)
                meter.done = piece.bytes * seen // total
        except ValueError as error:  # ArrowInvalid
            raise OSError(str(error)) from error
