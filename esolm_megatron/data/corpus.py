"""Documents: read from files of several kinds, and the text that every machine has, Python's own standard library.

A file of prose or code is one document, a jsonl file has one in each line. Large jsonl files are cut into pieces that
several processes read; a line belongs to the piece in which it begins.
"""

from __future__ import annotations

import gzip
import json
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from esolm_megatron.config import ConfigError

SUFFIXES = (".txt", ".py", ".md", ".jsonl", ".jsonl.gz")

_LIBRARY_SKIPS = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings", "__pycache__")
)


@dataclass(frozen=True)
class Piece:
    """A whole file, or the lines of a jsonl file that begin in bytes [start, stop)."""

    path: str
    start: int
    stop: int


def find_files(inputs: Iterable[str]) -> list[Path]:
    """The files that `inputs` (files, folders, globs) stand for: entries in order, each one's files by path.

    Folders are searched through, but for names that begin with a dot. A file named twice is given once.

    Raises:
        ConfigError: an entry stands for no file of a known kind; one line for each such entry.
    """
    found: dict[Path, None] = {}
    problems: list[str] = []
    for number, name in enumerate(inputs):
        path = Path(name)
        if path.is_file() and not name.endswith(SUFFIXES):
            problems.append(f"inputs.{number} = {name!r}: must end in one of {', '.join(SUFFIXES)}")
            continue
        files = [path] if path.is_file() else _below(path)
        if not files:
            problems.append(f"inputs.{number} = {name!r}: no file there that ends in one of {', '.join(SUFFIXES)}")
        found.update(dict.fromkeys(files))
    if problems:
        raise ConfigError("\n".join(problems))
    return list(found)


def _below(path: Path) -> list[Path]:
    if path.is_dir():
        paths = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
    else:
        paths = Path(path.anchor).glob(path.relative_to(path.anchor).as_posix())
    return sorted((p for p in paths if p.name.endswith(SUFFIXES) and p.is_file()), key=lambda p: p.as_posix())


def check_first_line(path: Path, text_field: str) -> None:
    """Nothing, if the first line of a jsonl file has its text in `text_field`; files of other kinds pass.

    Raises:
        ConfigError: it is no JSON object, or has no such text.
    """
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        return
    try:
        with gzip.open(path) if path.name.endswith(".gz") else open(path, "rb") as file:
            line = file.readline()
        tree = json.loads(line) if line.strip() else {text_field: ""}
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(
            f"{path}: the first line cannot be read as JSON: {error}; repair or leave out the file"
        ) from error
    if not isinstance(tree, dict) or not isinstance(tree.get(text_field), str):
        found = f"the fields {', '.join(tree)}" if isinstance(tree, dict) else f"a {type(tree).__name__}"
        raise ConfigError(f"text_field = {text_field!r}: the first line of {path} has no such text, but {found}")


def cut(path: Path, piece_bytes: int) -> list[Piece]:
    """The pieces of a file: of about `piece_bytes` for .jsonl, else one."""
    size = path.stat().st_size
    step = piece_bytes if path.name.endswith(".jsonl") else size
    return [Piece(str(path), start, min(start + step, size)) for start in range(0, size, max(step, 1))]


def read_documents(piece: Piece, text_field: str) -> Iterator[tuple[str, bytes] | None]:
    """Text and UTF-8 bytes of each document of `piece`, in order; None for one that is no text.

    Raises:
        OSError, EOFError: the file cannot be read to its end.
    """
    if piece.path.endswith((".jsonl", ".jsonl.gz")):
        yield from (_parse_line(line, text_field) for line in _lines(piece) if not line.isspace())
        return
    data = Path(piece.path).read_bytes()
    try:
        yield data.decode("utf-8"), data
    except UnicodeDecodeError:
        yield None


def _lines(piece: Piece) -> Iterator[bytes]:
    if piece.path.endswith(".gz"):
        with gzip.open(piece.path) as packed:
            yield from packed
        return
    with open(piece.path, "rb") as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()
        place = file.tell()
        while place < piece.stop and (line := file.readline()):
            place += len(line)
            yield line


def _parse_line(line: bytes, text_field: str) -> tuple[str, bytes] | None:
    try:
        text = json.loads(line)[text_field]
        return text, text.encode("utf-8")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def python_library_documents() -> Iterator[tuple[str, str]]:
    """Name and text of each source file of the running Python's standard library, in order of names.

    Left out: installed packages, tests, IDLE, lib2to3, pydoc's data, tables of encodings, and files that are not UTF-8.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    for name in sorted((name for name in names if not _LIBRARY_SKIPS & {*name.parts}), key=lambda n: n.as_posix()):
        try:
            text = (root / name).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip():
            yield name.as_posix(), text


def write_corpus(folder: str | Path, max_bytes: int | None = None) -> int:
    """Bytes of text in FOLDER/python.jsonl, written here: {"name", "text"} of library files, up to `max_bytes`.

    Files are spread evenly over the library, by their place in it, so that a small corpus is like the whole.

    Raises:
        ConfigError: `max_bytes` is smaller than every file.
    """
    documents = list(python_library_documents())
    stride = 7  # neighbours in a package are alike: take every seventh, then the ones after them, and so on
    spread = [document for first in range(stride) for document in documents[first::stride]]
    path, total = Path(folder) / "python.jsonl", 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for name, text in spread:
            size = len(text.encode())
            if max_bytes is not None and total + size > max_bytes:
                continue
            file.write(json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n")
            total += size
    if not total:
        raise ConfigError(f"max_bytes = {max_bytes}: no file of the standard library is so small; ask for more")
    return total
