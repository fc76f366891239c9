"""Small corpora, and what tests do with them."""

import json
import random
from pathlib import Path

from esolm_megatron.data.prepare import PrepareConfig

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
