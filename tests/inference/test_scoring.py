"""Scores of given texts against the likelihoods that they are made of."""

import itertools
import json
import math
import re

import pytest
import torch
from parity import random_model

from esolm_megatron.cli import main
from esolm_megatron.data.tokenizer import load_tokenizer
from esolm_megatron.inference import PretrainedEsoLM, load_pretrained
from esolm_megatron.inference.scoring import score
from esolm_megatron.model.pretrained import save_model
from esolm_megatron.objective.likelihood import log_likelihood


def test_left_to_right_after_a_prompt_is_the_conditional_likelihood():
    model = PretrainedEsoLM(random_model(), 0.5)
    text, prompt = [3, 1, 4, 1, 5], [9, 2]
    found = score(model, text, prompt, kind="left_to_right", orders=7)

    def whole(ids):
        return log_likelihood(model.model, torch.tensor([ids]), torch.arange(len(ids))[None]).item()

    assert len(found.log_p) == 1
    assert found.log_p[0] == pytest.approx(whole(prompt + text) - whole(prompt), abs=1e-10)
    assert found.any_order == found.importance_weighted == found.log_p[0]
    assert found.num_tokens == 5
    assert found.perplexity == pytest.approx(math.exp(-found.log_p[0] / 5))


def test_all_texts_of_a_length_have_probability_one_after_any_prompt():
    model = PretrainedEsoLM(random_model(vocab_size=4, spread=0.5), 0.5)
    for kind in ("random", "generation", "left_to_right"):
        scores = [score(model, list(text), [2], kind=kind, orders=1) for text in itertools.product(range(3), repeat=3)]
        assert sum(math.exp(s.log_p[0]) for s in scores) == pytest.approx(1, abs=1e-10)


def test_orders_follow_the_seed_and_not_the_batches():
    model = PretrainedEsoLM(random_model(), 0.5)
    text = list(range(11))
    whole, split, other = (score(model, text, orders=5, **o) for o in ({}, {"batch_size": 2}, {"seed": 1}))
    assert len(set(whole.log_p)) == 5
    assert split.log_p == pytest.approx(whole.log_p, abs=1e-9)
    assert not set(other.log_p) & set(whole.log_p)
    assert whole.any_order == pytest.approx(sum(whole.log_p) / 5)
    assert max(whole.log_p) - math.log(5) <= whole.importance_weighted <= max(whole.log_p)
    assert score(model, text, orders=3, alpha_0=0.0).log_p == pytest.approx(
        score(model, text, kind="left_to_right").log_p * 3, abs=1e-9
    )
    for broken in ({"tokens": []}, {"tokens": [1], "orders": 0}, {"tokens": [22]}):
        with pytest.raises(ValueError, match=r"text|orders|ids must lie"):
            score(model, **broken)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("scored") / "model"
    tokenizer = load_tokenizer("bytes")
    model = random_model(torch.float32, spread=0.5, vocab_size=tokenizer.vocab_size + 1, seq_length=24)
    save_model(path, model.shape, 0.5, model.named_parameters(), dtype=torch.float32)
    tokenizer.save(path)
    return path


def answer(capsys, *words):
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_verb_scores_a_text_after_a_prompt(folder, capsys):
    model = load_pretrained(folder, dtype=torch.float64)
    found = answer(capsys, "score", folder, "text=hello", "prompt=ab", "kind=left_to_right")["texts"]
    ids = torch.tensor([model.tokenizer.encode("abhello")])
    exact = model.log_likelihood(ids, torch.arange(7)[None], torch.arange(7)[None] > 1).item()
    assert found[0]["log_p"] == [pytest.approx(exact, abs=1e-3)]


def test_type_and_device_are_words_of_the_verbs(folder, capsys):
    model = load_pretrained(folder, dtype=torch.float64)
    words = ["score", folder, "text=hello", "kind=left_to_right", "device=cpu"]
    exact = model.log_likelihood(torch.tensor([model.tokenizer.encode("hello")]), torch.arange(5)[None]).item()
    errors = [
        abs(answer(capsys, *words, f"dtype={dtype}")["texts"][0]["log_p"][0] - exact)
        for dtype in ("fp64", "fp32", "bf16")
    ]
    assert errors[0] < 1e-12 < errors[1] < 1e-3 < errors[2] < 1
    for verb in (["score", str(folder), "text=a"], ["sample", str(folder)]):
        assert main([*verb, "device=cuda:99"]) == 2
        assert "device = 'cuda:99': torch sees" in capsys.readouterr().err
        assert main([*verb, "device=tpu"]) == 2
        assert "device" in capsys.readouterr().err


def test_the_verb_reads_files(folder, tmp_path, capsys):
    lines, page = tmp_path / "texts.jsonl", tmp_path / "page.txt"
    lines.write_text('{"text": "one"}\n{"text": "two [x]"}\n')
    page.write_text("three\n")
    assert [t["num_tokens"] for t in answer(capsys, "score", folder, f"file={lines}", "orders=2")["texts"]] == [3, 7]
    (only,) = answer(capsys, "score", folder, f"file={page}")["texts"]
    assert (only["text"], len(only["log_p"])) == ("three\n", 4)
    assert main(["score", str(folder), f"file={lines}"]) == 0
    assert "two [x]" in capsys.readouterr().out
    lines.write_text('{"text": "one"}\n{"txt": "two"}\n')
    for words, message in (([f"file={lines}"], "line 2"), ([], "give one of them"), (["text=a", "file=b"], "give one")):
        assert main(["score", str(folder), *words]) == 2
        assert message in capsys.readouterr().err


def test_sampling_options_of_the_verb(folder, capsys):
    model = load_pretrained(folder)
    places = [3, 1, 0, 2, *range(4, 24)]
    made = answer(capsys, "sample", folder, f"positions={places}", "top_k=5", "repetition_penalty=1.2", "stop=true")
    theirs = model.sample(
        4, 24, order=torch.tensor(places), top_k=5, repetition_penalty=1.2, stop_id=model.tokenizer.eos_id
    )
    assert [s["tokens"] for s in made["samples"]] == theirs[0].tolist()
    fewer = answer(capsys, "sample", folder, "schedule=first_hitting", "propose=4", "alpha_0=1")
    assert fewer["num_forward_passes"] < 24
    assert main(["sample", str(folder), "schedule=first_hitting", "propose=auto", "alpha_0=1"]) == 0
    assert re.fullmatch(r"\d+ tokens/s\n", capsys.readouterr().err)
    assert main(["sample", str(folder), "propose=0"]) == 2
    assert "propose" in capsys.readouterr().err
    assert main(["sample", str(folder), "propose=4"]) == 2
    assert "schedule='first_hitting'" in capsys.readouterr().err


def test_watching_and_the_page(folder, tmp_path, capsys):
    page = tmp_path / "out.html"
    words = ["num_samples=2", r"infill=<b>&</script>[[9]]", "--watch", "--html", str(page), "seed=1"]
    made = answer(capsys, "sample", folder, *words)
    text = page.read_text()
    assert text.count("<script") == text.count("</script>") == 2, "the text's own tag is escaped"
    assert "<b>&" not in text
    assert "http" not in text
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    given = data["given"]
    assert "".join(given[str(i)] for i in range(len(given))) == "<b>&</script>"
    assert len(data["passes"]) == made["num_forward_passes"]
    told = sorted((row, place) for step in data["passes"] for row, place, _ in step)
    assert told == [(row, place) for row in range(2) for place in range(13, 22)]


def test_a_token_that_is_a_tag_stays_text(tmp_path):
    from esolm_megatron.inference.animation import Animation

    page, tag = tmp_path / "out.html", "</script><script>alert(1)</script>"
    Animation(1, 2, lambda ids: tag, {0: 1}).write_html(page, tag)
    text = page.read_text()
    assert "<script>alert" not in text
    assert json.loads(text.split('id="data">')[1].split("</script>")[0])["given"] == {"0": tag}


def test_the_terminal_shows_holes_until_they_are_filled():
    import io

    import numpy as np
    from rich.console import Console

    from esolm_megatron.inference.animation import Animation

    out = io.StringIO()
    animation = Animation(1, 4, lambda ids: "".join(chr(97 + i) for i in ids), {0: 25})
    with animation.live(0.0, Console(file=out, force_terminal=True, width=60, color_system=None)):
        animation(0, np.array([0]), np.array([3]), np.array([1]))
        assert "z··" in str(animation.drawn().renderables[1])
        animation(1, np.array([0, 0]), np.array([1, 2]), np.array([2, 3]))
    assert str(animation.drawn().renderables[1]) == "zcdb"
    assert "pass 2" in out.getvalue()
    assert "4 of 4 tokens" in out.getvalue()


def test_files_are_read_as_prepare_reads_them(tmp_path):
    """Lines end at line feeds alone; a byte order mark is no text; what is no text is one line that names its place."""
    from esolm_megatron.commands.generate import ScoreOptions, texts_to_score
    from esolm_megatron.errors import UserError

    path = tmp_path / "x.jsonl"

    def texts(data):
        path.write_bytes(data.encode("utf-8", "surrogatepass"))
        return texts_to_score(ScoreOptions(file=str(path)))

    assert texts('\ufeff{"text": "a\u2028b"}\n\n{"text": "c"}') == ["a\u2028b", "c"]
    for line, why in (('{"text": 5}', "field 'text' is no text, but a int"), ('{"text": null}', "is null"), ("no", "no JSON"),
                      ('{"text": "\\ud800"}', "half of a surrogate pair"), ("[1]", "no JSON object, but a list")):  # fmt: skip
        with pytest.raises(UserError, match=f"file: .*x.jsonl, line 2.*{why}"):
            texts('{"text": "a"}\n' + line)
    with pytest.raises(UserError, match="has no text"):
        texts("\n")
    for there, why in ((tmp_path / "none.txt", "no file there"), (tmp_path, "has no text")):
        with pytest.raises(UserError, match=f"file = '{there}': {why}"):
            texts_to_score(ScoreOptions(file=str(there)))
