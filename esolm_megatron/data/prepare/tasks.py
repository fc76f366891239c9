"""What one process does with one task of `prepare`: hash its documents, then make shards of their tokens.

What a task writes depends on its documents and the configuration alone. Every file appears under its name only when it is
whole, so a process may be killed at any moment.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
from xxhash import xxh3_64_intdigest

from esolm_megatron.data.prepare.inputs import Bad, Found, Meter, Piece, place, read_documents
from esolm_megatron.data.prepare.text_field import TextField
from esolm_megatron.data.shards.writer import SPLITS, Packer, ShardWriter, npy_bytes, write_durably
from esolm_megatron.data.stream.shuffle import permutation
from esolm_megatron.data.tokenizer import Encoder
from esolm_megatron.errors import DataError

REASONS = ("unreadable", "too_short", "too_long", "duplicate")
SCAN_DTYPE = np.dtype("<u8")
"""Of the hashes of documents."""
DOCUMENT_HASH = "xxh3_64"

_BATCH_BYTES = 1 << 18
_HASHES_AT_ONCE = 1 << 25
_ADVANCE_DOCUMENTS = 256

Advance = Callable[[int], None]
"""Told how many bytes of the task, as stored, are done."""
Counts = dict[int, Counter[str]]
"""Documents by entry of `inputs` and fate, and `text_bytes`, the bytes of those that are kept."""
SLOWLY = "encoded by the slow engine, for tiktoken refuses it"


class Notes(dict[str, tuple[int, str]]):
    """What happened to single documents: how often, and where first."""

    def add(self, why: str, where: str, count: int = 1) -> None:
        """Once more, or `count` times."""
        before, first = self.get(why, (0, where))
        self[why] = before + count, first


class Document(NamedTuple):
    """A document that is kept."""

    text: str
    size: int
    """Bytes of UTF-8."""
    hash: int
    piece: Piece
    number: int
    """In the piece, as `place` takes it."""


@dataclass(frozen=True)
class Rules:
    """The fields of a PrepareConfig that tasks go by, without pydantic: processes start sooner."""

    text_field: TextField
    encoding: str
    on_error: str
    validation_fraction: float
    block_tokens: int
    shard_tokens: int
    task_bytes: int
    seed: int
    min_document_chars: int
    max_document_chars: int | None
    min_document_bytes: int
    max_document_bytes: int | None
    deduplicate: bool

    @classmethod
    def of(cls, config: object) -> Rules:
        """Those of a PrepareConfig."""
        values = {field.name: getattr(config, field.name) for field in fields(cls)}
        return cls(**{**values, "text_field": TextField.of(values["text_field"])})


@dataclass(frozen=True)
class Task:
    """Pieces of inputs that are read, shuffled and committed together."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        """Size of its pieces as stored."""
        return sum(piece.bytes for piece in self.pieces)


def scan_path(folder: Path, task: Task) -> Path:
    """Where the hashes of a task's documents lie."""
    return folder / "work" / f"scan-{task.number:05d}.npy"


def record_path(folder: Path, task: Task) -> Path:
    """The file that says that a task is done, and what it made."""
    return folder / "work" / f"task-{task.number:05d}.json"


def _duplicate_path(folder: Path, task: Task) -> Path:
    return folder / "work" / f"duplicate-{task.number:05d}.npy"


def is_done(folder: Path, task: Task) -> bool:
    """The task's record is there, and so are the shards that it names."""
    path = record_path(folder, task)
    if not path.exists():
        return False
    shards = [shard for split in json.loads(path.read_text())["splits"].values() for shard in split["shards"]]
    places = [(folder / "shards" / shard["name"], shard["bytes"]) for shard in shards]
    return all(place.exists() and place.stat().st_size == size for place, size in places)


def scan(task: Task, advance: Advance, rules: Rules, folder: Path) -> None:
    """Write the hash of each document of a task."""
    rows, meter = [], Meter()
    for _, _, data, _ in _documents(task, rules, {}, Notes(), meter):
        rows.append(xxh3_64_intdigest(data))
        if len(rows) % _ADVANCE_DOCUMENTS == 0:
            advance(meter.done)
    write_durably(scan_path(folder, task), npy_bytes(np.array(rows, SCAN_DTYPE)))


def mark_duplicates(folder: Path, tasks: list[Task], at_once: int = _HASHES_AT_ONCE) -> None:
    """Write for each task which of its documents came before, in it or in a task before it.

    Memory: a byte a document, and 64 bytes for each of `at_once` documents whose hashes are compared together.
    """
    marks = [np.zeros(len(np.load(scan_path(folder, task), mmap_mode="r")), bool) for task in tasks]
    firsts = np.cumsum([0, *map(len, marks)])
    parts = int(firsts[-1]) // at_once + 1
    for part in range(parts):
        hashes, places = [], []
        for task, first in zip(tasks, firsts[:-1], strict=True):
            found = np.load(scan_path(folder, task), allow_pickle=False)
            mine = np.flatnonzero(found % np.uint64(parts) == part)
            hashes.append(found[mine])
            places.append(mine + first)
        together = np.concatenate(hashes)
        order = np.argsort(together, kind="stable")
        again = order[1:][together[order[1:]] == together[order[:-1]]]
        again = np.sort(np.concatenate(places)[again])
        for mark, begin, end in zip(marks, firsts[:-1], firsts[1:], strict=True):
            mark[again[np.searchsorted(again, begin) : np.searchsorted(again, end)] - begin] = True
    for task, mark in zip(tasks, marks, strict=True):
        write_durably(_duplicate_path(folder, task), npy_bytes(mark))


def tokenize(task: Task, advance: Advance, rules: Rules, folder: Path, encoder: Encoder) -> None:
    """Write the shards of a task, then its record.

    Raises:
        DataError: the inputs changed after they were scanned, or cannot be read.
    """
    packers = {}
    for split in SPLITS:
        stem = f"{split}-{task.number:05d}"
        writer = ShardWriter(folder / "shards", stem, rules.shard_tokens)
        packers[split] = Packer(writer, stem, rules.block_tokens, token_dtype(encoder), encoder.eos_id)
    train, validation = packers["train"], packers["validation"]
    counts, notes = Counts(), Notes()
    meter, before, limit = Meter(), 0, round(rules.validation_fraction * 1_000_000)
    for number, chunk in enumerate(_chunks(_kept(task, rules, folder, counts, notes, meter), rules.task_bytes)):
        order = permutation(len(chunk), rules.seed, "documents", task.number, number).tolist()
        size, done, read = sum(document.size for document in chunk), 0, meter.done - before
        for batch in _chunks((chunk[index] for index in order), _BATCH_BYTES):
            for ids, document in _encoded(batch, encoder, rules, counts, notes):
                (validation if document.hash % 1_000_000 < limit else train).add(ids)
                done += document.size
            advance(before + read * done // size)
        before += read
    splits = {}
    for split, packer in packers.items():
        packer.close()
        splits[split] = {"documents": packer.documents, "tokens": packer.tokens, "shards": packer.writer.shards}
    write_durably(record_path(folder, task), json.dumps({"counts": counts, "notes": notes, "splits": splits}).encode())


def token_dtype(encoder: Encoder) -> np.dtype:
    """The smallest type for all tokens and the mask."""
    return np.dtype("<u2" if encoder.vocab_size < 1 << 16 else "<u4")


def _encoded(
    batch: list[Document], encoder: Encoder, rules: Rules, counts: Counts, notes: Notes
) -> Iterator[tuple[np.ndarray, Document]]:
    """Token ids of the documents; one that no engine encodes is named, and ends the task or is left out."""
    try:
        slow: list[int] = []
        arrays = encoder.encode_arrays([document.text for document in batch], slow)
        for index in slow:
            notes.add(SLOWLY, place(batch[index].piece, batch[index].number))
        yield from zip(arrays, batch, strict=True)
        return
    except Exception as error:  # the library raises whatever its parts do
        if len(batch) == 1:
            (document,) = batch
            where = place(document.piece, document.number)
            if rules.on_error == "stop":
                said = f"{where}: cannot be encoded: {type(error).__name__}: {error}; repair it, or set on_error=skip"
                raise DataError(said) from error
            notes.add("that no engine can encode", f"{where}, {type(error).__name__}: {error}")
            counts[document.piece.entry].update(kept=-1, unreadable=1, text_bytes=-document.size)
            return
    for document in batch:
        yield from _encoded([document], encoder, rules, counts, notes)


def _documents(
    task: Task, rules: Rules, counts: Counts, notes: Notes, meter: Meter
) -> Iterator[tuple[Piece, str, bytes, int]]:
    """Piece, text, UTF-8 bytes and number of the documents of a task that are readable and neither too short nor too long.

    One of nothing but blanks is empty, and so too short.
    """
    r, none = rules, float("inf")
    most_chars, most_bytes = r.max_document_chars or none, r.max_document_bytes or none
    before = 0
    for piece in task.pieces:
        count, inside = counts.setdefault(piece.entry, Counter()), Meter()
        for document in _read(piece, r, inside):
            count["read"] += 1
            meter.done = before + inside.done
            if isinstance(document, Bad):
                count["unreadable"] += 1
                notes.add(document.why, ", ".join(filter(None, [place(piece, document.number), document.detail])))
                continue
            text, data, number = document
            if len(text) < r.min_document_chars or len(data) < r.min_document_bytes or not text or text.isspace():
                count["too_short"] += 1
            elif len(text) > most_chars or len(data) > most_bytes:
                count["too_long"] += 1
            else:
                yield piece, text, data, number
        before += piece.bytes
        meter.done = before


def _read(piece: Piece, rules: Rules, meter: Meter) -> Iterator[Found]:
    try:
        yield from read_documents(piece, rules.text_field, rules.encoding, meter)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{piece.path}: cannot be read to its end: {error}; repair it or leave it out") from error


def _kept(task: Task, rules: Rules, folder: Path, counts: Counts, notes: Notes, meter: Meter) -> Iterator[Document]:
    """The documents of a task that are not left out; `counts` gets all of them by fate."""
    hashes = duplicate = None
    if rules.deduplicate:
        hashes = np.load(scan_path(folder, task), allow_pickle=False).tolist()
        duplicate = np.load(_duplicate_path(folder, task), allow_pickle=False)
    index, same = 0, True
    for piece, text, data, number in _documents(task, rules, counts, notes, meter):
        count, hashed = counts[piece.entry], xxh3_64_intdigest(data)
        same = hashes is None or (index < len(hashes) and hashed == hashes[index])
        if not same:
            break
        if duplicate is not None and duplicate[index]:
            count["duplicate"] += 1
        else:
            count["kept"] += 1
            count["text_bytes"] += len(data)
            yield Document(text, len(data), hashed, piece, number)
        index += 1
    if not same or (hashes is not None and index < len(hashes)):
        names = ", ".join(sorted({piece.path for piece in task.pieces})[:3])
        raise DataError(f"{names}: changed while they were prepared; delete the output and start again")


def _chunks(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    """Lists of documents of about `size` bytes of text together."""
    chunk: list[Document] = []
    total = 0
    for document in documents:
        chunk.append(document)
        total += document.size
        if total >= size:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk
