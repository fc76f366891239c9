"""A look into prepared tokens: is everything as it was written, and what does it say."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from esolm_megatron.data.shards import SPLITS, Manifest, ShardCorrupt, ShardReader
from esolm_megatron.data.stream import ValidationSet
from esolm_megatron.data.tokenizer import TokenizerError, load_tokenizer


@dataclass(frozen=True)
class Report:
    """What `verify` found: counts from the shards themselves, and `problems`, one sentence each."""

    shards: int
    blocks: int
    tokens: dict[str, int]
    documents: dict[str, int]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems


def verify(folder: str | Path) -> Report:
    """What the shards themselves hold, and every way in which it is not what the manifest says.

    Raises:
        DataError: the manifest, the index or the size of a shard is already wrong.
    """
    reader = ShardReader(folder)
    manifest, problems = reader.manifest, []
    for number, shard in enumerate(manifest.shards):
        with open(reader.shard_path(number), "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard.sha256:
            problems.append(
                f"{reader.shard_path(number)}: has sha256 {found[:16]}..., the manifest says {shard.sha256[:16]}..."
            )
    try:
        fingerprint = load_tokenizer(reader.folder / "tokenizer").fingerprint
        if fingerprint != manifest.tokenizer_fingerprint:
            problems.append(f"{reader.folder / 'tokenizer'}: is not the tokenizer of this data; copy it again")
    except TokenizerError as error:
        problems.append(str(error))
    tokens, documents = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        for block in reader.split_blocks(split).tolist():
            try:
                values, starts = _read_block(reader, block)
            except ShardCorrupt as error:
                problems.append(str(error))
                continue
            tokens[split] += len(values)
            documents[split] += len(starts)
            problems += [
                f"{reader.shard_path(int(reader.blocks[block]['shard']))}: block {block}: {text}"
                for text in _block_problems(values, starts, manifest)
            ]
        for name, number in (("tokens", tokens[split]), ("documents", documents[split])):
            said = getattr(manifest.splits[split], name)
            if number != said:
                problems.append(f"split {split}: has {number} {name}, the manifest says {said}")
    reader.close()
    return Report(len(manifest.shards), len(reader.blocks), tokens, documents, tuple(problems))


def _read_block(reader: ShardReader, block: int) -> tuple[np.ndarray, np.ndarray]:
    values = np.empty(int(reader.blocks[block]["num_tokens"]), reader.dtype)
    starts = reader.documents(block)
    reader.read_into(block, 0, values)
    return values, starts


def _block_problems(values: np.ndarray, starts: np.ndarray, manifest: Manifest) -> list[str]:
    out = []
    if values.max() >= manifest.vocab_size:
        out.append(f"token {values.max()} at {values.argmax()} is not below vocab_size = {manifest.vocab_size}")
    if (np.diff(starts) <= 0).any() or (len(starts) and starts[-1] >= len(values)):
        out.append("document starts do not rise within the block")
    elif not np.array_equal(starts[starts > 0], np.flatnonzero(values[:-1] == manifest.eos_id) + 1):
        out.append("document starts are not the places after end-of-text tokens")
    return out


def show(folder: str | Path, split: str = "train", rows: int = 4, seq_length: int = 256) -> list[str]:
    """The first `rows` rows of `seq_length` tokens of a split, in storage order, as text."""
    data = ValidationSet(folder, split=split, seq_length=seq_length)
    tokenizer = load_tokenizer(Path(folder) / "tokenizer")
    batch = data.rows(range(min(rows, len(data))))
    data.close()
    return [tokenizer.decode(row[valid].tolist()) for row, valid in zip(batch.tokens, batch.valid, strict=True)]
