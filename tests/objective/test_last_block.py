"""The last block at places with loss only: the same losses and gradients, from no more tokens than have loss."""

import numpy as np
import pytest
import torch
from parity import MODERN, random_model
from test_documents import CASES, LENGTH, ROWS, drawn
from truth import random_documents

from esolm_megatron.objective.esolm import mean_loss, part_sums
from esolm_megatron.objective.likelihood import ordered_batch


def losses_of(model, batch, **options):
    return model(
        batch.tokens, batch.positions, batch.attend, places=batch.places, targets=batch.targets,
        dropout_ids=batch.dropout_ids, **options,
    )  # fmt: skip


@pytest.mark.parametrize("documents", [False, True], ids=["across", "inside"])
@pytest.mark.parametrize("shape", [{"dropout": 0.1}, MODERN], ids=["reference", "modern"])
@pytest.mark.parametrize(("alpha_0", "loss", "capacity"), CASES)
def test_losses_and_gradients_are_those_of_a_whole_last_block(alpha_0, loss, capacity, shape, documents):
    noised = drawn(alpha_0, loss, capacity, random_documents(0, ROWS, LENGTH) if documents else None)
    (batch,) = noised.micro_batches
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        model = random_model(dtype, **shape)
        whole, ours = losses_of(model, batch), losses_of(model, batch, last=batch.last)
        torch.testing.assert_close(ours, whole, rtol=10 * tolerance, atol=10 * tolerance)
        weights = list(model.parameters())
        theirs, mine = (
            torch.autograd.grad(mean_loss(part_sums(x, batch), noised.num_valid), weights) for x in (whole, ours)
        )
        largest = max(b.abs().max() for b in theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert (a - b).abs().max() <= tolerance * largest


def test_scattered_places_and_none_at_all():
    """A likelihood of some positions only; rows, and a whole batch, without any loss."""
    model, rng = random_model(), np.random.default_rng(0)
    tokens, order = rng.integers(0, 22, (4, 13)), rng.random((4, 13)).argsort(1)
    weights = (rng.random((4, 13)) < 0.4) * 1.0
    weights[2] = 0
    batch = ordered_batch(tokens, order, weights, 22)
    torch.testing.assert_close(losses_of(model, batch, last=batch.last), losses_of(model, batch), rtol=1e-12, atol=0)
    assert len(batch.places) < len(batch.last.tokens) < 3 * 13
    none = ordered_batch(tokens, order, weights * 0, 22)
    losses = losses_of(model, none, last=none.last)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("alpha_0", "loss", "capacity"), CASES)
def test_no_token_without_loss_goes_through_the_end_of_the_network(alpha_0, loss, capacity):
    model, seen = random_model(), {}
    (batch,) = drawn(alpha_0, loss, capacity, None).micro_batches
    last = model.layers[str(model.shape.num_layers - 1)]
    parts = {
        "out": last.attention.out,
        "norm2": last.norm2,
        "mlp": last.mlp,
        "final": model.final_norm,
        "head": model.head,
    }
    for name, module in parts.items():
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: len(inputs[0])}))
    losses_of(model, batch, last=batch.last)
    assert seen == dict.fromkeys(parts, len(batch.places))
    assert len(batch.places) < batch.layout.num_tokens
