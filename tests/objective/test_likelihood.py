"""Exact likelihoods in one pass: the reference's numbers, the cached conditionals, and enumerated rows."""

import itertools

import numpy as np
import pytest
import torch
from parity import MASK, MODERN, Reference, fixture_path, load_case, random_model

from esolm_megatron.inference.sampler import schedule_log_probs
from esolm_megatron.objective.likelihood import importance_weighted, log_likelihood, ordered_batch


def random_rows(model, rows, length):
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, model.shape.mask_id, (rows, length), generator=generator)
    return tokens, torch.rand(rows, length, generator=generator).argsort(1)


def close(mine, theirs, tolerance, what=""):
    error = (mine.detach().double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30)
    assert error < tolerance, f"{what}: relative error {error:.1e}"


class Functional:
    """The reference's network, with what `log_likelihood` reads of a model."""

    def __init__(self, reference):
        self.reference, self.shape = reference, reference.model.shape

    def __call__(self, *args, **kwargs):
        return self.reference(*args, **kwargs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_references_any_order_numbers(dtype, tolerance):
    if fixture_path("anyorder") is None:
        pytest.skip("anyorder is only in ../shared/fixtures")
    case, reference = load_case("anyorder"), Reference(dtype)
    tokens, order = case["x0"].long(), case["sort_idx"].long()
    log_p = log_likelihood(Functional(reference), tokens, order)
    close(log_p, case["logp_per_seq"], tolerance, "log p")
    for key, gradient in reference.gradients(-log_p.sum()).items():
        theirs = case.get(f"grads.{key}")
        if theirs is None:
            assert not gradient.any(), key
        else:  # stored in fp32, hence no closer than its rounding
            close(gradient, theirs, max(tolerance, 1.2e-7), key)


def test_the_references_any_order_logits():
    if fixture_path("anyorder") is None:
        pytest.skip("anyorder is only in ../shared/fixtures")
    case = load_case("anyorder")
    tokens, order = case["x0"].long(), case["sort_idx"].long()
    batch = ordered_batch(tokens.numpy(), order.numpy(), np.ones(tokens.shape), MASK)
    logits = Reference()(batch.tokens, batch.positions, batch.attend, places=batch.places)
    theirs = case["logits"]
    close(logits.view(theirs.shape)[..., :MASK], theirs[..., :MASK], 1e-10, "logits")


def test_the_references_importance_weighted_loss():
    if fixture_path("anyorder") is None:
        pytest.skip("anyorder is only in ../shared/fixtures")
    case, model = load_case("anyorder"), Reference().loaded()
    tokens = case["x0"].long()
    with torch.no_grad():
        log_p = torch.stack([log_likelihood(model, tokens, case[f"iw.sort_idx.{k}"].long()) for k in range(4)])
    close(-importance_weighted(log_p).sum() / tokens.numel(), case["iw.loss"], 1e-6, "importance-weighted loss")


@pytest.mark.parametrize("shape", [{}, MODERN], ids=["reference", "modern"])
def test_one_pass_is_the_sum_of_cached_conditionals(shape):
    model = random_model(**shape)
    tokens, order = random_rows(model, 3, 13)
    conditionals = schedule_log_probs(model, tokens, order, [1] * 13)
    close(log_likelihood(model, tokens, order), conditionals.sum(1), 1e-10)
    prompt = torch.zeros(3, 13, dtype=torch.bool).scatter(1, order[:, :4], True)
    given = log_likelihood(model, tokens, order, scored=~prompt)
    close(given, conditionals.masked_fill(prompt, 0).sum(1), 1e-10)


def test_padding_comes_last_and_is_not_seen():
    model = random_model()
    tokens, order = random_rows(model, 3, 13)
    short = order.sort(1).indices[:, :9].argsort(1)  # an order of the first 9 positions
    padded = torch.cat([short, torch.arange(9, 13).expand(3, -1)], 1)
    scored = (torch.arange(13) < 9).expand(3, -1)
    close(
        log_likelihood(model, tokens, padded, scored=scored),
        log_likelihood(model, tokens[:, :9].contiguous(), short).detach(),
        1e-12,
    )


def test_probabilities_of_all_rows_add_up_to_one():
    model = random_model(vocab_size=5)
    rows = torch.tensor(list(itertools.product(range(4), repeat=3)))
    for order in itertools.permutations(range(3)):
        p = log_likelihood(model, rows, torch.tensor([order]).expand_as(rows)).exp()
        assert abs(p.sum() - 1) < 1e-12
        assert p.max() > 10 * p.min()


def test_importance_weighted_is_the_log_of_the_mean():
    log_p = torch.tensor([[-700.0, -3.0], [-701.0, -2.0], [-705.0, -9.0]], dtype=torch.float64)
    exact = [-700 + np.log((1 + np.exp(-1) + np.exp(-5)) / 3), np.log(np.exp([-3, -2, -9]).mean())]
    np.testing.assert_allclose(importance_weighted(log_p), exact, rtol=1e-14)
    assert torch.equal(importance_weighted(log_p[:1]), log_p[0])


@pytest.mark.parametrize(
    ("tokens", "order", "message"),
    [
        ([[0, 1, 2]], [[0, 1]], r"tokens \(1, 3\) and order \(1, 2\)"),
        ([[0, 1, 2]], [[0, 1, 1]], "every position 0 to 2 once"),
        ([[0, 1, 22]], [[0, 1, 2]], "ids must lie in 0 to 21, found 0 to 22"),
        ([[-1, 1, 2]], [[0, 1, 2]], "ids must lie in 0 to 21, found -1 to 2"),
    ],
)
def test_refusals(tokens, order, message):
    with pytest.raises(ValueError, match=message):
        log_likelihood(random_model(), torch.tensor(tokens), torch.tensor(order))
