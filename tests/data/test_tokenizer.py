import json
import sys

import pytest

from esolm_megatron.data.corpus import python_library_documents
from esolm_megatron.data.tokenizer import EOS, TokenizerError, load_tokenizer, train_tokenizer

TEXTS = [
    "def f(x):\n\treturn x  # it's 3.14\n\n",
    "naïve été 東京 \u00a0\u2003 e\u0301 👩\u200d🚀",
    "a\x00b\x7f\r\n   \n",
    f"x{EOS}y",
    "",
    "a",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    texts = [text[:4000] for _, text in python_library_documents()][:60]
    return train_tokenizer(texts, 701, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(params=["bytes", "trained"])
def tokenizer(request, trained):
    return load_tokenizer("bytes") if request.param == "bytes" else trained


def test_text_comes_back(tokenizer):
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_batch_equals_single_and_is_the_fast_engine(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer._fast is not None


def test_text_cannot_forge_the_end_of_a_document(tokenizer):
    assert tokenizer.eos_id not in tokenizer.encode(f"x{EOS}y")
    assert tokenizer.eos_id not in tokenizer.encode_batch([f"x{EOS}y"])[0]


def test_mask_and_end_are_shown(tokenizer):
    ids = tokenizer.encode("ab")
    shown = tokenizer.decode([*ids, tokenizer.vocab_size, tokenizer.vocab_size, *ids, tokenizer.eos_id])
    assert shown == f"ab[MASK][MASK]ab{EOS}"


def test_saved_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert (copy.fingerprint, copy.vocab_size, copy.eos_id) == (
        tokenizer.fingerprint,
        tokenizer.vocab_size,
        tokenizer.eos_id,
    )
    assert copy.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_bytes_are_bytes():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.encode("aé\n") == list("aé\n".encode())


def test_training_is_deterministic_and_has_the_size_asked_for(trained, tmp_path):
    texts = [text[:4000] for _, text in python_library_documents()][:60]
    again = train_tokenizer(iter(texts), 701, tmp_path)
    assert again.fingerprint == trained.fingerprint
    assert again.vocab_size == 701
    assert train_tokenizer(texts, 699, tmp_path).fingerprint != trained.fingerprint
    with pytest.raises(TokenizerError, match=r"vocab_size = 256: .* at least 257"):
        train_tokenizer(texts, 256, tmp_path)


def test_gpt2_style_folder_equals_tokenizer_json(trained, tmp_path):
    model = trained._definition["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.vocab_size, loaded.eos_id) == (trained.vocab_size, trained.eos_id)
    assert [loaded.encode(text) for text in TEXTS] == [trained.encode(text) for text in TEXTS]


def test_without_tiktoken_the_tokens_are_the_same(trained, monkeypatch):
    slow = load_tokenizer_of(trained)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert slow.encode_batch(TEXTS) == trained.encode_batch(TEXTS)
    assert slow._fast is None


def load_tokenizer_of(tokenizer):
    return type(tokenizer)(tokenizer._definition, "a copy")


@pytest.mark.parametrize("change", ["order", "unreachable", "normalizer"])
def test_fast_engine_is_refused_where_it_could_differ(trained, change):
    """Merges out of order of ids, a token that no merge makes, a normaliser: tiktoken would give other tokens."""
    tree = json.loads(json.dumps(trained._definition))
    if change == "order":
        merges = tree["model"]["merges"]
        merges[0], merges[1] = merges[1], merges[0]
    elif change == "unreachable":
        tree["model"]["vocab"]["zqzqzq"] = 701
    else:
        tree["normalizer"] = {"type": "Lowercase"}
    other = type(trained)(tree, "changed")
    texts = [*TEXTS, "zqzqzq", "SELF self"]
    assert other.encode_batch(texts) == [other.encode(text) for text in texts]
    assert other._fast is None


def test_errors_name_what_is_missing(trained, tmp_path):
    with pytest.raises(TokenizerError, match=r"nowhere.*not found; write bytes, or a folder"):
        load_tokenizer(tmp_path / "nowhere")
    text = json.dumps(trained._definition).replace(EOS, "<eos>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match=r"no end-of-text token '<\|endoftext\|>'.*like one: <eos>"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text[:99])
    with pytest.raises(TokenizerError, match="cannot be read as JSON"):
        load_tokenizer(tmp_path)
