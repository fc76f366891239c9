"""A look into prepared tokens: is everything as it was written, what is it like, and what does it say."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from esolm_megatron.data.shards import Manifest, ShardCorrupt, ShardReader
from esolm_megatron.data.shards.format import SPLITS
from esolm_megatron.data.stream import ValidationSet
from esolm_megatron.data.token_plots import draw
from esolm_megatron.data.tokenizer import TokenizerError, load_tokenizer


@dataclass(frozen=True)
class Report:
    """What `verify` found: counts from the shards themselves, and `problems`, one sentence each."""

    shards: int
    blocks: int
    tokens: dict[str, int]
    documents: dict[str, int]
    problems: tuple[str, ...]
    bytes_per_token: float
    """UTF-8 bytes of text, from the manifest, for each token, end-of-text tokens included."""
    longest_document: int
    """Tokens of the longest document, its end-of-text token included."""
    median_document: float
    unused_vocabulary: float
    """Share of the vocabulary that occurs nowhere."""

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems

    def __str__(self) -> str:
        counts = [f"{name}: {self.documents[name]:,} documents, {self.tokens[name]:,} tokens" for name in self.tokens]
        unused = f"{self.unused_vocabulary:.1%} of the vocabulary is unused"
        lengths = f"documents: median {self.median_document:,.0f} tokens, longest {self.longest_document:,}"
        text = f"{self.bytes_per_token:.3f} bytes of text for each token; {unused}"
        return "\n".join([f"{self.blocks:,} blocks in {self.shards:,} shards", *counts, text, lengths])


class _Statistics:
    """Counts of tokens and lengths of documents, gathered block by block in storage order."""

    def __init__(self, manifest: Manifest):
        self.eos_id = manifest.eos_id
        self.token_counts = np.zeros(manifest.vocab_size, np.int64)
        self.lengths: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        self._begun = dict.fromkeys(SPLITS, 0)

    def add(self, split: str, values: np.ndarray) -> None:
        """Count the tokens of the next block of `split`."""
        self.token_counts += np.bincount(values, minlength=len(self.token_counts))[: len(self.token_counts)]
        ends = np.flatnonzero(values == self.eos_id) + 1
        if len(ends):
            lengths = np.diff(ends, prepend=0)
            lengths[0] += self._begun[split]
            self.lengths[split].append(lengths)
            self._begun[split] = len(values) - int(ends[-1])
        else:
            self._begun[split] += len(values)

    def document_lengths(self) -> dict[str, np.ndarray]:
        """Tokens of each document, by split."""
        return {split: np.concatenate([np.zeros(0, np.int64), *parts]) for split, parts in self.lengths.items()}


def verify(folder: str | Path, plot: str | Path | None = None) -> Report:
    """What the shards themselves hold, and every way in which it is not what the manifest says.

    plot: a PNG of the statistics that is written.

    Raises:
        DataError: the manifest, the index or the size of a shard is already wrong.
        ConfigError: the picture cannot be drawn.
    """
    reader = ShardReader(folder)
    manifest, problems = reader.manifest, [*_wrong_shards(reader), *_wrong_tokenizer(reader)]
    tokens, documents = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    statistics = _Statistics(manifest)
    for split in SPLITS:
        for block in reader.split_blocks(split).tolist():
            try:
                values = np.empty(int(reader.blocks[block]["num_tokens"]), reader.dtype)
                starts = reader.read_into(block, 0, values)
            except ShardCorrupt as error:
                problems.append(str(error))
                continue
            tokens[split] += len(values)
            documents[split] += len(starts)
            statistics.add(split, values)
            problems += [
                f"{reader.shard_path(int(reader.blocks[block]['shard']))}: block {block}: {text}"
                for text in _block_problems(values, starts, manifest)
            ]
        for name, number in (("tokens", tokens[split]), ("documents", documents[split])):
            said = getattr(manifest.splits[split], name)
            if number != said:
                problems.append(f"split {split}: has {number} {name}, the manifest says {said}")
    reader.close()
    lengths = statistics.document_lengths()
    if plot is not None:
        draw(plot, f"{Path(folder).name}: {sum(tokens.values()):,} tokens", statistics.token_counts, lengths)
    every = np.concatenate([*lengths.values()])
    return Report(
        len(manifest.shards),
        len(reader.blocks),
        tokens,
        documents,
        tuple(problems),
        bytes_per_token=manifest.text_bytes / max(1, sum(tokens.values())),
        longest_document=int(every.max(initial=0)),
        median_document=float(np.median(every)) if len(every) else 0.0,
        unused_vocabulary=float((statistics.token_counts == 0).mean()),
    )


def _wrong_shards(reader: ShardReader) -> Iterator[str]:
    for number, shard in enumerate(reader.manifest.shards):
        with open(reader.shard_path(number), "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard.sha256:
            yield f"{reader.shard_path(number)}: has sha256 {found[:16]}..., the manifest says {shard.sha256[:16]}..."


def _wrong_tokenizer(reader: ShardReader) -> Iterator[str]:
    try:
        if load_tokenizer(reader.folder / "tokenizer").fingerprint != reader.manifest.tokenizer_fingerprint:
            yield f"{reader.folder / 'tokenizer'}: is not the tokenizer of this data; copy it again"
    except TokenizerError as error:
        yield str(error)


def _block_problems(values: np.ndarray, starts: np.ndarray, manifest: Manifest) -> list[str]:
    out = []
    if values.max() >= manifest.vocab_size:
        out.append(f"token {values.max()} at {values.argmax()} is not below vocab_size = {manifest.vocab_size}")
    if (np.diff(starts) <= 0).any() or (len(starts) and starts[-1] >= len(values)):
        out.append("document starts do not rise within the block")
    elif not np.array_equal(starts[starts > 0], np.flatnonzero(values[:-1] == manifest.eos_id) + 1):
        out.append("document starts are not the places after end-of-text tokens")
    return out


@dataclass(frozen=True)
class Row:
    """A row of tokens as text, cut where documents start."""

    parts: tuple[str, ...]
    """Texts of the documents, or the parts of them that lie in the row; each that ends here ends with its end of text."""
    continues: bool
    """The first part began in the row before."""


def show(folder: str | Path, split: str = "train", rows: int = 4, seq_length: int = 256) -> list[Row]:
    """The first `rows` rows of `seq_length` tokens of a split, in storage order."""
    data = ValidationSet(folder, split=split, seq_length=seq_length)
    tokenizer = load_tokenizer(Path(folder) / "tokenizer")
    batch = data.rows(range(min(rows, len(data))))
    data.close()
    out, continues = [], False
    for tokens, valid, starts in zip(batch.tokens, batch.valid, batch.documents, strict=True):
        parts = np.split(tokens[valid], starts)
        out.append(Row(tuple(tokenizer.decode(part.tolist()) for part in parts), continues))
        continues = bool(parts[-1][-1] != tokenizer.eos_id)
    return out
