"""The kernel that draws tokens on a GPU, interpreted: the tokens of the plain form, from the same words."""

import pytest
import torch
from test_sampler import raw_words

from esolm_megatron.inference.decoding.draw import Draw, draw_tokens

KINDS = [
    Draw(),
    Draw(temperature=0.6),
    Draw(temperature=0.0),
    Draw(top_p=0.9),
    Draw(top_p=0.3, temperature=1.4),
    Draw(top_k=5),
    Draw(top_k=700, top_p=0.5),
    Draw(top_k=2, temperature=0.5, top_p=0.999),
    Draw(repetition_penalty=1.7, top_p=0.8),
    Draw(repetition_penalty=0.6, top_k=3),
]


@pytest.fixture
def draw(monkeypatch):
    triton = pytest.importorskip("esolm_megatron.inference.decoding.draw_triton")
    monkeypatch.setattr(triton, "TILE", 2)
    return triton.draw


def table(kinds):
    return torch.tensor([[x.temperature, x.top_p, x.top_k, x.repetition_penalty] for x in kinds], dtype=torch.float64)


@pytest.mark.parametrize("vocab", [7, 700])
def test_rows_of_all_kinds_get_the_tokens_of_the_plain_form(draw, vocab):
    """In one launch; equal logits and impossible ids among them. The law of the plain form is tested in test_sampler.py."""
    generator = torch.Generator().manual_seed(vocab)
    times = 3
    logits = torch.randn(len(KINDS) * times, vocab, generator=generator) * 2
    logits[:, vocab // 2 : vocab // 2 + 3] = logits[:, :1]
    logits[:, -1] = float("-inf")
    held = torch.randint(0, vocab, (len(logits), 9), generator=generator)
    raw = raw_words(len(logits), "kernel", vocab)
    rows = torch.arange(len(logits)) % len(KINDS)
    given = logits.clone()
    tokens, log_probs = draw(given, raw, rows, table(KINDS), held)
    assert torch.equal(given, logits), "what is penalised is restored"
    for i, kind in enumerate(KINDS):
        mine = rows == i
        ids = held[mine] if kind.repetition_penalty != 1 else None
        theirs = draw_tokens(logits[mine], raw[mine], kind, ids)
        assert torch.equal(tokens[mine], theirs[0]), kind
        torch.testing.assert_close(log_probs[mine], theirs[1], rtol=1e-5, atol=2e-6)
    without, _ = draw(given, raw, rows, table(KINDS), None)
    assert torch.equal(without[rows < 8], tokens[rows < 8])


def test_the_ends_of_the_uniform_numbers_draw_possible_tokens(draw):
    logits = torch.full((2, 600), float("-inf"))
    logits[:, [3, 255, 300, 511]] = torch.tensor([0.3, 1.7, -0.4, 0.9])
    tokens, _ = draw(logits, torch.tensor([0, -1]), torch.tensor([0, 0]), table([Draw()]), None)
    assert tokens.tolist() == [3, 511]


def test_logits_that_are_no_numbers_show(draw):
    logits = torch.zeros(2, 300)
    logits[1, 7] = float("nan")
    for kind in (Draw(), Draw(top_p=0.9)):
        _, log_probs = draw(logits, torch.tensor([5, 5]), torch.tensor([0, 0]), table([kind]), None)
        assert log_probs.isfinite().tolist() == [True, False]
