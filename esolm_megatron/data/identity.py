"""What a checkpoint remembers of its data, so that a resumed run can say what has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from esolm_megatron.data.shards import ShardReader

_LISTED_SHARDS = 4096
_DIGITS = 8


def summary(reader: ShardReader, split: str) -> dict[str, Any]:
    """A few facts of a source. shards: the first digits of each shard's hash, or of all together where they are many."""
    m = reader.manifest
    hashes = [shard.sha256 for shard in m.shards]
    listed = len(hashes) <= _LISTED_SHARDS
    together = hashlib.sha256("".join(hashes).encode()).hexdigest()
    return {
        "fingerprint": reader.fingerprint,
        "tokenizer": m.tokenizer_fingerprint[:16],
        "vocab_size": m.vocab_size,
        "rows": m.splits[split].blocks,
        "block_tokens": m.block_tokens,
        "tokens": m.splits[split].tokens,
        "documents": m.splits[split].documents,
        "num_shards": len(hashes),
        "shards": "".join(sha[:_DIGITS] for sha in hashes) if listed else together,
    }


def changes(old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What differs between two courses of sources, {name: summary}, one line each; empty where both give equal batches."""
    out = [f"source {name} is gone" for name in old if name not in new]
    out += [f"source {name} is new" for name in new if name not in old]
    for name in (name for name in old if name in new):
        a, b = old[name], new[name]
        if a["fingerprint"] == b["fingerprint"]:
            continue
        facts = [
            f"{key} was {a[key]}, now {b[key]}"
            for key in a
            if key not in ("fingerprint", "shards") and a[key] != b.get(key)
        ]
        facts += _other_shards(a, b)
        facts = facts or ["its manifest was written anew, with equal counts and shards"]
        out.append(f"source {name}: {'; '.join(facts)}")
    if not out and list(old) != list(new):
        out.append(f"sources were in the order {', '.join(old)}, now {', '.join(new)}")
    return out


def _other_shards(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    if a["shards"] == b["shards"]:
        return []
    lists = [x["shards"] for x in (a, b)]
    if a["num_shards"] != b["num_shards"] or len(lists[0]) != a["num_shards"] * _DIGITS:
        return ["hashes of shards differ"]
    pairs = [[text[i : i + _DIGITS] for i in range(0, len(text), _DIGITS)] for text in lists]
    differ = [n for n, (x, y) in enumerate(zip(*pairs, strict=True)) if x != y]
    first = differ[0]
    return [f"{len(differ)} of {a['num_shards']} shards differ, first number {first}: sha256 was {pairs[0][first]}..., now {pairs[1][first]}..."]  # fmt: skip
