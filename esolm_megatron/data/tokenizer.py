"""Text to token ids and back: built-in bytes, any `tokenizer.json`, GPT-2 style files, and training of a new one.

A tokenizer *is* its definition, the JSON tree of a `tokenizer.json`. The `tokenizers` library executes it; where it
is plain byte-level BPE, tiktoken executes the same merges several times faster. The mask token is no part of it: the
network's vocabulary has one id more, the last, and that is the mask.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from esolm_megatron.errors import of_setting, optional

EOS = "<|endoftext|>"
MASK_TEXT = "[MASK]"
CONFIG = "tokenizer_config.json"

_FILES = [
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "config.json",
]  # fmt: skip

_END_NAMES = ("end", "eos", "</s>", "eot", "sep")
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PROBE = (
    "def f(x):\n    return x  # it's 3.14, I'll\n\n\n\tEND \r\n  ",
    "Zwölf Boxkämpfer — naïve façade… 東京で、الحروف нет ½ ①²३४ é\u0301 \u00a0\u2003\u200b 👩\u200d🚀🇪🇺 ﬁ",
    "''' 's't're've'm'll'd 'S <|endoftext|> a<b 0123456789 __init__ \x00\x07\x7f\u0085\ufeff\U0010ffff",
)


class TokenizerError(ValueError):
    """A tokenizer that cannot be loaded or does not do what a run needs."""


class Encoder:
    """Texts to token ids by the fastest engine: the part of a tokenizer that other processes get, which is quickly sent.

    What it is made of has been compared with the whole tokenizer; a process that gets one needs no look at its folder.
    """

    def __init__(self, tokenizer: Tokenizer, fast: Any, engine: Any):
        """`fast` is None where only `engine`, of the tokenizers library, is sure to be right."""
        self.fingerprint, self.vocab_size, self.eos_id = tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eos_id
        self.fast, self._definition, self._cuts = fast, tokenizer.canonical, tokenizer.cuts
        self._engine: Any = None if fast is not None else engine

    def encode_arrays(self, texts: Sequence[str], slow: list[int] | None = None) -> list[np.ndarray]:
        """Token ids of each text as a uint32 array. slow: gets the indices of those that the fast engine refused."""
        if self.fast is None:
            return self._slowly(texts)
        out = []
        for index, text in enumerate(texts):
            try:
                out.append(self.fast.encode_to_numpy(text, disallowed_special=()))
            except ValueError:  # tiktoken's pattern has a bound: a million blanks in a row are beyond it
                out += self._slowly([text])
                if slow is not None:
                    slow.append(index)
        return out

    def _slowly(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._engine is None:  # as long as nothing wants it: each full collection of garbage looks through it
            from tokenizers import Tokenizer as Engine

            self._engine = Engine.from_str(self._definition.decode())
        self._engine.encode_special_tokens = True  # which is lost when the library's tokenizer is sent
        with _panics_are_errors():
            encodings = self._engine.encode_batch_fast(list(texts), add_special_tokens=False)
        out = [np.asarray(encoding.ids, np.uint32) for encoding in encodings]
        for n, text in enumerate(texts):
            if self._cuts is not None and self._cuts in text:
                out[n] = np.asarray(self._whole.encode(text), np.uint32)
        return out

    @cached_property
    def _whole(self) -> Tokenizer:
        return Tokenizer(json.loads(self._definition), "tokenizer", self._cuts or EOS)


class Tokenizer:
    """Text to token ids and back.

    `vocab_size` counts the tokens without the mask; `vocab_size` itself is the mask's id. `eos_id`, whose text is
    `end_of_text`, ends each document.
    `canonical` is the definition as JSON in a fixed form; `fingerprint` is the sha256 of it, and of the end-of-text token unless
    that is <|endoftext|>. Text is only ever text: a document that spells out a special token does not get its id.
    """

    chat_template: str | None = None
    """Of the folder that it was loaded from; saved with it."""

    def __init__(self, definition: dict[str, Any], source: str, end_of_text: str = EOS):
        """`definition` is the tree of a tokenizer.json; `source` names it in errors."""
        from tokenizers import Tokenizer as Engine

        self._definition = {**definition, "truncation": None, "padding": None}
        canonical = json.dumps(self._definition, sort_keys=True, separators=(",", ":"))
        self.canonical = canonical.encode()
        named = "" if end_of_text == EOS else f"\n{end_of_text}"
        self.fingerprint: str = hashlib.sha256(self.canonical + named.encode()).hexdigest()
        try:
            self._engine = Engine.from_str(canonical)
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{source}: the tokenizers library cannot load it: {error}") from error
        self._engine.encode_special_tokens = True
        vocab = self._engine.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocab.values(), default=-1) + 1
        if end_of_text not in vocab:
            near = [name for name in vocab if any(part in name.lower() for part in _END_NAMES) and name[0] in "<[|"]
            raise TokenizerError(
                f"{source}: has no end-of-text token {end_of_text!r}; tokens that look like one: "
                f"{', '.join(sorted(near)[:8]) or 'none'}; name one by end_of_text, or add {EOS!r} to tokenizer.json"
            )
        self.eos_id: int = vocab[end_of_text]
        self.end_of_text = end_of_text
        try:
            forged = self.eos_id in self._engine.encode(end_of_text, add_special_tokens=False).ids
        except Exception:  # some have no token for what they do not know; such a text ends no document either
            forged = False
        self.cuts: str | None = end_of_text if forged and len(end_of_text) > 1 else None
        """Text that is encoded in two pieces wherever it occurs, for as one it would be the end of a document."""
        if forged and self.eos_id in self.encode(end_of_text):
            raise TokenizerError(
                f"{source}: {end_of_text!r} is an ordinary token, which a text may hold, and cannot end one; name a special "
                f"token by end_of_text, or add {EOS!r} to tokenizer.json"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without an end-of-text token."""
        return self._ids(self._engine, text)

    def encode_later(self, text: str) -> list[int]:
        """Token ids of `text` in the middle of a document: without the blank that some tokenizers put before the first word."""
        return self._ids(self._inside, text)

    def _ids(self, engine: Any, text: str) -> list[int]:
        if self.cuts is None or self.cuts not in text:
            return list(_encoded(engine, text).ids)
        before, _, after = text.partition(self.cuts)
        first, rest = before + self.cuts[0], self.cuts[1:] + after
        return [*_encoded(engine, first).ids, *self._ids(self._inside, rest)]

    def encode_pair(self, prompt: str, text: str) -> tuple[list[int], list[int]]:
        """Token ids of `prompt` and of the `text` after it, as both have them together.

        Raises:
            TokenizerError: a token holds the end of one and the start of the other.
        """
        if not prompt:
            return [], self.encode(text)
        found = _encoded(self._untrimmed, prompt + text)
        at = next((i for i, (_, end) in enumerate(found.offsets) if end > len(prompt)), len(found.ids))
        if at < len(found.ids) and found.offsets[at][0] < len(prompt):
            both = (prompt + text)[slice(*found.offsets[at])]
            raise TokenizerError(
                f"prompt and text: one token is {both!r}, the end of the prompt and the start of the text; "
                "end the prompt where a token ends, blanks belong to the word after them"
            )
        return found.ids[:at], found.ids[at:]

    @cached_property
    def _inside(self) -> Any:
        return self._variant(
            **{name: _unprefixed(self._definition.get(name)) for name in ("normalizer", "pre_tokenizer")}
        )

    @cached_property
    def _untrimmed(self) -> Any:
        return self._variant(post_processor=None)

    def _variant(self, **parts: Any) -> Any:
        from tokenizers import Tokenizer as Engine

        engine = Engine.from_str(json.dumps({**self._definition, **parts}))
        engine.encode_special_tokens = True
        return engine

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; equal to `encode` of each."""
        return [ids.tolist() for ids in self.encoder.encode_arrays(texts)]

    @cached_property
    def encoder(self) -> Encoder:
        """The fastest engine that gives the ids of `encode`; it can be sent to other processes."""
        fast = _fast_engine(self._definition, self._engine)
        return Encoder(self, fast, self._engine)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; the mask, and any id above it, is shown as [MASK]."""
        parts: list[str] = []
        run: list[int] = []
        for token in ids:
            if token < self.vocab_size:
                run.append(int(token))
                continue
            parts += [self._engine.decode(run, skip_special_tokens=False), MASK_TEXT]
            run = []
        return "".join([*parts, self._engine.decode(run, skip_special_tokens=False)])

    def decode_later(self, ids: Iterable[int]) -> str:
        """Text of `ids` in the middle of a document, where a blank before a word stays."""
        before = self.decode(self._before)
        found = self.decode([*self._before, *ids])
        return found[len(before) :] if found.startswith(before) else self.decode(ids)

    @cached_property
    def _before(self) -> list[int]:
        return self.encode("a")

    def lost(self) -> str:
        """Of some letters of the world those that do not come back: a vocabulary without bytes may drop them, or say unknown."""
        out = ""
        for letter in "é東яع🚀":
            with suppress(Exception):  # the library's own, of a letter that it refuses: whoever has one will hear of it
                out += "" if letter in self.decode(self.encode(letter)) else letter
        return out

    def bare_definition(self) -> dict[str, Any]:
        """The tree of a tokenizer.json by which any library encodes as `encode` does, adding no tokens around a text."""
        added = self._engine.encode("a").ids != self._engine.encode("a", add_special_tokens=False).ids
        return {**self._definition, "post_processor": None} if added else self._definition

    def save(self, folder: str | Path) -> Path:
        """Path of the tokenizer.json written into `folder`; loading it gives the same fingerprint."""
        path = Path(folder) / "tokenizer.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.canonical + b"\n")
        config = {"eos_token": self.end_of_text, "chat_template": self.chat_template}
        config = {k: v for k, v in config.items() if v is not None and v != EOS}
        if config:
            path.with_name(CONFIG).write_text(json.dumps(config, ensure_ascii=False) + "\n", encoding="utf-8")
        return path


@contextmanager
def _panics_are_errors() -> Iterator[None]:
    """Where the library gives up, as its patterns do on ten million blanks, it raises what no `except Exception` takes."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"the tokenizers library gave up: {error}") from None


def _encoded(engine: Any, text: str) -> Any:
    try:
        with _panics_are_errors():
            return engine.encode(text, add_special_tokens=False)
    except TypeError:  # what the library says of half a character of UTF-16, which JSON may spell out
        at = next((n for n, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
        if at is None:
            raise
        said = f"\\u{ord(text[at]):04x}, half of a pair, which is no character"
        raise TokenizerError(f"text: character {at} is {said}") from None


def _unprefixed(part: Any) -> Any:
    """A normalizer or pre-tokenizer of a tokenizer.json without what it puts before a text."""
    kind = part.get("type") if part else None
    if kind == "Prepend":
        return None
    if kind == "Sequence":
        name = "normalizers" if "normalizers" in part else "pretokenizers"
        return {**part, name: [kept for one in part[name] if (kept := _unprefixed(one)) is not None]}
    if kind == "Metaspace":
        return {**part, "prepend_scheme": "never"} | ({"add_prefix_space": False} if "add_prefix_space" in part else {})
    return {**part, "add_prefix_space": False} if kind == "ByteLevel" else part


def load_tokenizer(name_or_folder: str | Path, end_of_text: str | None = None) -> Tokenizer:
    """The tokenizer called "bytes", one in a folder or file, or hf://NAME[?revision=R] of the Hugging Face hub.

    A folder holds `tokenizer.json`, or `vocab.json` and `merges.txt` of a byte-level BPE as GPT-2's, or whatever else the
    transformers library can turn into a `tokenizer.json`. `end_of_text` names the token that ends a document; None means
    the `eos_token` of the folder's `tokenizer_config.json`, or <|endoftext|>.

    Raises:
        TokenizerError: nothing usable is there, or it has no end-of-text token.
    """
    name = str(name_or_folder)
    if name == "bytes":
        return Tokenizer(_byte_definition(), "bytes", end_of_text or EOS)
    path = _from_hub(name) if name.startswith("hf://") else Path(name_or_folder)
    folder = path if path.is_dir() else path.parent
    declared = _read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    token, template = declared.get("eos_token"), declared.get("chat_template")
    end = end_of_text or (token.get("content") if isinstance(token, dict) else token) or EOS
    tokenizer = _found_in(path, name, end)
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = template if isinstance(template, str) else None  # some have several, by name
    return tokenizer


def _found_in(path: Path, name: str, end: str) -> Tokenizer:
    if path.is_dir() and (path / "tokenizer.json").exists():
        path = path / "tokenizer.json"
    if path.is_file():
        definition = _read_json(path)
        if "model" not in definition:
            raise TokenizerError(f"{path}: has no field `model`; give the tokenizer.json of the `tokenizers` library")
        return Tokenizer(definition, str(path), end)
    if (path / CONFIG).exists():
        return Tokenizer(_transformers_definition(path), name, end)
    if (path / "vocab.json").exists() and (path / "merges.txt").exists():
        return Tokenizer(_gpt2_definition(path), str(path), end)
    raise TokenizerError(
        f"tokenizer {name!r}: not found; write bytes, or a folder with tokenizer.json, or with vocab.json and merges.txt, "
        "or hf://NAME for one of the Hugging Face hub"
    )


def _from_hub(address: str) -> Path:
    """The folder that the hub's library keeps a tokenizer in, which is downloaded if it is not there."""
    name, _, revision = address.removeprefix("hf://").partition("?revision=")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision or None, allow_patterns=_FILES))
    except Exception as error:  # the library's errors, and those of its transports
        reason = str(error).strip().splitlines()
        raise TokenizerError(
            f"tokenizer {address!r}: cannot be downloaded: {type(error).__name__}: {reason[0] if reason else ''}; check the "
            "name and the network, or download it elsewhere and give its folder"
        ) from error


def _transformers_definition(folder: Path) -> dict[str, Any]:
    """The tokenizer.json that the transformers library makes of a folder in one of its older forms."""
    transformers = optional("transformers", f"tokenizer {str(folder)!r}, which has no tokenizer.json")
    try:
        engine = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        ).backend_tokenizer
        return json.loads(engine.to_str())
    except Exception as error:  # the library raises whatever its parts do
        raise TokenizerError(
            f"tokenizer {str(folder)!r}: has no tokenizer.json, and the transformers library makes none of it: "
            f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}; save a fast tokenizer there"
        ) from error


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens learnt from `texts` and saved in `folder`.

    Equal texts give an equal tokenizer. Few texts can give fewer tokens than asked for.

    Raises:
        TokenizerError: `vocab_size` is too small for the 256 bytes and the end-of-text token.
    """
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise TokenizerError(f"vocab_size = {vocab_size}: 256 bytes and {EOS} need at least 257")
    with of_setting("output", str(folder)):
        Path(folder).mkdir(parents=True, exist_ok=True)
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer(json.loads(engine.to_str()), "the trained tokenizer")
    tokenizer.save(folder)
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(tree, dict):
        raise TokenizerError(f"{path}: must be a JSON object, found {type(tree).__name__}")
    return tree


def _byte_letters() -> list[str]:
    """The printable letter that byte-level vocabularies write for each byte 0..255."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    moved = {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [moved.get(byte, chr(byte)) for byte in range(256)]


def _byte_level_definition(vocab: dict[str, int], merges: list[list[str]], use_regex: bool = True) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": vocab[EOS], "content": EOS, **flags}] if EOS in vocab else [],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def _byte_definition() -> dict[str, Any]:
    vocab = {letter: byte for byte, letter in enumerate(_byte_letters())}
    return _byte_level_definition({**vocab, EOS: 256}, [], use_regex=False)


def _gpt2_definition(folder: Path) -> dict[str, Any]:
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    if lines and lines[0].startswith("#version"):
        lines = lines[1:]
    merges = [line.rstrip("\r").split(" ") for line in lines if line.strip()]
    wrong = next((n for n, merge in enumerate(merges, 1) if len(merge) != 2), None)
    if wrong is not None:
        raise TokenizerError(f"{folder / 'merges.txt'}: merge {wrong} is {merges[wrong - 1]}, expected two tokens")
    return _byte_level_definition(_read_json(folder / "vocab.json"), merges)


class _ByteEngine:
    """What tiktoken would do where each byte is its own id, but at the speed of a copy."""

    def encode_to_numpy(self, text: str, disallowed_special: Sequence[str] = ()) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)


def _fast_engine(definition: dict[str, Any], engine: Any) -> Any:
    """An encoder, tiktoken's where that is installed, that gives exactly the ids of `engine`; None if that is not sure."""
    ranks = _tiktoken_ranks(definition, engine)
    if ranks is None:
        return None
    fast: Any = _ByteEngine()
    if ranks != {bytes([byte]): byte for byte in range(256)}:
        try:
            import tiktoken
        except ImportError:
            return None
        pattern = _GPT2_PATTERN if definition["pre_tokenizer"].get("use_regex", True) else r"(?s).+"
        # no text is ever taken for the special token, but with none at all the search for them halts at every character
        special = {EOS: max(ranks.values()) + 1}
        fast = tiktoken.Encoding("esolm", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    slow = engine.encode_batch_fast(list(_PROBE), add_special_tokens=False)
    found = (fast.encode_to_numpy(text, disallowed_special=()).tolist() for text in _PROBE)
    return fast if all(ids == one.ids for ids, one in zip(found, slow, strict=True)) else None


def _tiktoken_ranks(definition: dict[str, Any], engine: Any) -> dict[bytes, int] | None:
    """Id of each token's bytes, or None unless both engines must merge alike.

    tiktoken joins any neighbours whose bytes are a token, the lowest id first; the library joins listed pairs, in the
    order of the list. They agree when ids rise along the list and every token, alone, is merged into itself: within a
    token's bytes both then take the same steps.
    """
    model, level = definition["model"], definition.get("pre_tokenizer") or {}
    special = [token for token in definition.get("added_tokens", []) if token["special"]]
    plain = (
        model.get("type") == "BPE"
        and definition.get("normalizer") is None
        and level.get("type") == "ByteLevel"
        and not level.get("add_prefix_space", True)
        and len(special) == len(definition.get("added_tokens", []))
        and not any(model.get(key) for key in ("dropout", "unk_token", "byte_fallback", "ignore_merges"))
        and not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
    )
    if not plain:
        return None
    byte_of = {letter: byte for byte, letter in enumerate(_byte_letters())}
    names = {token["content"] for token in special}
    tokens = {token: id_ for token, id_ in model["vocab"].items() if token not in names}
    if any(letter not in byte_of for token in tokens for letter in token) or not byte_of.keys() <= tokens.keys():
        return None
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    merged = [tokens.get("".join(pair), -1) for pair in pairs]
    if any(low >= high for low, high in zip([-1, *merged], merged, strict=False)):
        return None
    if any([piece.id for piece in engine.model.tokenize(token)] != [id_] for token, id_ in tokens.items()):
        return None
    return {bytes(byte_of[letter] for letter in token): id_ for token, id_ in tokens.items()}
