"""Documents to shards of tokens: many processes, bounded memory, and the same bytes whatever happens on the way.

    inputs -> tasks of about task_bytes -> scan: one hash a document -> exact duplicates
                                        -> tokenize: shuffle, encode, split by hash, pack into blocks, write shards
    records of all tasks -> index -> manifest

A task is finished by its record in OUTPUT/work; a run that was killed does the other tasks when it is started again.
What a task writes depends on its documents and the configuration alone. `num_processes` starts processes by spawn: a
program that calls `prepare` needs an `if __name__ == "__main__"` guard.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from esolm_megatron.config import ConfigError, Section, read_tree
from esolm_megatron.data.corpus import Piece, check_first_line, cut, find_files, read_documents
from esolm_megatron.data.shards import (
    BLOCK_DTYPE,
    FORMAT_VERSION,
    SPLITS,
    DataError,
    Manifest,
    Packer,
    ShardReader,
    ShardWriter,
    npy_bytes,
    write_durably,
    write_manifest,
)
from esolm_megatron.data.stream import permutation
from esolm_megatron.data.tokenizer import Tokenizer, TokenizerError, load_tokenizer

_BATCH_BYTES = 1 << 18
_REASONS = ("unreadable", "too_short", "too_long", "duplicate")


class PrepareConfig(Section):
    """How documents become shards of tokens."""

    inputs: tuple[str, ...] = Field(min_length=1)
    """Files, folders and globs of .txt, .py, .md (a document each), .jsonl and .jsonl.gz (a document a line)."""
    output: str = Field(min_length=1)
    """Folder that is written."""
    tokenizer: str = "bytes"
    """bytes, or a folder with tokenizer.json, or with vocab.json and merges.txt."""
    text_field: str = "text"
    """Field of a jsonl line that holds the text."""
    validation_fraction: float = Field(0.005, ge=0, lt=1)
    """Share of the documents kept for validation, chosen by their hash."""
    block_tokens: int = Field(1 << 20, ge=2, lt=1 << 31)
    """Tokens in a block: make it a multiple of seq_length, for a row lies within a block."""
    shard_tokens: int = Field(1 << 27, ge=2)
    """Tokens after which a new shard starts."""
    task_bytes: int = Field(1 << 26, ge=1)
    """Text that a process takes, shuffles and commits at once; it holds about three times that in memory."""
    num_processes: int | None = Field(None, ge=1)
    """Processes; null means one for each usable core. Changes no byte of the result."""
    seed: int = Field(0, ge=0)
    """Seed of the order of documents within a task."""
    min_document_chars: int = Field(1, ge=1)
    """Shorter documents are left out."""
    max_document_chars: int | None = Field(None, ge=1)
    """Longer documents are left out; null means none."""
    deduplicate: bool = True
    """Leave out all but the first of equal documents. Takes 8 bytes of memory a document."""


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

    def __str__(self) -> str:
        counts = self.manifest.documents
        lines = [f"{name}: {c.documents:,} documents, {c.tokens:,} tokens" for name, c in self.manifest.splits.items()]
        left = ", ".join(f"{counts[reason]:,} {reason.replace('_', ' ')}" for reason in _REASONS)
        return "\n".join(
            [
                *lines,
                f"left out: {left}",
                f"{self.manifest.text_bytes:,} bytes of text in {len(self.manifest.shards)} shards",
            ]
        )


@dataclass(frozen=True)
class _Task:
    number: int
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)


def load_prepare_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> PrepareConfig:
    """The checked configuration of a YAML file with overrides `field=value`.

    Raises:
        ConfigError: with every problem, one a line, headed by the file's name.
    """
    tree = read_tree(path, overrides)
    try:
        config, problems = PrepareConfig.model_validate(tree), []
    except ValidationError as error:
        config, problems = None, [_problem(item) for item in error.errors()]
    problems += _checked(config)[0] if config is not None else []
    if config is None or problems:
        raise ConfigError("\n".join([f"{path}:", *problems]))
    return config


def _problem(item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "missing":
        return f"{path}: missing; give it a value"
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path, PrepareConfig.model_fields, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(PrepareConfig.model_fields)}"
        return f"{path} = {item['input']!r}: no such field; {hint}"
    return f"{path} = {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _checked(config: PrepareConfig) -> tuple[list[str], Tokenizer | None]:
    """What is wrong with the configuration, and its tokenizer if there is one."""
    c, out = config, []
    if c.shard_tokens < c.block_tokens:
        out.append(f"shard_tokens = {c.shard_tokens}: must be block_tokens = {c.block_tokens} or more")
    if c.max_document_chars is not None and c.max_document_chars < c.min_document_chars:
        out.append(
            f"max_document_chars = {c.max_document_chars}: must be min_document_chars = {c.min_document_chars} or more"
        )
    try:
        for path in find_files(c.inputs):
            check_first_line(path, c.text_field)
    except ConfigError as error:
        out.append(str(error))
    try:
        return out, load_tokenizer(c.tokenizer)
    except TokenizerError as error:
        return [*out, f"tokenizer = {c.tokenizer!r}: {error}"], None


def _tasks(config: PrepareConfig) -> list[_Task]:
    """The inputs cut into tasks of about task_bytes, by sizes alone; small files share a task."""
    tasks: list[_Task] = []
    pieces: list[Piece] = []
    size = 0
    for piece in (piece for path in find_files(config.inputs) for piece in cut(path, config.task_bytes)):
        pieces.append(piece)
        size += piece.stop - piece.start
        if size >= config.task_bytes:
            tasks.append(_Task(len(tasks), tuple(pieces)))
            pieces, size = [], 0
    return [*tasks, _Task(len(tasks), tuple(pieces))] if pieces else tasks


def prepare(config: PrepareConfig, progress: bool = True) -> Summary:
    """The summary of the folder `config.output`, which is written here, or continued, or found to be finished.

    Raises:
        ConfigError: the configuration cannot run, or the folder was made with another one.
        DataError: no document was left, an input changed meanwhile, or a process died.
    """
    began = time.monotonic()
    problems, tokenizer = _checked(config)
    if problems or tokenizer is None:
        raise ConfigError("\n".join(problems))
    folder, tasks = Path(config.output), _tasks(config)
    with _claimed(folder):
        _check_identity(folder, _identity(config, tokenizer, tasks))
        resumed = len(tasks)
        if not (folder / "manifest.json").exists():
            for name in ("shards", "work"):
                (folder / name).mkdir(exist_ok=True)
            tokenizer.save(folder / "tokenizer")
            resumed = _run_tasks(config, folder, tokenizer, tasks, progress)
            _finish(config, folder, tokenizer, tasks)
        shutil.rmtree(folder / "work", ignore_errors=True)
    manifest = ShardReader(folder).manifest
    return Summary(folder, manifest, time.monotonic() - began, len(tasks), resumed)


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """The folder, made and held against a second `prepare` for the time of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
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


def _identity(config: PrepareConfig, tokenizer: Tokenizer, tasks: list[_Task]) -> dict[str, Any]:
    """Whatever the bytes of the result depend on, by field; of the inputs their names and sizes."""
    tree = config.model_dump(mode="json", exclude={"inputs", "output", "tokenizer", "num_processes"})
    pieces = [[Path(p.path).name, p.start, p.stop] for task in tasks for p in task.pieces]
    digest = hashlib.sha256(json.dumps(pieces).encode()).hexdigest()[:16]
    files = len({p.path for task in tasks for p in task.pieces})
    inputs = f"{files} files, {sum(task.bytes for task in tasks)} bytes, digest {digest}"
    return {**tree, "format_version": FORMAT_VERSION, "inputs": inputs, "tokenizer": tokenizer.fingerprint[:16]}


def _check_identity(folder: Path, identity: dict[str, Any]) -> None:
    path = folder / "prepare.json"
    if not path.exists():
        foreign = sorted(p.name for p in folder.iterdir() if not p.name.startswith("prepare.json.tmp."))
        if foreign:
            raise ConfigError(f"output = {str(folder)!r}: holds other files, as {foreign[0]}; choose a new folder")
        write_durably(path, (json.dumps(identity, indent=1, sort_keys=True) + "\n").encode())
        return
    old = json.loads(path.read_text())
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


def _run_tasks(config: PrepareConfig, folder: Path, tokenizer: Tokenizer, tasks: list[_Task], progress: bool) -> int:
    """Number of tasks that were already done; the others are done here."""
    for path in (*folder.glob("*.tmp.*"), *folder.glob("*/*.tmp.*")):
        path.unlink(missing_ok=True)
    todo = [task for task in tasks if not _is_done(folder, task)]
    processes = config.num_processes or len(os.sched_getaffinity(0))
    columns = (TextColumn("{task.description}"), BarColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        if config.deduplicate and todo:
            unscanned = [task for task in tasks if not _scan_path(folder, task).exists()]
            done = _line(bar, "scan", sum(task.bytes for task in unscanned))
            _run(partial(_scan, config=config, folder=folder), unscanned, processes, done)
            _mark_duplicates(folder, tasks)
        done = _line(bar, "tokenize", sum(task.bytes for task in todo))
        work = partial(_tokenize, config=config, folder=folder, fingerprint=tokenizer.fingerprint)
        _run(work, todo, processes, done)
    return len(tasks) - len(todo)


def _line(bar: Progress, name: str, total: int) -> Callable[[int], None]:
    """A function that counts bytes done on a new line of the progress bar."""
    line = bar.add_task(f"{name:>8}", total=total)
    return lambda count: bar.advance(line, count)


def _run(work: Callable[[_Task], None], tasks: list[_Task], processes: int, done: Callable[[int], None]) -> None:
    if processes == 1 or len(tasks) < 2:
        for task in tasks:
            work(task)
            done(task.bytes)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(tasks)), context, _start_process) as pool:
        try:
            futures: dict[Future[None], _Task] = {pool.submit(work, task): task for task in tasks}
            for future in as_completed(futures):
                future.result()
                done(futures[future].bytes)
        except BrokenProcessPool as error:
            raise DataError(
                "a process of prepare died, as for want of memory; start it again, it continues; if it dies again, "
                "lower task_bytes or num_processes"
            ) from error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _start_process() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _stop_if_orphan() -> None:
    """End this process if the one that started it was killed: the next run must not meet its writes."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)


def _scan_path(folder: Path, task: _Task) -> Path:
    return folder / "work" / f"scan-{task.number:05d}.npy"


def _duplicate_path(folder: Path, task: _Task) -> Path:
    return folder / "work" / f"duplicate-{task.number:05d}.npy"


def _record_path(folder: Path, task: _Task) -> Path:
    return folder / "work" / f"task-{task.number:05d}.json"


def _is_done(folder: Path, task: _Task) -> bool:
    path = _record_path(folder, task)
    if not path.exists():
        return False
    shards = [shard for split in json.loads(path.read_text())["splits"].values() for shard in split["shards"]]
    places = [(folder / "shards" / shard["name"], shard["bytes"]) for shard in shards]
    return all(place.exists() and place.stat().st_size == size for place, size in places)


def _documents(task: _Task, config: PrepareConfig, counts: Counter[str]) -> Iterator[tuple[str, bytes, int]]:
    """Text, UTF-8 bytes and hash of the documents of a task that are readable and neither too short nor too long."""
    most = config.max_document_chars or float("inf")
    for piece in task.pieces:
        for document in _read(piece, config.text_field):
            counts["read"] += 1
            if document is None:
                counts["unreadable"] += 1
            elif len(document[0]) < config.min_document_chars:
                counts["too_short"] += 1
            elif len(document[0]) > most:
                counts["too_long"] += 1
            else:
                yield *document, int.from_bytes(hashlib.blake2b(document[1], digest_size=8).digest(), "little")


def _read(piece: Piece, text_field: str) -> Iterator[tuple[str, bytes] | None]:
    try:
        yield from read_documents(piece, text_field)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{piece.path}: cannot be read to its end: {error}; repair it or leave it out") from error


def _scan(task: _Task, config: PrepareConfig, folder: Path) -> None:
    """Write the hash of each document of a task."""
    hashes = np.fromiter((hash_ for _, _, hash_ in _documents(task, config, Counter())), "<u8")
    _stop_if_orphan()
    write_durably(_scan_path(folder, task), npy_bytes(hashes))


def _mark_duplicates(folder: Path, tasks: list[_Task]) -> None:
    """Write for each task which of its documents came before, in it or in a task before it."""
    scans = [np.load(_scan_path(folder, task), allow_pickle=False) for task in tasks]
    hashes = np.concatenate(scans)
    duplicate = np.ones(len(hashes), bool)
    duplicate[np.unique(hashes, return_index=True)[1]] = False
    ends = np.cumsum([len(scan) for scan in scans])
    for task, marks in zip(tasks, np.split(duplicate, ends[:-1]), strict=True):
        write_durably(_duplicate_path(folder, task), npy_bytes(marks))


@lru_cache(maxsize=2)
def _worker_tokenizer(folder: str, fingerprint: str) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != fingerprint:
        raise DataError(f"{folder}: holds another tokenizer than prepare began with; delete the output and start again")
    return tokenizer


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    """The smallest type for all tokens and the mask."""
    return np.dtype("<u2" if tokenizer.vocab_size < 1 << 16 else "<u4")


def _tokenize(task: _Task, config: PrepareConfig, folder: Path, fingerprint: str) -> None:
    """Write the shards of a task, then its record."""
    tokenizer = _worker_tokenizer(str(folder / "tokenizer"), fingerprint)
    packers = {}
    for split in SPLITS:
        stem = f"{split}-{task.number:05d}"
        writer = ShardWriter(folder / "shards", stem, config.shard_tokens)
        packers[split] = Packer(writer, stem, config.block_tokens, _dtype(tokenizer), tokenizer.eos_id)
    counts: Counter[str] = Counter()
    text_bytes, limit = 0, round(config.validation_fraction * 1_000_000)
    for number, chunk in enumerate(_chunks(_kept(task, config, folder, counts), config.task_bytes)):
        order = permutation(len(chunk), config.seed, "documents", task.number, number)
        for batch in _chunks((chunk[index] for index in order), _BATCH_BYTES):
            _stop_if_orphan()
            arrays = tokenizer.encode_arrays([text for text, _, _ in batch])
            for ids, (_, size, hash_) in zip(arrays, batch, strict=True):
                packers["validation" if hash_ % 1_000_000 < limit else "train"].add(ids)
                text_bytes += size
    splits = {}
    for split, packer in packers.items():
        packer.close()
        splits[split] = {"documents": packer.documents, "tokens": packer.tokens, "shards": packer.writer.shards}
    record = {"counts": counts, "text_bytes": text_bytes, "splits": splits}
    write_durably(_record_path(folder, task), json.dumps(record).encode())


def _kept(task: _Task, config: PrepareConfig, folder: Path, counts: Counter[str]) -> Iterator[tuple[str, int, int]]:
    """Text, UTF-8 size and hash of the documents of a task that are not left out; `counts` gets all of them by fate."""
    found = enumerate(_documents(task, config, counts))
    if config.deduplicate:
        scan = np.load(_scan_path(folder, task), allow_pickle=False)
        duplicate = np.load(_duplicate_path(folder, task), allow_pickle=False)
    seen = 0
    for index, (text, data, hash_) in found:
        seen += 1
        if config.deduplicate and (index >= len(scan) or scan[index] != hash_):
            break
        if config.deduplicate and duplicate[index]:
            counts["duplicate"] += 1
            continue
        counts["kept"] += 1
        yield text, len(data), hash_
    if config.deduplicate and (seen != len(scan) or (seen and scan[seen - 1] != hash_)):
        names = ", ".join(sorted({piece.path for piece in task.pieces})[:3])
        raise DataError(f"{names}: changed while they were prepared; delete the output and start again")


def _chunks(documents: Iterable[tuple[str, int, int]], size: int) -> Iterator[list[tuple[str, int, int]]]:
    """Lists of documents of about `size` bytes of text together."""
    chunk: list[tuple[str, int, int]] = []
    total = 0
    for document in documents:
        chunk.append(document)
        total += document[1]
        if total >= size:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


def _finish(config: PrepareConfig, folder: Path, tokenizer: Tokenizer, tasks: list[_Task]) -> None:
    """Put the records together: index, then manifest."""
    records = [json.loads(_record_path(folder, task).read_text()) for task in tasks]
    counts: Counter[str] = Counter(dict.fromkeys(("read", "kept", *_REASONS), 0))
    for record in records:
        counts.update(record["counts"])
    if not counts["kept"]:
        left = ", ".join(f"{counts[reason]} {reason.replace('_', ' ')}" for reason in _REASONS)
        raise DataError(
            f"no document is left of {counts['read']}: {left}; check inputs, text_field and min_document_chars"
        )
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
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "dtype": _dtype(tokenizer).name,
        "seed": config.seed,
        "block_tokens": config.block_tokens,
        "validation_fraction": config.validation_fraction,
        "text_bytes": sum(record["text_bytes"] for record in records),
        "documents": dict(counts),
        "splits": splits,
        "shards": shards,
    }
    write_manifest(folder, manifest, np.array(rows, BLOCK_DTYPE))
