import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from esolm_megatron.data.corpus import python_library_documents
from esolm_megatron.data.tokenizer import EOS, Encoder, TokenizerError, load_tokenizer, train_tokenizer

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
    assert tokenizer.encoder.fast is not None


@pytest.mark.parametrize("fast", [True, False])
def test_an_encoder_that_was_sent_gives_the_same_ids(tokenizer, fast):
    """The tokenizers library forgets, when it is sent, that text is only ever text."""
    encoder = Encoder(tokenizer, tokenizer.encoder.fast if fast else None, tokenizer._engine)
    sent = pickle.loads(pickle.dumps(encoder))
    assert (sent.fast is not None) == fast
    assert [ids.tolist() for ids in sent.encode_arrays(TEXTS)] == [tokenizer.encode(text) for text in TEXTS]
    for name in ("fingerprint", "vocab_size", "eos_id"):
        assert getattr(sent, name) == getattr(tokenizer, name)


@pytest.mark.parametrize("blank", [" ", "\n", "\t"])
def test_a_document_of_many_blanks_is_encoded(trained, blank):
    """tiktoken gives up on it; the other documents of its batch are still encoded by tiktoken."""
    tokenizer, sent = trained, pickle.loads(pickle.dumps(trained.encoder))
    texts = ["alpha beta", f"alpha{blank * 1_000_000}beta", "gamma"]
    with pytest.raises(ValueError, match="stack"):
        sent.fast.encode_to_numpy(texts[1], disallowed_special=())
    assert [ids.tolist() for ids in sent.encode_arrays(texts)] == [tokenizer.encode(text) for text in texts]


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
    assert slow.encoder.fast is None


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
    assert other.encoder.fast is None


def test_errors_name_what_is_missing(trained, tmp_path):
    with pytest.raises(TokenizerError, match=r"nowhere.*not found; write bytes, or a folder"):
        load_tokenizer(tmp_path / "nowhere")
    text = json.dumps(trained._definition).replace(EOS, "<eos>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(
        TokenizerError, match=r"no end-of-text token '<\|endoftext\|>'.*like one: <eos>; name one by end_of_text"
    ):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, "<eos>").eos_id == trained.eos_id
    with pytest.raises(TokenizerError, match="'e' is an ordinary token, which a text may hold, and cannot end one"):
        load_tokenizer(tmp_path, "e")
    with pytest.raises(TokenizerError, match="no end-of-text token 'nothing'"):
        load_tokenizer(tmp_path, "nothing")
    (tmp_path / "tokenizer.json").write_text(text[:99])
    with pytest.raises(TokenizerError, match="cannot be read as JSON"):
        load_tokenizer(tmp_path)


def renamed(trained, folder, declared):
    """The trained tokenizer with another end of text, which the folder declares in this way."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(trained._definition).replace(EOS, "</s>"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": declared}))
    return folder


@pytest.mark.parametrize("declared", ["</s>", {"content": "</s>", "lstrip": False}])
def test_the_end_of_text_that_a_folder_declares_is_used_and_kept(trained, tmp_path, declared):
    tokenizer = load_tokenizer(renamed(trained, tmp_path / "a", declared))
    assert tokenizer.eos_id == trained.eos_id
    assert tokenizer.eos_id not in tokenizer.encode("x</s>y")
    tokenizer.save(tmp_path / "b")
    copy = load_tokenizer(tmp_path / "b")
    assert (copy.eos_id, copy.fingerprint) == (tokenizer.eos_id, tokenizer.fingerprint)
    assert copy.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert tokenizer.encoder.fast is not None


def test_another_end_of_text_is_another_tokenizer(trained, tmp_path):
    """The same definition: only the choice of the token differs."""
    tree = json.loads(json.dumps(trained._definition))
    tree["added_tokens"].append({**tree["added_tokens"][0], "id": 701, "content": "<|pad|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    first, second = load_tokenizer(tmp_path), load_tokenizer(tmp_path, "<|pad|>")
    assert (first.eos_id, second.eos_id) == (trained.eos_id, 701)
    assert first.fingerprint != second.fingerprint
    second.save(tmp_path / "kept")
    assert load_tokenizer(tmp_path / "kept").fingerprint == second.fingerprint


def test_folders_of_the_transformers_library(trained, tmp_path):
    """A word-piece vocabulary as BERT's, which has no tokenizer.json, and a fast tokenizer that the library saved."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "def", "##s", "self", "x", "(", ")", ":"]
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "bert" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "BertTokenizer", "do_lower_case": true}'
    )
    with pytest.raises(TokenizerError, match=r"no end-of-text token.*\[SEP\]"):
        load_tokenizer(tmp_path / "bert")
    bert = load_tokenizer(tmp_path / "bert", "[SEP]")
    assert bert.encode("Defs self(x):") == [words.index(w) for w in ("def", "##s", "self", "(", "x", ")", ":")]
    assert bert.eos_id == 3
    assert bert.encode_batch(["def", "x"]) == [[5], [8]]

    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_file=str(trained.save(tmp_path / "t")), eos_token=EOS).save_pretrained(
        tmp_path / "f"
    )
    loaded = load_tokenizer(tmp_path / "f")
    assert [loaded.encode(text) for text in TEXTS] == [trained.encode(text) for text in TEXTS]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json, and the transformers library makes none"):
        load_tokenizer(tmp_path / "bad")


class Hub(BaseHTTPRequestHandler):
    """A hub with one tokenizer, org/one; as much of the protocol as a download needs."""

    files: ClassVar[dict[str, bytes]] = {}
    commit = "a" * 40

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, listing = self.path.partition("?")[0], [{"rfilename": name} for name in self.files]
        name = path.rpartition("/")[2]
        if path.startswith("/api/models/org/one"):
            entries = [{"type": "file", "path": n, "size": len(d), "oid": "b" * 40} for n, d in self.files.items()]
            tree = entries if "/tree/" in path else {"id": "org/one", "sha": self.commit, "siblings": listing}
            body, status = json.dumps(tree).encode(), 200
        elif path.startswith("/org/one/resolve/") and name in self.files:
            body, status = self.files[name], 200
        else:
            body, status = b"{}", 404
        self.send_response(status)
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_hub_tokenizer_is_downloaded_and_a_hub_that_is_not_there_is_an_error(trained, tmp_path):
    """A real server on loopback; the library reads its address when it is imported, hence other processes."""
    renamed(trained, tmp_path / "files", "</s>")
    Hub.files = {path.name: path.read_bytes() for path in (tmp_path / "files").iterdir()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = "import sys; from esolm_megatron.data.tokenizer import load_tokenizer; print(load_tokenizer(sys.argv[1]).fingerprint)"
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
    }

    def said(name, **more):
        command = [sys.executable, "-c", code, name]
        return subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=120, check=False)

    try:
        first = said("hf://org/one?revision=main")
        assert first.stdout.strip() == load_tokenizer(tmp_path / "files").fingerprint, first.stderr
        assert "tokenizer 'hf://org/none': cannot be downloaded: " in said("hf://org/none").stderr
    finally:
        server.shutdown()
        server.server_close()
    offline = said("hf://org/two", HF_HUB_OFFLINE="1").stderr
    assert "cannot be downloaded: " in offline
    assert "check the name and the network, or download it elsewhere and give its folder" in offline
    kept = said("hf://org/one?revision=main", HF_HUB_OFFLINE="1")
    assert kept.stdout == first.stdout, kept.stderr
