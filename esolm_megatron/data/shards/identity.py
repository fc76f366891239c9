"""What a checkpoint remembers of its data, so that a resumed run can say what has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from esolm_megatron.data.shards.format import ShardReader

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
    """What differs between the sources, {name: summary}, of a run's past and present, one line each; empty if nothing does.

    The name of a lone source means nothing. A source may join others: its weight before that must be 0, see mixture.py.
    """
    if len(old) == len(new) == 1:
        old = dict(zip(new, old.values(), strict=True))
    out = [f"source {name} is gone" for name in old if name not in new]
    if out or len(old) == 1:
        out += [f"source {name} is new" for name in new if name not in old]
    for name in (name for name in old if name in new):
        a, b = old[name], new[name]
        if a["fingerprint"] == b["fingerprint"]:
            continue
        facts = [f"fingerprint was {a['fingerprint'][:12]}, now {b['fingerprint'][:12]}"]
        other = [key for key in a if key not in ("fingerprint", "shards") and a[key] != b.get(key)]
        facts += [f"{key} was {a[key]}, now {b[key]}" for key in other]
        out.append(f"source {name}: {'; '.join([*facts, *_other_shards(a, b)])}")
    return out


def _other_shards(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    if "shards" not in a:
        return []
    if a["shards"] == b["shards"]:
        return ["all shards are the same"]
    lists = [x["shards"] for x in (a, b)]
    if a["num_shards"] != b["num_shards"] or len(lists[0]) != a["num_shards"] * _DIGITS:
        return ["hashes of shards differ"]
    pairs = [[text[i : i + _DIGITS] for i in range(0, len(text), _DIGITS)] for text in lists]
    first, *more = [n for n, (x, y) in enumerate(zip(*pairs, strict=True)) if x != y]
    was, now = pairs[0][first], pairs[1][first]
    return [
        f"{1 + len(more)} of {a['num_shards']} shards differ, first number {first}: sha256 was {was}..., now {now}..."
    ]
