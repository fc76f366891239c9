"""Small corpora, and what tests do with them."""

import json
import random
from pathlib import Path

import numpy as np

from esolm_megatron.data.prepare import PrepareConfig
from esolm_megatron.data.shards import ShardReader
from esolm_megatron.data.tokenizer import load_tokenizer

WORDS = [
    "def",
    "return",
    "the",
    "a",
    "self",
    "of",
    "import",
    "été",
    "東京",
    "value",
    "=",
    "(",
    ")",
    ":",
    "0",
    "17",
    "lambda",
    "x",
    "y",
    "z",
    "None",
]


def write_documents(path: Path, count: int, seed: int = 3) -> list[str]:
    """Texts of `count` different documents, written to `path` as jsonl."""
    draw = random.Random(seed)
    texts = [f"{n} " + " ".join(draw.choices(WORDS, k=draw.randrange(1, 61))) for n in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)))
    return texts


def small_config(inputs: Path, output: Path, **changes) -> PrepareConfig:
    values = {
        "inputs": [str(inputs)],
        "output": str(output),
        "validation_fraction": 0.1,
        "block_tokens": 1009,
        "shard_tokens": 5003,
        "task_bytes": 13007,
        "num_processes": 1,
    }
    return PrepareConfig.model_validate({**values, **changes})


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stored_documents(folder: Path, split: str) -> list[str]:
    """Texts of a split, from its blocks alone."""
    reader = ShardReader(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    ids: list[int] = []
    for block in reader.split_blocks(split).tolist():
        values = np.empty(int(reader.blocks[block]["num_tokens"]), reader.dtype)
        reader.read_into(block, 0, values)
        ids += values.tolist()
    texts = tokenizer.decode(ids).split("<|endoftext|>")
    assert texts.pop() == ""
    return texts
