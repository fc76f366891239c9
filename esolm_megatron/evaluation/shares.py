"""Work in numbered parts, shared by processes and kept in files, so that each part is done once whoever is killed.

    FOLDER/settings.json        what decides the numbers: another evaluation does not go on with these parts
    FOLDER/parts/0000007.json   what part 7 has found

Process r of P does the parts r, r + P, ...; then the first one waits for the rest, and puts them together. Another number of
processes may go on with what is there.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from esolm_megatron.errors import ConfigError

Found = dict[str, Any]
"""What a part has found, as JSON holds it."""


class Job(Protocol):
    """Work in `count` parts, on `tokens` tokens in all."""

    @property
    def count(self) -> int:
        """Parts."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        ...

    def prepare(self) -> None:
        """What comes before a process' first part, and is told of no part."""
        ...

    def part(self, number: int) -> Found:
        """What part `number` finds; the same in every process."""
        ...


def shared(
    job: Job,
    folder: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    rank: int = 0,
    size: int = 1,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> list[Found] | None:
    """All parts in order, once they are all there; None for all processes but the first. progress: told of parts done.

    Raises:
        ConfigError: the folder holds another evaluation, or several processes have no folder.
    """
    if folder is None:
        if size > 1:
            raise ConfigError("out: several processes meet in a folder; give out=FOLDER")
        job.prepare()
        out = []
        for number in range(job.count):
            progress(number, job.count)
            out.append(job.part(number))
        return out
    _claim(folder, dict(settings or {}))
    files = [folder / "parts" / f"{number:07}.json" for number in range(job.count)]
    if not all(file.exists() for file in files[rank::size]):
        job.prepare()
    for number in range(rank, job.count, size):
        if rank == 0:
            progress(_present(files), job.count)
        if not files[number].exists():
            _write(files[number], job.part(number))
    if rank:
        return None
    while (done := _present(files)) < job.count:
        progress(done, job.count)
        time.sleep(0.2)
    progress(job.count, job.count)
    return [_read(file) for file in files]


def _present(files: list[Path]) -> int:
    return sum(file.exists() for file in files)


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    file, wanted = folder / "settings.json", json.loads(json.dumps(settings))
    if not file.exists():
        _write(file, wanted)
    held = _read(file)
    for name in held.keys() | wanted.keys():
        if held.get(name) != wanted.get(name):
            raise ConfigError(
                f"out = {str(folder)!r}: holds an evaluation with {name} = {held.get(name)!r}, now {wanted.get(name)!r}; "
                "restore it to go on there, or name another folder"
            )


def _read(file: Path) -> Found:
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{file}: is not whole ({error}); delete it, and it is made again") from error


def _write(file: Path, content: Found) -> None:
    new = file.with_name(f"{file.name}.{uuid.uuid4().hex}.new")  # processes of several hosts may have one number
    new.write_text(json.dumps(content), encoding="utf-8")
    new.replace(file)
