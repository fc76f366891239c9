"""Tokenizers as they come from the hub, built by their own library at small size: one of each much used family."""

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "alpha beta gamma\n",
    "die Größe der Straße, 東京",
    "def f(x):\n    return x  # 3.14",
    "it's 2026, isn't it?",
] * 3
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _learnt(engine, trainer):
    engine.train_from_iterator(TEXTS, trainer)
    return engine


def _byte_level(special, split=None, normalizer=None, prefix=False, **model):
    engine = Tokenizer(models.BPE(**model))
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=split is None)
    engine.pre_tokenizer = (
        level if split is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), level])
    )
    engine.decoder = decoders.ByteLevel()
    if normalizer is not None:
        engine.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    return _learnt(engine, trainer)


def _template(engine, begin):
    engine.post_processor = processors.TemplateProcessing(f"{begin} $A", None, [(begin, engine.token_to_id(begin))])
    return engine


def gpt2():
    return _byte_level(["<|endoftext|>"]), "<|endoftext|>"


def llama_3():
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    engine = _byte_level(["<|begin_of_text|>", "<|end_of_text|>"], split, ignore_merges=True)
    return _template(engine, "<|begin_of_text|>"), "<|end_of_text|>"


def qwen_2():
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], split, normalizers.NFC()), "<|im_end|>"


def roberta():
    engine = _byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], prefix=True)
    engine.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=True
    )
    return engine, "</s>"


def starcoder():
    engine = _byte_level(["<|endoftext|>", "<fim_prefix>"])
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    return engine, "<|endoftext|>"


def _sentencepiece(normalizer=None, splitter=None):
    engine = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if normalizer is not None:
        engine.normalizer = normalizer
    if splitter is not None:
        engine.pre_tokenizer = splitter
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=[*special, *BYTES], show_progress=False)
    engine = _learnt(engine, trainer)
    import json

    tree = json.loads(engine.to_str())  # bytes are pieces of the vocabulary, and no special tokens
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] in special]
    return _template(Tokenizer.from_str(json.dumps(tree)), "<s>"), "</s>"


def llama_2():
    return _sentencepiece(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]))


def mistral():
    """As Llama 2, by Metaspace."""
    return _sentencepiece(splitter=pre_tokenizers.Metaspace(prepend_scheme="first", split=False))


def gemma():
    """No blank before the first word."""
    engine, _ = _sentencepiece(normalizers.Replace(" ", "▁"))
    engine.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return engine, "</s>"


def t5():
    """Unigram; the end is a piece of the vocabulary, so that its text would be encoded as it."""
    engine = Tokenizer(models.Unigram())
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    engine = _learnt(
        engine, trainers.UnigramTrainer(vocab_size=70, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    engine.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    return engine, "</s>"


def phi_3():
    """Added tokens beyond the vocabulary, with gaps between their ids, and more ids than tokens."""
    import json

    engine, _ = llama_2()
    tree = json.loads(engine.to_str())
    size = len(tree["model"]["vocab"])
    flags = {"single_word": False, "lstrip": False, "rstrip": True, "normalized": False, "special": True}
    tree["added_tokens"] += [
        {"id": size + at, "content": name, **flags} for at, name in ((3, "<|end|>"), (9, "<|user|>"))
    ]
    return Tokenizer.from_str(json.dumps(tree)), "<|end|>"


FAMILIES = [gpt2, llama_3, qwen_2, roberta, starcoder, llama_2, mistral, gemma, t5, phi_3]
LOSSY = {t5}
"""Those that do not keep all text: characters outside of the vocabulary, blanks."""
