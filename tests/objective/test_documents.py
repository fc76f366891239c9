"""Attention inside documents: losses and gradients against a dense mask that is built from the definition."""

import numpy as np
import pytest
import torch
from parity import MODERN, random_model
from truth import random_documents

from esolm_megatron.config import ObjectiveConfig
from esolm_megatron.objective.esolm import document_numbers, draw_step, draw_validation, mean_loss, part_sums
from esolm_megatron.objective.likelihood import log_likelihood

LENGTH, MASK, ROWS = 29, 22, 6
CASES = [(0.0, "elbo", LENGTH), (0.25, "elbo", 27), (1.0, "elbo", LENGTH), (0.4, "any_order", 26)]


def drawn(alpha_0, loss, capacity, documents, tokens=None):
    """Six rows of a step: row 0 is one document, in row 1 each token is one."""
    if tokens is None:
        tokens = np.random.default_rng(1).integers(0, MASK, (ROWS, LENGTH))
    config = ObjectiveConfig(alpha_0=alpha_0, diffusion_loss=loss)
    return draw_step(
        tokens, np.ones_like(tokens, bool), np.arange(ROWS), config, mask_id=MASK, global_batch_size=ROWS,
        num_micro_batches=1, capacity=capacity, key=(2, 3), documents=documents,
    )  # fmt: skip


class Dense:
    """Attention under a dense mask, for rows that are packed as if there were no documents.

    A token sees the true tokens up to its place in its row's order that are of its own document; a mask of a mask stream
    those before its place, and itself.
    """

    def __init__(self, batch, documents):
        layout, facts = batch.layout, []  # (row, stream, place) of each packed token
        length, two_stream = layout.seq_length, range(layout.num_plain, layout.num_causal_rows)
        facts += [(row, 0, place) for row in range(layout.num_causal_rows) for place in range(length)]
        capacities = [capacity for rows, capacity in layout.groups for _ in range(rows)]
        for row, capacity in zip(two_stream, capacities, strict=True):
            facts += [(row, 1, place) for place in range(length - capacity, length)]
        row, stream, place = torch.tensor(facts).T
        document = torch.from_numpy(documents)[row, batch.positions]
        same = (row[:, None] == row) & (document[:, None] == document)
        before = torch.where(stream[:, None] == 1, place < place[:, None], place <= place[:, None])
        self.seen = (same & before & (stream == 0)) | torch.eye(len(facts), dtype=torch.bool)

    def __call__(self, layer, q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qnd,knd->nqk", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("nqk,knd->qnd", scores.masked_fill(~self.seen, float("-inf")).softmax(-1), v)


def losses_of(model, batch, attend=None):
    return model(
        batch.tokens, batch.positions, attend or batch.attend, places=batch.places, targets=batch.targets,
    )  # fmt: skip


def by_place(batch, values):
    """{(row, position): value} of what carries loss."""
    keys = zip(batch.sources.tolist(), batch.positions[batch.places].tolist(), strict=True)
    return dict(zip(keys, values, strict=True))


@pytest.mark.parametrize("shape", [{}, MODERN], ids=["reference", "modern"])
@pytest.mark.parametrize(("alpha_0", "loss", "capacity"), CASES)
def test_loss_and_gradients_are_those_of_a_dense_mask(alpha_0, loss, capacity, shape):
    model, documents = random_model(**shape), random_documents(0, ROWS, LENGTH)
    ours, plain = (drawn(alpha_0, loss, capacity, d) for d in (documents, None))
    (batch,), (other,) = ours.micro_batches, plain.micro_batches
    losses, dense = losses_of(model, batch), losses_of(model, other, Dense(other, documents))
    mine, theirs = by_place(batch, losses.tolist()), by_place(other, dense.tolist())
    assert mine == pytest.approx(theirs, rel=1e-10)
    across = by_place(other, losses_of(model, other).tolist())
    assert max(abs(across[key] - mine[key]) for key in mine) > 0.1, "boundaries must matter"
    total, truth = (
        mean_loss(part_sums(x, b), n.num_valid) for x, b, n in ((losses, batch, ours), (dense, other, plain))
    )
    assert total.item() == pytest.approx(truth.item(), rel=1e-12)
    weights = list(model.parameters())
    for a, b in zip(torch.autograd.grad(total, weights), torch.autograd.grad(truth, weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("alpha_0", "loss", "capacity"), CASES)
def test_noise_is_the_same_with_and_without_documents(alpha_0, loss, capacity):
    def facts(noised):
        (batch,) = noised.micro_batches
        where = batch.places
        columns = (batch.sources, batch.positions[where], batch.tokens[where], batch.targets, batch.weights,
                   batch.parts, batch.dropout_ids[where])  # fmt: skip
        return sorted(zip(*(x.tolist() for x in columns), strict=True)), sorted(batch.dropout_ids.tolist())

    documents = random_documents(0, ROWS, LENGTH)
    assert facts(drawn(alpha_0, loss, capacity, documents)) == facts(drawn(alpha_0, loss, capacity, None))


@pytest.mark.parametrize(("alpha_0", "loss", "capacity"), CASES)
def test_a_documents_losses_do_not_depend_on_its_neighbours(alpha_0, loss, capacity):
    """To the last bit; in row 0, which is one document, everything depends on everything."""
    model, documents = random_model(torch.float32), random_documents(0, ROWS, LENGTH)
    tokens = np.random.default_rng(1).integers(0, MASK, (ROWS, LENGTH))
    changed = np.where(documents == 1, (tokens + 5) % MASK, tokens)
    assert 0 < (changed != tokens).sum() < tokens.size

    def losses(tokens, documents):
        (batch,) = drawn(alpha_0, loss, capacity, documents, tokens).micro_batches
        return by_place(batch, losses_of(model, batch).tolist())

    before, after = losses(tokens, documents), losses(changed, documents)
    moved = {key for key in before if before[key] != after[key]}
    assert moved
    assert all(documents[row, position] == 1 for row, position in moved)
    before, after = losses(tokens, None), losses(changed, None)
    assert {key for key in before if before[key] != after[key]} - moved, "crossing, others do"


def test_numbers_of_documents():
    valid = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
    starts = [np.array([1, 4]), np.array([0, 2]), np.array([], int)]
    assert document_numbers(starts, valid).tolist() == [[0, 1, 1, 1, 2], [0, 0, 1, 2, 2], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("alpha_0", [0.0, 0.5, 1.0])
def test_padding_is_seen_by_nobody(alpha_0):
    """Validation rows that are short, one of them wholly padding: what stands in the padding changes no loss."""
    model, rng = random_model(), np.random.default_rng(3)
    tokens, valid = rng.integers(0, MASK, (4, LENGTH)), np.ones((4, LENGTH), bool)
    valid[1, 20:], valid[2, 1:], valid[3] = False, False, False
    documents = document_numbers([np.array([9]), np.array([3, 19]), np.array([], int), np.array([4])], valid)

    def losses(tokens):
        noised = draw_validation(
            tokens, valid, np.arange(4), 4, ObjectiveConfig(alpha_0=alpha_0), mask_id=MASK, key=(1,),
            documents=documents,
        )  # fmt: skip
        (batch,) = noised.micro_batches
        assert valid[batch.sources.numpy() % 4, batch.positions[batch.places].numpy()].all()
        return losses_of(model, batch)

    assert torch.equal(losses(tokens), losses(np.where(valid, tokens, 7)))


def test_likelihood_is_the_sum_over_documents():
    """Each alone, in its own order: positions count as differences only, so that a document may be moved to the start."""
    model, documents = random_model(), random_documents(0, 4, 13)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, MASK, (4, 13), generator=generator)
    order = torch.rand(4, 13, generator=generator).argsort(1)
    expected = []
    for row in range(4):
        total = 0.0
        for number in set(documents[row].tolist()):
            own = np.flatnonzero(documents[row] == number)
            inside = [p - own[0] for p in order[row].tolist() if p in own]
            total += log_likelihood(model, tokens[row, own][None], torch.tensor([inside])).item()
        expected.append(total)
    found = log_likelihood(model, tokens, order, documents=torch.from_numpy(documents))
    assert found.tolist() == pytest.approx(expected, rel=1e-10)
    assert log_likelihood(model, tokens, order).tolist()[1:] != pytest.approx(expected[1:], rel=1e-2)
    with pytest.raises(ValueError, match=r"documents \(4, 12\) must be numbers from 0"):
        log_likelihood(model, tokens, order, documents=torch.from_numpy(documents[:, :12]))
