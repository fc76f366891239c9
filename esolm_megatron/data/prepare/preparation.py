"""Documents to shards of tokens: many processes, bounded memory, and the same bytes whatever happens on the way.

    inputs -> tasks of about task_bytes -> scan: one hash a document -> exact duplicates
                                        -> tokenize: shuffle, encode, split by hash, pack into blocks, write shards
    records of all tasks -> index -> manifest

A task is finished by its record in OUTPUT/work; a run that was killed does the other tasks when it is started again.
Standard input cannot be read twice: it is first copied to OUTPUT/stdin, which is deleted at the end like OUTPUT/work.
The processes of `num_processes` are started anew by workers.py; nothing of the program that calls `prepare` is in them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from esolm_megatron.data.prepare import hf_datasets, tasks
from esolm_megatron.data.prepare.inputs import STDIN, Piece, check_input, cut, find_inputs
from esolm_megatron.data.prepare.prepare_config import PrepareConfig, checked, load_prepare_config
from esolm_megatron.data.prepare.tasks import REASONS, Advance, Rules, Task
from esolm_megatron.data.prepare.text_field import TextField
from esolm_megatron.data.prepare.workers import workers
from esolm_megatron.data.shards import Manifest, ShardReader
from esolm_megatron.data.shards.format import BLOCK_DTYPE, FORMAT_VERSION, SourceCounts, write_manifest
from esolm_megatron.data.shards.writer import SPLITS, write_durably
from esolm_megatron.data.tokenizer import Encoder
from esolm_megatron.errors import ConfigError, DataError

__all__ = ["PrepareConfig", "Summary", "load_prepare_config", "prepare"]

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Summary:
    """What `prepare` made."""

    folder: Path
    manifest: Manifest
    seconds: float
    """Wall time of this call."""
    tasks: int
    tasks_resumed: int
    """Tasks that an earlier, interrupted call had finished."""
    notes: tuple[str, ...] = ()
    """What happened to single documents, and files that are of no known kind; of a folder found finished only the latter."""

    def __str__(self) -> str:
        sources = self.manifest.sources
        lines = [f"{name}: {c.documents:,} documents, {c.tokens:,} tokens" for name, c in self.manifest.splits.items()]
        lines += [f"left out: {_left_out(self.manifest.documents)}"]
        if len(sources) > 1:
            lines += [f"from {s.name}: {s.documents['kept']:,} kept, {_left_out(s.documents)}" for s in sources]
        lines += self.notes
        return "\n".join([*lines, f"{self.manifest.text_bytes:,} bytes of text in {len(self.manifest.shards)} shards"])

    def as_dict(self) -> dict[str, Any]:
        """The same for programs."""
        documents, notes = self.manifest.documents, self.notes
        return {"folder": self.folder, "seconds": self.seconds, "documents": documents, "notes": notes}


def _left_out(counts: dict[str, int] | Counter[str]) -> str:
    return ", ".join(f"{counts[reason]:,} {reason.replace('_', ' ')}" for reason in REASONS)


def prepare(config: PrepareConfig, progress: bool = True, stdin: BinaryIO | None = None) -> Summary:
    """The summary of the folder `config.output`, which is written here, or continued, or found to be finished.

    `stdin` stands for the process's standard input, which is read if `inputs` has "-".

    Raises:
        ConfigError: the configuration cannot run, or the folder was made with another one.
        DataError: no document was left, an input changed meanwhile, a process died, or the disk is full.
    """
    began = time.monotonic()
    problems, tokenizer = checked(config)
    if problems or tokenizer is None:
        raise ConfigError("\n".join(problems))
    folder = Path(config.output)
    with _claimed(folder), _space(folder):
        old, notes = _begun(folder), list[str]()
        spooled = _spool(config, folder, old, stdin or sys.stdin.buffer) if STDIN in config.inputs else None
        streamed = [name for name in find_inputs(config.inputs).files if name.startswith(hf_datasets.SCHEME)]
        pinned = old.get("pinned") or {name: hf_datasets.pinned(name) for name in streamed}
        work = _tasks(config, pinned, folder)
        if lost := tokenizer.lost():
            notes.append(f"the tokenizer does not keep {' '.join(lost)} and the like: texts lose them")
        identity = {**_identity(config, tokenizer.fingerprint, work), "stdin": spooled, "pinned": pinned}
        _check_identity(folder, old, identity)
        resumed = len(work)
        if not (folder / "manifest.json").exists():
            for name in ("shards", "work"):
                (folder / name).mkdir(exist_ok=True)
            tokenizer.save(folder / "tokenizer")
            encoder = tokenizer.encoder
            del tokenizer  # of tens of thousands of lists, which every collection of garbage would look through
            resumed = _run_tasks(config, folder, encoder, work, progress)
            notes += _finish(config, folder, encoder, work)
        for name in ("work", "stdin"):
            shutil.rmtree(folder / name, ignore_errors=True)
    manifest = ShardReader(folder).manifest
    notes += filter(None, [str(find_inputs(config.inputs))])
    wanted = {"train": 1 - config.validation_fraction, "validation": config.validation_fraction}
    notes += [
        f"no document for {split}: the hash of a document decides, and of {manifest.documents['kept']} none fell there; "
        "give more (a text file is one), or change validation_fraction"
        for split, share in wanted.items()
        if share and not manifest.splits[split].documents
    ]
    return Summary(folder, manifest, time.monotonic() - began, len(work), resumed, tuple(notes))


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """The folder, made and held against a second `prepare` for the time of the block."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(
            f"output = {str(folder)!r}: cannot be made: {error.strerror}; choose another folder"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{folder}: another prepare is writing it; wait for it, or choose another output"
            ) from error
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def _space(folder: Path) -> Iterator[None]:
    """A full disk, met within the block, as one clear error; what was half written is removed."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        _sweep(folder)
        free = shutil.disk_usage(folder).free
        raise DataError(
            f"{folder}: cannot write: {os.strerror(error.errno).lower()} ({free / 1e6:,.0f} MB are free); make space and "
            "start again: it continues, and nothing that was finished is lost"
        ) from error


def _sweep(folder: Path) -> None:
    for path in (*folder.glob("*.tmp.*"), *folder.glob("*/*.tmp.*")):
        path.unlink(missing_ok=True)


def _begun(folder: Path) -> dict[str, Any]:
    """What the run that began the folder wrote into prepare.json; empty if there was none.

    Raises:
        ConfigError: the folder holds something else.
    """
    path = folder / "prepare.json"
    if path.exists():
        return json.loads(path.read_text())
    foreign = sorted(
        p.name for p in folder.iterdir() if p.name != "stdin" and not p.name.startswith("prepare.json.tmp.")
    )
    if foreign:
        raise ConfigError(f"output = {str(folder)!r}: holds other files, as {foreign[0]}; choose a new folder")
    return {}


def _spool_path(config: PrepareConfig, folder: Path) -> Path:
    return folder / "stdin" / ("stdin.jsonl" if config.stdin_format == "jsonl" else "stdin.txt")


def _spool(config: PrepareConfig, folder: Path, old: dict[str, Any], stdin: BinaryIO) -> str:
    """Bytes and hash of standard input, which is now in OUTPUT/stdin, or already in the finished shards.

    A run that continues may be given the same text again, or nothing.

    Raises:
        ConfigError: it is empty, and no earlier run has read it; or it is another text.
    """
    path, seal = _spool_path(config, folder), folder / "stdin" / "sha256"
    whole = (folder / "manifest.json").exists() or (path.exists() and seal.exists())
    known = old.get("stdin") or (seal.read_text() if whole else None)
    path.parent.mkdir(exist_ok=True)
    digest, size = hashlib.sha256(), 0
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    with open(os.devnull if whole else temporary, "wb") as file:
        while not stdin.isatty() and (data := stdin.read(1 << 20)):
            digest.update(data)
            size += file.write(data)
        if not whole:
            file.flush()
            os.fsync(file.fileno())
    found = f"{size} bytes, sha256 {digest.hexdigest()[:16]}"
    if not size and not whole:
        temporary.unlink()
        raise ConfigError("inputs: - is standard input, and it is empty; pipe the text in, from its start")
    if known and size and found != known:
        raise ConfigError(
            f"inputs: - has {found}, but output = {str(folder)!r} was begun with {known}; give the same text again, or "
            "none (< /dev/null), or choose another folder"
        )
    if not whole:
        os.replace(temporary, path)
        if config.stdin_format == "jsonl":
            check_input(str(path), TextField.of(config.text_field))
        write_durably(seal, found.encode())
    return known or found


def _tasks(config: PrepareConfig, pinned: dict[str, str], folder: Path) -> list[Task]:
    """The inputs cut into tasks of about task_bytes, by sizes alone; small files share a task."""
    places = list(find_inputs(config.inputs).files.items())
    if STDIN in config.inputs and _spool_path(config, folder).exists():
        places.append((str(_spool_path(config, folder)), config.inputs.index(STDIN)))
    made: list[Task] = []
    pieces: list[Piece] = []
    size = 0
    for path, entry in sorted(places, key=lambda place: place[1]):
        for piece in cut(pinned.get(path, path), config.task_bytes, TextField.of(config.text_field), entry):
            pieces.append(piece)
            size += piece.bytes
            if size >= config.task_bytes or not piece.bytes:
                made.append(Task(len(made), tuple(pieces)))
                pieces, size = [], 0
    return [*made, Task(len(made), tuple(pieces))] if pieces else made


def _identity(config: PrepareConfig, fingerprint: str, work: list[Task]) -> dict[str, Any]:
    """Whatever the bytes of the result depend on, by field; of the inputs their names and sizes."""
    skipped = {"inputs", "output", "tokenizer", "num_processes"}
    tree = {name: value for name, value in config.model_dump(mode="json").items() if name not in skipped}
    named = [p for task in work for p in task.pieces if config.inputs[p.entry] != STDIN]
    pieces = [[p.path if p.path.startswith(hf_datasets.SCHEME) else Path(p.path).name, p.start, p.stop] for p in named]
    digest = hashlib.sha256(json.dumps(pieces).encode()).hexdigest()[:16]
    inputs = f"{len({p.path for p in named})} files, {sum(p.bytes for p in named)} bytes, digest {digest}"
    fixed = {"format_version": FORMAT_VERSION, "document_hash": tasks.DOCUMENT_HASH}
    return {**tree, **fixed, "inputs": inputs, "tokenizer": fingerprint[:16]}


def _check_identity(folder: Path, old: dict[str, Any], identity: dict[str, Any]) -> None:
    if not old:
        write_durably(folder / "prepare.json", (json.dumps(identity, indent=1, sort_keys=True) + "\n").encode())
        return
    fields = PrepareConfig.model_fields
    old = {**{name: fields[name].default for name in identity if name in fields}, "stdin": None, "pinned": {}, **old}
    changed = [
        f"{name}: was {old.get(name)!r}, now {identity.get(name)!r}"
        for name in sorted({*old, *identity})
        if old.get(name) != identity.get(name)
    ]
    if changed:
        raise ConfigError(
            f"output = {str(folder)!r}: was begun with another configuration: {'; '.join(changed)}; "
            "choose another folder, or delete this one"
        )


def _run_tasks(config: PrepareConfig, folder: Path, encoder: Encoder, work: list[Task], progress: bool) -> int:
    """Number of tasks that were already done; the others are done here."""
    _sweep(folder)
    todo = [task for task in work if not tasks.is_done(folder, task)]
    processes = config.num_processes or len(os.sched_getaffinity(0))
    rules = Rules.of(config)
    with _bar(progress) as line, workers(min(processes, len(todo))) as run:
        if config.deduplicate and todo:
            unscanned = [task for task in work if not tasks.scan_path(folder, task).exists()]
            run(partial(tasks.scan, rules=rules, folder=folder), unscanned, line("scan", unscanned))
            tasks.mark_duplicates(folder, work)
        encode = partial(tasks.tokenize, rules=rules, folder=folder, encoder=encoder)
        run(encode, todo, line("tokenize", todo))
    return len(work) - len(todo)


@contextlib.contextmanager
def _bar(visible: bool) -> Iterator[Callable[[str, list[Task]], Advance]]:
    """A function that begins a line of the progress bar, and gives one that shows how many bytes are done on it."""
    if not visible:
        yield lambda name, work: lambda count: None
        return
    from rich import progress  # which cost some hundred documents, and are not always wanted

    from esolm_megatron.terminal import Terminal

    kinds = (progress.BarColumn, progress.DownloadColumn, progress.TransferSpeedColumn, progress.TimeRemainingColumn)
    columns = (progress.TextColumn("{task.description}", markup=False), *(kind() for kind in kinds))
    with progress.Progress(*columns, console=Terminal(stderr=True), speed_estimate_period=300) as bar:

        def line(name: str, work: list[Task]) -> Advance:
            number = bar.add_task(f"{name:>8}", total=sum(task.bytes for task in work) or None)
            return lambda count: bar.update(number, completed=count)

        yield line


def _source_name(entry: str) -> str:
    """An entry of `inputs` without the folders of this machine."""
    if not entry.startswith(hf_datasets.SCHEME):
        return Path(entry).name
    name = hf_datasets.parse(entry)[0]
    return hf_datasets.SCHEME + (Path(name).name if Path(name).exists() else name)


def _finish(config: PrepareConfig, folder: Path, encoder: Encoder, work: list[Task]) -> list[str]:
    """Put the records together: index, then manifest. Returns what happened to single documents."""
    records = [json.loads(tasks.record_path(folder, task).read_text()) for task in work]
    sources = []
    for entry, name in enumerate(config.inputs):
        counts: Counter[str] = Counter(dict.fromkeys(("read", "kept", *REASONS, "text_bytes"), 0))
        for record in records:
            counts.update(record["counts"].get(str(entry), {}))
        text_bytes = counts.pop("text_bytes")
        sources.append(SourceCounts(name=_source_name(name), text_bytes=text_bytes, documents=dict(counts)))
    total = {fate: sum(source.documents[fate] for source in sources) for fate in ("read", "kept", *REASONS)}
    together = tasks.Notes()
    for record in records:
        for why, (count, first) in record.get("notes", {}).items():
            together.add(why, first, count)
    notes = [f"{count:,} {why}; the first: {first}" for why, (count, first) in together.items()]
    if not total["kept"]:
        said = f"no document is left of {total['read']}: {_left_out(total)}; check inputs, text_field and the limits of length"
        raise DataError("\n".join([said, *notes]))
    rows: list[tuple[int, ...]] = []
    shards: list[dict[str, Any]] = []
    splits = {}
    for number, split in enumerate(SPLITS):
        parts = [record["splits"][split] for record in records]
        begin = len(rows)
        for shard in (shard for part in parts for shard in part["shards"]):
            rows += [(number, len(shards), *block) for block in shard["blocks"]]
            shards.append({**shard, "split": split, "blocks": len(shard["blocks"])})
        sums = {name: sum(part[name] for part in parts) for name in ("documents", "tokens")}
        splits[split] = {**sums, "blocks": len(rows) - begin}
    manifest = {
        "tokenizer_fingerprint": encoder.fingerprint,
        "vocab_size": encoder.vocab_size,
        "eos_id": encoder.eos_id,
        "dtype": tasks.token_dtype(encoder).name,
        "seed": config.seed,
        "block_tokens": config.block_tokens,
        "validation_fraction": config.validation_fraction,
        "text_bytes": sum(source.text_bytes for source in sources),
        "documents": total,
        "sources": [source.model_dump() for source in sources],
        "splits": splits,
        "shards": shards,
    }
    write_manifest(folder, manifest, np.array(rows, BLOCK_DTYPE))
    return notes
