"""Verified proposals: the distribution is that of one token a pass, and fewer passes are needed."""

import itertools

import pytest
import torch
from parity import random_model
from test_sampler import chi_square_is_fine, close

from esolm_megatron.inference import sample
from esolm_megatron.inference.decoding import speculative
from esolm_megatron.objective.likelihood import log_likelihood

ORDER = torch.tensor([2, 0, 3, 1])
OPTIONS = {"alpha_0": 1.0, "steps": 1, "schedule": "first_hitting", "order": ORDER}


def toy():
    """3 tokens and the mask, rows of 4: the model, all 81 rows, and the exact probability of each in one order."""
    model = random_model(torch.float32, seed=2, spread=1.0, vocab_size=4, seq_length=4, num_layers=1)
    rows = torch.tensor(list(itertools.product(range(3), repeat=4)))
    p = log_likelihood(model, rows, ORDER.expand_as(rows)).detach().double().exp()
    assert abs(p.sum() - 1) < 1e-5
    return model, p / p.sum()


def counts_of(samples):
    return torch.bincount((samples[0] * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81)


@pytest.mark.parametrize(("propose", "passes"), [(2, 1), (4, 1), (3, 2), (8, 2), ("auto", 1)])
def test_the_distribution_is_that_of_one_token_a_pass(propose, passes):
    model, p = toy()
    chi_square_is_fine(counts_of(sample(model, 2000, 4, **OPTIONS, propose=propose, passes=passes, seed=1)), p)


def test_with_a_prompt_temperature_and_nucleus():
    """Against the sampler that makes one token a pass, whose draws are tested by themselves."""
    model, _ = toy()
    options = {**OPTIONS, "prompt": torch.tensor([1]), "temperature": 1.4, "top_p": 0.8}
    truth = counts_of(sample(model, 40000, 4, **options)).double()
    chi_square_is_fine(counts_of(sample(model, 2000, 4, **options, propose=3, seed=2)), truth / truth.sum())


@pytest.mark.parametrize("passes", [1, 2])
def test_the_test_finds_proposals_that_are_kept_unverified(monkeypatch, passes):
    model, p = toy()
    monkeypatch.setattr(speculative, "accept", lambda p, q, chance: True)
    with pytest.raises(AssertionError, match="degrees of freedom"):
        chi_square_is_fine(counts_of(sample(model, 2000, 4, **OPTIONS, propose=4, passes=passes, seed=1)), p)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("shape", [{}, {"num_heads": 6, "num_kv_heads": 3, "qk_norm": True}])
def test_log_probs_are_exact_at_every_pace(shape, passes):
    """Rows that advance by different numbers of tokens, prompts, several kinds of order; fp64."""
    model, watched = random_model(spread=0.5, **shape), []
    for propose, order in ((2, "random"), (5, "left_to_right"), (20, torch.rand(6, 13).argsort(1))):
        options = {**OPTIONS, "order": order, "alpha_0": 0.5, "prompt": torch.tensor([3, 9])}
        samples = sample(
            model, 6, 13, **options, propose=propose, passes=passes, watch=lambda *step: watched.append(step)
        )
        tokens, log_probs = samples
        scored = torch.zeros_like(tokens).scatter(1, samples.order[:, 2:], 1).bool()
        assert torch.equal(tokens[:, :2], torch.tensor([3, 9]).expand(6, 2))
        assert 0 <= tokens.min() <= tokens.max() < 22
        close(log_probs.sum(1), log_likelihood(model, tokens, samples.order, scored=scored).detach())
        assert samples.num_forward_passes <= (11 if passes == 1 else 12)
        told = {(r, p): t for _, *step in watched for r, p, t in zip(*step, strict=True)}
        assert len(told) == sum(len(step[1]) for step in watched) == 66
        assert all(tokens[at] == t for at, t in told.items())
        watched.clear()


def test_a_model_that_ignores_its_context_needs_one_pass_for_k_tokens():
    """Nothing is ever refused then: ceil(n / k) passes, and in two passes k + 1 tokens."""
    model = random_model(spread=0.0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.fc2.weight", "embedding.weight")):
                weight.zero_()
        model.head.bias.normal_()
    for k, passes, expected in ((2, 1, 7), (4, 1, 4), (8, 1, 3), (2, 2, 9), (4, 2, 6)):
        samples = sample(model, 2, 13, **{**OPTIONS, "order": "random"}, propose=k, passes=passes)
        assert abs(samples.num_forward_passes - expected) <= 1, (k, passes, samples.num_forward_passes)
    auto = sample(model, 2, 64, **{**OPTIONS, "order": "random"}, propose="auto")
    few = sample(model, 2, 64, **{**OPTIONS, "order": "random"}, propose=3)
    assert auto.num_forward_passes < few.num_forward_passes - 3, "what is always accepted pays more at once"


def test_how_many_proposals_pay():
    """By acceptance: none of use, the start, half, nearly all. And a row's tokens do not depend on the rows beside it."""
    found = speculative.best(*torch.tensor([[0, 40], [0, 0], [50, 100], [99, 100]]).T).tolist()
    assert found == sorted(found)
    assert found[0] == 1
    assert found[1] == found[2] > 1
    assert found[3] > 4
    model = random_model(spread=0.5)
    options = {**OPTIONS, "order": "random", "propose": "auto", "seed": 4}
    whole = sample(model, 5, 13, **options)
    part = sample(model, 2, 13, first_row=3, **options)
    assert torch.equal(whole[0][3:], part[0])
    with pytest.raises(ValueError, match="or 'auto'"):
        sample(model, 2, 13, **{**options, "propose": "all"})
