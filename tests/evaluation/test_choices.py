"""Questions: each answer's log p is that of `score`, and the right ones are counted."""

import json

import pytest
import torch
from parity import random_model

from esolm_megatron.config import ConfigError
from esolm_megatron.data.tokenizer import load_tokenizer
from esolm_megatron.evaluation.choices import Choices, Question, read_questions
from esolm_megatron.evaluation.shares import shared
from esolm_megatron.inference import PretrainedEsoLM
from esolm_megatron.inference.scoring import score


class Model(PretrainedEsoLM):
    """Random weights, and bytes as tokens."""

    tokenizer = load_tokenizer("bytes")


def asked():
    return [
        Question(prompt="is it ", choices=("so", "not so"), answer=0),
        Question(choices=("a", "b", "cc"), answer=2),
        Question(prompt="x", choices=("y",)),
    ]


@pytest.mark.parametrize("orders", [0, 3])
def test_answers_are_scored_after_their_prompt(orders):
    network = random_model(torch.float64, vocab_size=Model.tokenizer.vocab_size + 1, seq_length=16)
    model, questions = Model(network, 0.5), asked()
    job = Choices(model, questions, orders, 7, 2)
    found = job.result(shared(job))
    kind = {"orders": 3, "seed": 7} if orders else {"kind": "left_to_right"}
    for q, log_p in zip(questions, found.log_p, strict=True):
        exact = [score(model, model.tokenizer.encode(c), model.tokenizer.encode(q.prompt), **kind) for c in q.choices]
        assert log_p == pytest.approx([x.importance_weighted for x in exact], rel=1e-12)
    right = [found.log_p[0][0] > found.log_p[0][1], max(found.log_p[1]) == found.log_p[1][2]]
    assert found.accuracy == sum(right) / 2
    by_byte = [found.log_p[0][0] / 2 > found.log_p[0][1] / 6, found.log_p[1][2] / 2 > max(found.log_p[1][:2])]
    assert found.normalized == sum(by_byte) / 2
    assert ("left to right" in found.orders) == (orders == 0)
    job = Choices(model, questions[2:], orders, 7, 2)
    assert job.result(shared(job)).accuracy is None


def test_bad_questions_are_named(tmp_path):
    file, good = tmp_path / "q.jsonl", json.dumps({"prompt": "a", "choices": ["b"]})
    file.write_text(f"{good}\n\n{good}\n")
    assert len(read_questions(str(file))) == 2
    for line, said in (
        ({"choices": []}, "line 2: Tuple should have at least 1 item"),
        ({"choices": ["a", ""]}, "none may be empty"),
        ({"choices": ["a"], "answer": 1}, "answer = 1: there are 1 choices"),
        ({"choices": ["a"], "anwser": 0}, "Extra inputs"),
        ("no", "line 2: Input should be a valid dictionary"),
    ):
        file.write_text(f"{good}\n{json.dumps(line)}\n")
        with pytest.raises(ConfigError, match=said):
            read_questions(str(file))
    file.write_text(f"{good}\n{{cut")
    with pytest.raises(ConfigError, match="line 2"):
        read_questions(str(file))
    file.write_text("")
    with pytest.raises(ConfigError, match="has no line"):
        read_questions(str(file))
    with pytest.raises(ConfigError, match="questions"):
        read_questions(str(tmp_path / "none"))
