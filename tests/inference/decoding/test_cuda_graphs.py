"""Passes of fixed shapes give what passes of their own shapes give; only their recording needs a GPU."""

import numpy as np
import pytest
import torch
from cuda_rules import cuda_operators
from parity import MODERN, random_model
from test_sampler import close

from esolm_megatron.inference import SampleRequest
from esolm_megatron.inference.decoding import cuda_graphs
from esolm_megatron.inference.decoding.cuda_graphs import Size
from esolm_megatron.inference.decoding.decoder import Decoder
from esolm_megatron.inference.decoding.scheduler import plan_rows


def logits_of(model, plans, length, fixed_shapes, later=()):
    """Logits of every pass, by row and place; the `later` plans enter after two passes. And the decoder."""
    fed = torch.full((len(plans) + len(later), length), 1)  # places hold anything before they are filled
    order = torch.stack([torch.from_numpy(plan.order) for plan in [*plans, *later]])
    decoder, found = Decoder(model, fed, order, fixed_shapes=fixed_shapes), {}

    def enter(row, plan):
        fed[row, : len(plan.given)] = torch.from_numpy(plan.given)
        decoder.add(row, plan.ks, len(plan.given))

    def choose(logits, rows, places):
        for row, place, logit in zip(rows.tolist(), places.tolist(), logits, strict=True):
            found[row, place] = logit.clone()
        return (7 * rows + 5 * places) % model.shape.mask_id

    for row, plan in enumerate(plans):
        enter(row, plan)
    with torch.inference_mode():
        for count in range(1000):
            if count == 2:
                for row, plan in enumerate(later, len(plans)):
                    enter(row, plan)
            if not len(decoder.rows):
                return found, decoder
            decoder.step(choose)
    raise AssertionError("it does not end")


@pytest.mark.parametrize("shape", [{}, MODERN], ids=["reference", "modern"])
@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "binomial", "steps": 4, "alpha_0": 0.7, "own_schedules": True},
        {"schedule": "uniform", "steps": 3, "alpha_0": 1.0},
        {"schedule": "first_hitting", "steps": 1, "alpha_0": 0.5, "prompt": torch.tensor([1, 5, 2])},
    ],
    ids=["ragged", "uniform", "one a pass after a prompt"],
)
def test_fixed_shapes_change_no_logit(shape, options):
    model = random_model(**shape)
    plans = plan_rows(SampleRequest(5, 13, seed=3, **options), model.shape.mask_id)
    ragged, _ = logits_of(model, plans[:3], 13, False, later=plans[3:])
    fixed, decoder = logits_of(model, plans[:3], 13, True, later=plans[3:])
    assert ragged.keys() == fixed.keys()
    assert len(ragged) == sum(sum(plan.ks) for plan in plans)
    for at, logit in ragged.items():
        close(fixed[at][:-1], logit[:-1])
    assert sum(decoder.recorded.counts.values()) > 2


def test_large_passes_are_left_as_they_are(monkeypatch):
    model = random_model()
    monkeypatch.setattr(cuda_graphs, "MOST_TOKENS", 8)
    plans = plan_rows(SampleRequest(4, 13, alpha_0=0.5, steps=1), model.shape.mask_id)
    ragged, _ = logits_of(model, plans, 13, False)
    fixed, decoder = logits_of(model, plans, 13, True)
    for at, logit in ragged.items():
        close(fixed[at][:-1], logit[:-1])
    sizes = decoder.recorded.counts
    assert sizes
    assert all(size.rows * size.width <= 8 for size in sizes)


def test_many_passes_have_few_sizes():
    """One token a pass, and ragged passes: what is recorded is replayed."""
    model = random_model()
    for options in ({"schedule": "first_hitting", "steps": 1}, {"schedule": "binomial", "steps": 64}):
        plans = plan_rows(SampleRequest(3, 300, alpha_0=1.0, **options), model.shape.mask_id)
        _, decoder = logits_of(model, plans, 300, True)
        assert sum(decoder.recorded.counts.values()) == len(plans[0].ks)
        assert len(decoder.recorded.counts) <= 30


def test_a_pass_in_bf16_through_cudas_operators():
    """At the shapes that a GPU records, with the products that it has."""
    model = random_model(**MODERN).bfloat16()
    plans = plan_rows(SampleRequest(3, 13, alpha_0=0.5, steps=4), model.shape.mask_id)
    plain, _ = logits_of(model, plans, 13, True)
    with cuda_operators() as calls:
        ours, _ = logits_of(model, plans, 13, True)
    assert calls["mm.dtype"] > 0
    assert ours.keys() == plain.keys()
    for at, logit in plain.items():
        assert ours[at].dtype == torch.float32
        torch.testing.assert_close(ours[at], logit, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("numbers", np.random.default_rng(0).integers(1, 700, (40, 4)).tolist())
def test_a_size_holds_what_it_must_and_little_more(numbers):
    rows, width, masks, horizon = numbers
    size = Size.around(rows, width, masks, horizon, most_rows=700, most_slots=700)
    for found, wanted, waste in zip((size.rows, size.width, size.masks), numbers, (2, 2, 2), strict=False):
        assert wanted <= found < waste * wanted + 1
    assert horizon <= size.horizon <= min(700, horizon + max(64, horizon / 4))
    assert Size.around(*(vars(size)[name] for name in ("rows", "width", "masks", "horizon")), 700, 700) == size
