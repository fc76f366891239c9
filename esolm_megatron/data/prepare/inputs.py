"""Documents from files, folders, standard input and Hugging Face datasets, in pieces that several processes read.

    .txt .py .md            a file is a document; also .txt.gz and .txt.zst
    .jsonl                  a line is a document; cut by bytes, a line belongs to the piece in which it begins
    .jsonl.gz .jsonl.zst    the same, but a file is one piece: packed bytes can only be read from their start
    .parquet                a row is a document; cut by row groups
    hf://NAME?split=train   a row is a document; a streamed dataset is cut by its shards, a saved one by rows

Endings count in any case. A piece read again gives the same documents in the same order; that is what restarts rest on.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import from_json

from esolm_megatron.data.prepare import hf_datasets
from esolm_megatron.data.prepare.text_field import NoText, TextField
from esolm_megatron.errors import ConfigError, of_setting, optional, shown

STDIN = "-"
_PACKED = (".gz", ".zst")
_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (".txt", ".txt.gz", ".txt.zst", ".py", ".md", *_LINES, ".parquet")

_READ_BYTES = 1 << 16
_BUFFER_BYTES = 1 << 20
_ROWS = 256
TEXT = TextField(("text",))

_LINES_TRIED = 100
"""First lines of a file among which one must have a text."""
_BOM = b"\xef\xbb\xbf"


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


class Bad(NamedTuple):
    """A document that is no text: why, its number as `place` takes it, and what in it."""

    why: str
    number: int
    detail: str = ""


Found = tuple[str, bytes, int] | Bad
"""Text and UTF-8 bytes of a document, and its number."""


@dataclass(frozen=True)
class Inputs:
    """What the entries of `inputs` stand for. files: each file or dataset, and its entry. skipped: files of other kinds."""

    files: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """What is skipped, for a report; empty where nothing is."""
        if not self.skipped:
            return ""
        kinds = Counter(
            "".join(Path(name).suffixes[-2:]) or "no ending" if Path(name).exists() else "links to nothing"
            for name in self.skipped
        )
        named = ", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common(5))
        return f"not read, of other kinds: {len(self.skipped):,} files ({named}), as {self.skipped[0]}"


class Meter:
    """How much of a piece has been read, in the unit of `Piece.bytes`."""

    done: int = 0


def find_inputs(inputs: Iterable[str], setting: str = "") -> Inputs:
    """The files and datasets that `inputs` (files, folders, globs, hf://) stand for; messages call an entry `setting`.

    Entries in order, each one's files by path. Folders are searched through, links to folders too, but for names that begin
    with a dot. A file named twice is given once. Standard input, `-`, stands for nothing here: `prepare` copies it into a file
    first.

    Raises:
        ConfigError: an entry stands for no file of a known kind, or cannot be searched; one line for each such entry.
    """
    out = Inputs()
    problems: list[str] = []
    for number, name in enumerate(inputs):
        path, said = Path(name), f"{setting or f'inputs.{number}'} = {shown(name)}"
        if name == STDIN:
            continue
        if name.startswith(hf_datasets.SCHEME):
            out.files.setdefault(name, number)
        elif path.is_file() and not _is(name, SUFFIXES):
            problems.append(f"{said}: must end in one of {', '.join(SUFFIXES)}")
        else:
            try:
                below = [path] if path.is_file() else _below(path)
            except (OSError, ValueError) as error:
                problems.append(f"{said}: cannot be searched: {error}")
                continue
            files = [file for file in below if _is(file.name, SUFFIXES) and file.exists()]
            out.skipped.extend(str(file) for file in sorted({*below} - {*files}))
            if not files:
                problems.append(f"{said}: no file there that ends in one of {', '.join(SUFFIXES)}")
            for file in files:
                out.files.setdefault(str(file), number)
    if problems:
        raise ConfigError("\n".join(problems))
    return out


def _is(name: str, endings: tuple[str, ...]) -> bool:
    return name.lower().endswith(endings)


def _below(path: Path) -> list[Path]:
    """All files of a folder or glob, sorted, with links that lead nowhere."""
    if path.is_dir():
        found = {p for folder in _folders(path, hidden=False) for p in folder.iterdir() if not p.name.startswith(".")}
    else:
        found = set(_matching(Path(path.anchor), path.relative_to(path.anchor).as_posix()))
    return sorted((p for p in found if p.is_file() or not p.exists()), key=lambda p: p.as_posix())


def _matching(folder: Path, pattern: str) -> Iterator[Path]:
    """As `folder.glob(pattern)`, but that `**` leads through links to folders, and not in circles."""
    before, *after = re.split(r"(?:^|(?<=/))\*\*/", pattern, maxsplit=1)
    if not after:
        yield from folder.glob(pattern)
        return
    for top in folder.glob(before) if before else [folder]:
        for below in _folders(top, hidden=True) if top.is_dir() else []:
            yield from _matching(below, *after)


def _folders(top: Path, hidden: bool) -> Iterator[Path]:
    """`top` and all folders in it, each once: by its own name, or by a link if it is only there by links."""
    seen, left = set[str](), [str(top)]
    while left:
        links: list[str] = []
        for root in left:
            for folder, names, _ in os.walk(root, onerror=_raise):
                if (real := os.path.realpath(folder)) in seen:
                    names.clear()
                    continue
                seen.add(real)
                yield Path(folder)
                names[:] = [name for name in names if hidden or not name.startswith(".")]
                links += sorted(p for name in names if os.path.islink(p := os.path.join(folder, name)))
        left = links


def _raise(error: OSError) -> None:
    raise error


def check_input(path: str, field: TextField) -> None:
    """Nothing, if the input opens and what begins it (first lines, columns) has a text in `field`.

    Raises:
        ConfigError: it cannot be read, has no such text, or needs a package that is not there.
    """
    try:
        if path.startswith(hf_datasets.SCHEME):
            has, fields = hf_datasets.text_fields(path, field)
        elif _is(path, (".parquet",)):
            has, fields = _parquet_fields(path, field)
        elif _is(path, _LINES):
            has, fields = _line_fields(path, field)
        else:
            return
    except (OSError, EOFError, ValueError, zlib.error) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: cannot be read: {error}; repair or leave out the file") from error
    if not has:
        found = ", ".join(f"{name}{'' if text else ' (no text)'}" for name, text in fields.items())
        where = f"the first {_LINES_TRIED} lines of {path}" if _is(path, _LINES) else path
        raise ConfigError(f"text_field = {field}: {where}: no such text, but the fields {found or 'none'}")


def _line_fields(path: str, field: TextField) -> tuple[bool, dict[str, bool]]:
    """Whether one of the first lines has a text, and the fields of the first record; an empty file is no problem."""
    fields: dict[str, bool] = {}
    problem = None
    first = islice(_lines(Piece(path, 0, 1 << 62), Meter()), _LINES_TRIED)
    lines = [line for _, line in first if not line.isspace()]
    for line in lines:
        try:
            tree = _parse(line)
            if isinstance(tree, dict):
                fields = {name: isinstance(value, str) for name, value in tree.items()} | fields
            field.text(tree)
            return True, fields
        except NoText as error:
            problem = problem or str(error)
        except ValueError as error:
            problem = problem or f"cannot be read as JSON: {error}"
    if problem and not fields:
        raise ConfigError(f"{path}: the first line: {problem}; repair or leave out the file")
    return not lines, fields


def cut(path: str | Path, piece_bytes: int, field: TextField = TEXT, entry: int = 0) -> list[Piece]:
    """The pieces of an input, of about `piece_bytes` where its kind can be cut.

    Raises:
        OSError, ConfigError: it cannot be opened.
    """
    path = str(path)
    if path.startswith(hf_datasets.SCHEME):
        return [Piece(path, start, stop, size, entry) for start, stop, size in hf_datasets.cut(path, piece_bytes)]
    if _is(path, (".parquet",)):
        return _cut_parquet(path, piece_bytes, field, entry)
    size = Path(path).stat().st_size
    step = piece_bytes if _is(path, (".jsonl",)) else size
    bounds = ((start, min(start + step, size)) for start in range(0, size, max(step, 1)))
    return [Piece(path, start, stop, stop - start, entry) for start, stop in bounds]


def read_documents(
    piece: Piece, field: TextField = TEXT, encoding: str = "utf-8", meter: Meter | None = None
) -> Iterator[Found]:
    """The documents of `piece`, in order. encoding: of files that are a document; all else is UTF-8.

    Raises:
        OSError, EOFError: the input cannot be read to its end.
    """
    meter = meter or Meter()
    if _is(piece.path, _LINES):
        for number, line in _lines(piece, meter):
            if not line.isspace():
                yield _parse_line(line, field, number)
    elif piece.path.startswith(hf_datasets.SCHEME):
        for number, row in enumerate(hf_datasets.read(piece.path, piece.start, piece.stop, field), piece.start):
            yield _found(row, field, number)
    elif _is(piece.path, (".parquet",)):
        yield from _parquet_texts(piece, field, meter)
    else:
        yield _whole(b"".join(_chunks_of(piece.path, meter)), encoding)
    meter.done = piece.bytes


def read_texts(name: str, setting: str, field: TextField = TEXT, encoding: str = "utf-8") -> Iterator[str]:
    """The texts of a file, folder, glob or dataset, in order, read as they are asked for; messages call it `setting`.

    encoding: of files that are a document; all else is UTF-8.

    Raises:
        ConfigError: Python knows no such encoding; the name stands for no file of a known kind, or one that does not begin with a
            text; later, a file that cannot be read to its end, or a document that is no text.
    """
    try:
        b"text".decode(encoding)
    except (LookupError, UnicodeError) as error:
        raise ConfigError(f"encoding = {shown(encoding)}: {error}; as utf-8, latin-1, cp1252") from error
    files = find_inputs([name], setting).files
    for path in files:
        with of_setting(setting, path):
            check_input(path, field)
    if not files:
        raise ConfigError(f"{setting} = {STDIN!r}: standard input is not read here; give a file")
    return (text for path in files for text in _texts(path, setting, field, encoding))


def _texts(path: str, setting: str, field: TextField, encoding: str) -> Iterator[str]:
    try:
        for piece in cut(path, 1 << 62, field):
            for found in read_documents(piece, field, encoding):
                if isinstance(found, Bad):
                    said = filter(None, [place(piece, found.number), found.why, found.detail])
                    raise ConfigError(f"{setting}: {', '.join(said)}")
                yield found[0]
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(
            f"{setting} = {path!r}: cannot be read to its end: {error}; repair or leave out the file"
        ) from error


def place(piece: Piece, number: int) -> str:
    """Where a document of `piece` is, for people."""
    if _is(piece.path, _LINES):
        return f"{piece.path}, {'the line at byte' if piece.start else 'line'} {number}"
    rows = piece.path.startswith(hf_datasets.SCHEME) or _is(piece.path, (".parquet",))
    return f"{piece.path}, row {number}" if rows else piece.path


def _whole(data: bytes, encoding: str) -> Found:
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
        return text, text.encode(), 0
    except UnicodeDecodeError as error:
        detail = f"byte {error.start} is {data[error.start]:#04x}, {error.reason}"
        return Bad(f"not {encoding}, set encoding", 0, detail)
    except UnicodeError as error:
        return Bad(f"not {encoding}, set encoding", 0, str(error))


def _parse_line(line: bytes, field: TextField, number: int) -> Found:
    try:
        return _found(_parse(line), field, number)
    except UnicodeDecodeError as error:
        return Bad("bytes that are no UTF-8", number, f"byte {error.start} of it is {line[error.start]:#04x}")
    except (ValueError, RecursionError) as error:
        return Bad("no JSON", number, str(error))


def _parse(line: bytes) -> Any:
    """What `json.loads` makes of the line; nearly always by the parser of pydantic, which takes half of the time.

    That one refuses some lines that json takes, as those with half of a surrogate pair.
    """
    try:
        return from_json(line)
    except ValueError:
        return json.loads(line)


def _found(record: Any, field: TextField, number: int) -> Found:
    try:
        text = field.text(record)
        return text, text.encode("utf-8"), number
    except NoText as error:
        return Bad(str(error), number)
    except UnicodeEncodeError:
        return Bad("half of a surrogate pair", number)


def _lines(piece: Piece, meter: Meter) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, from 1; in a piece from within a file, with the bytes that they begin at."""
    if _is(piece.path, _PACKED):
        for number, line in enumerate(_split(_chunks_of(piece.path, meter)), 1):
            yield number, line.removeprefix(_BOM) if number == 1 else line
        return
    with open(piece.path, "rb", _BUFFER_BYTES) as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()
        begin, number = file.tell(), 0
        while begin < piece.stop and (line := file.readline()):
            number, end = number + 1, begin + len(line)
            meter.done = end - piece.start
            yield begin if piece.start else number, line if begin else line.removeprefix(_BOM)
            begin = end


def _chunks_of(path: str, meter: Meter) -> Iterator[bytes]:
    """The bytes of a file, unpacked if they are packed."""
    with open(path, "rb") as stored:
        if _is(path, (".zst",)):
            chunks = _unpack_zst(path, stored)
        else:
            file: Any = gzip.GzipFile(fileobj=stored) if _is(path, (".gz",)) else stored
            chunks = iter(lambda: file.read(_READ_BYTES), b"")
        for chunk in chunks:
            meter.done = stored.tell()
            yield chunk


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


def _parquet_fields(path: str, field: TextField) -> tuple[bool, dict[str, bool]]:
    """Whether the columns have the text, and all columns."""
    with _parquet(path) as file:
        schema = file.schema_arrow
        texts = ("string", "large_string", "dictionary<values=string", "dictionary<values=large_string")
        fields = {name: str(kind).startswith(texts) for name, kind in zip(schema.names, schema.types, strict=True)}
        columns = map(file.schema.column, range(len(file.schema.names)))
        leaves = {column.path for column in columns if str(column.logical_type) == "String"}
    nested = [name for name in field.names if name not in fields and name in leaves]
    return bool(nested) or any(fields.get(name) for name in field.names), fields


def _cut_parquet(path: str, piece_bytes: int, field: TextField, entry: int) -> list[Piece]:
    pieces: list[Piece] = []
    with _parquet(path) as file:
        start = size = 0
        for group in range(file.num_row_groups):
            columns = (file.metadata.row_group(group).column(n) for n in range(file.metadata.num_columns))
            size += sum(c.total_uncompressed_size for c in columns if c.path_in_schema in field.names)
            if size >= piece_bytes or group == file.num_row_groups - 1:
                pieces.append(Piece(path, start, group + 1, size, entry))
                start, size = group + 1, 0
    return pieces


def _parquet_texts(piece: Piece, field: TextField, meter: Meter) -> Iterator[Found]:
    groups = range(piece.start, piece.stop)
    with _parquet(piece.path) as file:
        counts = [file.metadata.row_group(group).num_rows for group in range(piece.stop)]
        before, total, seen = sum(counts[: piece.start]), sum(counts[piece.start :]), 0
        options: dict[str, Any] = {"columns": list(field.names), "use_threads": False}
        try:
            for batch in file.iter_batches(_ROWS, row_groups=list(groups), **options):
                yield from (_found(row, field, n) for n, row in enumerate(batch.to_pylist(), before + seen))
                seen += len(batch)
                meter.done = piece.bytes * seen // total
        except ValueError as error:  # ArrowInvalid
            raise OSError(str(error)) from error
