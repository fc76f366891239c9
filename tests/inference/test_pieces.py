"""Pieces of a text that comes in any order: whole characters, each place once, and together the text."""

import json
import random
from contextlib import suppress
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
from conversion.test_export_tokenizers import byte_level, llama_2, llama_3, unigram

from esolm_megatron.data.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from esolm_megatron.inference import parse_infill
from esolm_megatron.inference.pieces import Pieces, Transcript

TEXTS = ["alpha beta  Größe, 東京 👩\u200d🚀é", " alpha", "straße"]


def tokenizers():
    for family in (byte_level, llama_2, llama_3, unigram):
        engine, end = family()
        yield pytest.param(Tokenizer(json.loads(engine.to_str()), family.__name__, end), id=family.__name__)
    yield pytest.param(load_tokenizer("bytes"), id="bytes")


def pieces_of(tokenizer, ids, order, sizes):
    """The pieces that came with each call."""
    pieces, found = Pieces(tokenizer, len(ids)), []
    while order:
        some, order = order[: (size := sizes())], order[size:]
        found.append(pieces.add(some, [ids[i] for i in some]))
    return found


@pytest.mark.parametrize("tokenizer", tokenizers())
def test_pieces_are_whole_characters_and_together_the_text(tokenizer):
    drawn = random.Random(0)
    for trial in range(60):
        text = TEXTS[trial % len(TEXTS)]
        ids = tokenizer.encode(text)
        if tokenizer.decode(ids) != text:
            continue  # a vocabulary that does not know all characters
        order = list(range(len(ids)))
        if trial % 2:
            drawn.shuffle(order)
        found = list(chain(*pieces_of(tokenizer, ids, order, lambda: drawn.choice([1, 2, 3]))))
        assert not [p for p in found if "\ufffd" in p.text]
        found.sort(key=lambda p: p.start)
        assert [p.start for p in found] == [0, *(p.end for p in found[:-1])]
        assert "".join(p.text for p in found) == text
        if trial % 2 == 0:  # from the left, a character waits for its own last token and no longer
            ends = [p.end for batch in pieces_of(tokenizer, ids, list(range(len(ids))), lambda: 1) for p in batch]
            assert ends == sorted(ends)
            said = {p.end for p in found}
            assert all(tokenizer.decode(ids[:end]) == text[: len(tokenizer.decode(ids[:end]))] for end in said)


@pytest.mark.parametrize("tokenizer", tokenizers())
def test_tokens_that_are_no_text_come_the_same_way_in_every_order(tokenizer):
    drawn = random.Random(1)
    for _ in range(60):
        ids = [drawn.randrange(tokenizer.vocab_size) for _ in range(12)]
        order = list(range(len(ids)))
        drawn.shuffle(order)
        found = sorted(chain(*pieces_of(tokenizer, ids, order, lambda: 2)), key=lambda p: p.start)
        assert "".join(p.text for p in found) == "".join(p.text for p in Pieces(tokenizer, 12).add(range(12), ids))
        assert [p.start for p in found] == [0, *(p.end for p in found[:-1])]
        assert found[-1].end == 12


def test_a_character_of_several_tokens_waits_for_the_last():
    tokenizer = load_tokenizer("bytes")
    ids = list("aé東".encode())
    pieces = Pieces(tokenizer, len(ids))
    assert pieces.add([2, 5], [ids[2], ids[5]]) == []
    assert pieces.add([1], [ids[1]]) == [], "it might go on a character whose start is not known"
    assert [(p.start, p.text) for p in pieces.add([0], ids[:1])] == [(0, "a"), (1, "é")]
    assert pieces.add([3], [ids[3]]) == []
    assert [(p.start, p.end, p.text) for p in pieces.add([4], [ids[4]])] == [(3, 6, "東")]


def test_what_is_read_from_the_left_never_takes_back():
    tokenizer = load_tokenizer("bytes")
    text = "ab é and stop here"
    ids = [*text.encode(), 256, *b"xyz"]
    order = list(range(len(ids)))
    random.Random(3).shuffle(order)
    plan = SimpleNamespace(order=np.array(order), given=np.array([], np.int64), stop_id=256)
    for stops, end in ([[], len(text)], [["stop", "never"], text.index("stop")], [["é"], 3]):
        asked = SimpleNamespace(echo=False, infill=None, stop_texts=stops)
        transcript, said = Transcript(tokenizer, plan, asked), ""
        for position in order:
            said += transcript.add([position], [ids[position]])["text"]
            assert text[:end].startswith(said)
        whole = transcript.finished(ids)
        assert whole == {"text": text[:end], "finish_reason": "stop"}
        assert said + transcript.rest(whole["text"]) == text[:end]


@pytest.mark.parametrize("tokenizer", tokenizers())
def test_a_piece_after_a_hole_goes_on_where_the_text_was(tokenizer):
    """Together they decode to what was written, and a token in the hole changes nothing beside it."""
    first, later = tokenizer.encode("alpha"), tokenizer.encode_later("beta gamma")
    assert tokenizer.decode([*first, *later]) == "alphabeta gamma"
    assert tokenizer.decode([*first, *tokenizer.encode_later(" beta")]) == "alpha beta"
    ids, places, length = parse_infill("alpha[[2]]beta[[1]]", tokenizer)
    assert ids == [*first, *tokenizer.encode_later("beta")]
    assert places == [*range(len(first)), *range(len(first) + 2, length - 1)]


@pytest.mark.parametrize("tokenizer", tokenizers())
def test_a_prompt_and_its_text_are_those_of_both_together(tokenizer):
    whole, split = "alpha beta gamma", []
    for at in range(1, len(whole)):
        with suppress(TokenizerError):
            prompt, text = tokenizer.encode_pair(whole[:at], whole[at:])
            assert prompt + text == tokenizer.encode(whole)
            assert tokenizer.decode_later(text) == whole[at:]
            split.append(whole[at:])
    assert len(split) >= 2, split
    assert tokenizer.encode_pair("", "gamma") == ([], tokenizer.encode("gamma"))
    assert tokenizer.encode_pair("alpha", "") == (tokenizer.encode("alpha"), [])


def test_a_token_over_the_border_is_an_error():
    engine, end = byte_level()
    tokenizer = Tokenizer(json.loads(engine.to_str()), "learnt", end)
    at = next(
        n
        for n in range(1, 10)
        if len(tokenizer.encode("alpha beta"[:n])) == len(tokenizer.encode("alpha beta"[: n - 1]))
    )
    with pytest.raises(TokenizerError, match="one token is '.+', the end of the prompt and the start of the text"):
        tokenizer.encode_pair("alpha beta"[: at - 1], "alpha beta"[at - 1 :])
    with pytest.raises(TokenizerError, match="character 1 is .ud800, half of a pair"):
        tokenizer.encode("a\ud800")
