"""A corpus that every machine has: the sources of Python's own standard library."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from esolm_megatron.config import ConfigError
from esolm_megatron.errors import of_setting

_LIBRARY_SKIPS = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings", "__pycache__")
)


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
    with of_setting("PATH", str(folder)):
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
