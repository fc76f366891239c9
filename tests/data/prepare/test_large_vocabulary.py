"""Vocabularies around 65,536, the most that two bytes a token hold: text to shards to batches."""

import json

import numpy as np
import pytest
from small_corpora import small_config, stored_documents, write_documents

from esolm_megatron.data.prepare import prepare
from esolm_megatron.data.shards import ShardReader
from esolm_megatron.data.stream import TokenStream, ValidationSet
from esolm_megatron.data.tokenizer import EOS, load_tokenizer
from esolm_megatron.data.verify import verify

ASCII = range(33, 127)


def write_tokenizer(folder, size):
    """A tokenizer of `size` tokens: bytes, end of text, and pairs of bytes, of which those that texts hold come last."""
    folder.mkdir()
    letters = {byte: letter for letter, byte in load_tokenizer("bytes")._definition["model"]["vocab"].items()}
    pairs = [(a, b) for a in range(256) for b in range(256)]
    rare = [pair for pair in pairs if not (pair[0] in ASCII and pair[1] in ASCII)]
    chosen = [*rare, *((a, b) for a in ASCII for b in ASCII)][-(size - 257) :]
    merges = [[letters[a], letters[b]] for a, b in chosen]
    names = [*(letters[byte] for byte in range(256)), EOS, *("".join(pair) for pair in merges)]
    (folder / "vocab.json").write_text(json.dumps({name: id_ for id_, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return load_tokenizer(folder)


@pytest.mark.parametrize(("size", "dtype"), [(65_535, "uint16"), (65_536, "uint32"), (65_793, "uint32")])
def test_every_token_of_a_large_vocabulary_comes_back_from_the_stream(tmp_path, size, dtype):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", size)
    texts = write_documents(tmp_path / "a.jsonl", 60)
    texts.append("~~ ~} }~ ||")  # the last tokens of all
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write(json.dumps({"id": 60, "text": texts[-1]}) + "\n")
    folder = tmp_path / "out"
    wanted = {"tokenizer": str(tmp_path / "tokenizer"), "validation_fraction": 0}
    prepare(small_config(tmp_path / "a.jsonl", folder, **wanted), progress=False)
    assert tokenizer.vocab_size == size
    assert (ShardReader(folder).manifest.dtype, ShardReader(folder).dtype.itemsize) == (dtype, 2 + 2 * (size > 65_535))
    assert verify(folder).ok
    assert sorted(stored_documents(folder, "train")) == sorted(texts)

    stored = ValidationSet(folder, split="train", seq_length=37)
    rows = stored.rows(range(len(stored)))
    whole = rows.valid.all(1)
    stream = TokenStream(folder, seq_length=37, global_batch_size=int(whole.sum()), seed=3)
    batch = stream.batch(0)
    assert stream.vocab_size == size + 1, "with the mask"
    assert sorted(batch.tokens.tolist()) == sorted(rows.tokens[whole].tolist())
    assert rows.tokens.max() == size - 1
    for tokens, starts in zip(batch.tokens, batch.documents, strict=True):
        assert np.array_equal(np.flatnonzero(tokens[:-1] == tokenizer.eos_id) + 1, starts)
    ids = {id_ for text in texts for id_ in tokenizer.encode(text)} | {tokenizer.eos_id}
    assert set(rows.tokens[rows.valid].tolist()) == ids
