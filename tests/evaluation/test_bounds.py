"""Evaluation: each number against the definition it carries the name of."""

import io
import itertools
import json
import math

import numpy as np
import pytest
import torch
from parity import MODERN, random_model
from rich.console import Console

from esolm_megatron.config import ObjectiveConfig
from esolm_megatron.evaluation import TextRows, evaluate, unigram_entropy
from esolm_megatron.evaluation.bounds import Bounds, Rows
from esolm_megatron.evaluation.report import bounds_table as table
from esolm_megatron.evaluation.report import bounds_tree as as_dict
from esolm_megatron.model.attention import PackedAttention
from esolm_megatron.objective.esolm import document_numbers, draw_orders, draw_validation, mean_loss, part_sums
from esolm_megatron.objective.likelihood import log_likelihood
from esolm_megatron.objective.noise import elbo_weight

NAMES = ("nelbo", "any_order", "importance_weighted", "left_to_right")


def random_batches(rows=7, length=13, padding=0, vocab=22, seed=0):
    """Batches of 3 rows; the first two rows end in padding, whose ids are out of the vocabulary."""
    rng = np.random.default_rng(seed)
    tokens, valid = rng.integers(0, vocab, (rows, length)), np.ones((rows, length), bool)
    for row in range(2 if padding else 0):
        valid[row, length - padding - row :] = False
    tokens[~valid] = 10**6
    return [(tokens[i : i + 3], valid[i : i + 3]) for i in range(0, rows, 3)]


def joined(batches):
    return tuple(np.concatenate(x) for x in zip(*batches, strict=True))


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("alpha_0", [0.0, 0.3, 1.0])
def test_nelbo_is_the_training_loss_of_both_parts_on_every_row(alpha_0, padding):
    model, objective = random_model(**MODERN), ObjectiveConfig(alpha_0=alpha_0)
    tokens, valid = joined(random_batches(padding=padding))
    noised = draw_validation(
        np.where(valid, tokens, 3), valid, np.arange(7), 7, objective, mask_id=22, key=(5, "evaluate")
    )
    batch = noised.micro_batches[0]
    losses = model(batch.tokens, batch.positions, batch.attend, places=batch.places, targets=batch.targets)
    expected = mean_loss(part_sums(losses, batch), noised.num_valid).item()
    for batch_size in (1, 2, 7, 50):
        found = evaluate(model, random_batches(padding=padding), objective, seed=5, batch_size=batch_size)
        assert found.nelbo.nats_per_token == pytest.approx(expected, rel=1e-12)
        assert found.diffusion_part + found.sequential_part == pytest.approx(expected, rel=1e-12)
        assert (found.diffusion_part > 0, found.sequential_part > 0) == (alpha_0 > 0, alpha_0 < 1)
        assert found.num_tokens == valid.sum()
        assert found.num_sequences == 7
    assert evaluate(model, random_batches(padding=padding), objective, seed=6).nelbo != found.nelbo or alpha_0 == 0


def test_alpha_0_of_zero_is_the_exact_left_to_right_likelihood():
    model = random_model()
    tokens, valid = joined(random_batches(padding=4))
    exact = 0.0
    for row in range(7):  # each row alone, cut where its padding starts
        x = torch.from_numpy(tokens[row, valid[row]])[None]
        exact -= log_likelihood(model, x, torch.arange(x.shape[1])[None]).item()
    found = evaluate(model, random_batches(padding=4), ObjectiveConfig(alpha_0=0), orders=3)
    for estimate in found.estimates.values():
        assert estimate.nats_per_token == pytest.approx(exact / valid.sum(), rel=1e-12)
        assert estimate.perplexity == pytest.approx(math.exp(exact / valid.sum()), rel=1e-12)
        assert "left to right" in estimate.estimator


def test_inside_documents_each_is_scored_alone():
    """At alpha_0 = 0 all bounds are the exact likelihood, of each document as if it were a row."""
    model = random_model()
    tokens, valid = joined(random_batches(padding=4))
    documents = document_numbers([np.array([3, 4, 9])] * 7, valid)
    documents[6] = 0
    exact = 0.0
    for row, numbers in enumerate(documents):
        for number in set(numbers[valid[row]].tolist()):
            x = torch.from_numpy(tokens[row, (numbers == number) & valid[row]])[None]
            exact -= log_likelihood(model, x, torch.arange(x.shape[1])[None]).item()
    batches = [*random_batches(padding=4), (np.zeros((1, 13), int), np.zeros((1, 13), bool))]  # a row that is left out
    documents = np.concatenate([documents, np.zeros((1, 13), int)])
    found = evaluate(model, batches, ObjectiveConfig(alpha_0=0), documents=documents, batch_size=3)
    for estimate in found.estimates.values():
        assert estimate.nats_per_token == pytest.approx(exact / valid.sum(), rel=1e-12)
    across = evaluate(model, batches, ObjectiveConfig(alpha_0=0))
    assert across.nelbo.nats_per_token != pytest.approx(exact / valid.sum(), rel=1e-2)
    with pytest.raises(ValueError, match=r"documents \(8, 12\) must have the shape of all sequences, \(8, 13\)"):
        evaluate(model, batches, ObjectiveConfig(alpha_0=0), documents=documents[:, 1:])


def test_any_order_and_importance_weighted_reach_their_exact_values():
    """One short row many times over: all of its orders are enumerated."""
    model = random_model(vocab_size=5, seq_length=3)
    row = torch.tensor([[2, 0, 3]])
    orders = torch.tensor(list(itertools.permutations(range(3))))
    log_p = log_likelihood(model, row.expand(6, -1), orders).detach()
    assert log_p.std() > 0.1, "the orders must differ"
    batches = [(row.expand(400, -1).numpy(), np.ones((400, 3), bool))]
    objective = ObjectiveConfig(alpha_0=1)
    one = evaluate(model, batches, objective, orders=1, batch_size=400)
    many = evaluate(model, batches, objective, orders=60, batch_size=400)
    assert one.any_order.nats_per_token == pytest.approx(one.importance_weighted.nats_per_token, rel=1e-12)
    for found in (one, many):
        exact = -log_p.mean().item() / 3
        assert abs(found.any_order.nats_per_token - exact) < 5 * found.any_order.standard_error
        noise = (log_p.std(correction=0).item() / 3) / math.sqrt(400 * found.num_orders)
        assert found.any_order.standard_error == pytest.approx(noise, rel=0.15)
    tight = -(log_p.logsumexp(0) - math.log(6)).item() / 3
    assert abs(many.importance_weighted.nats_per_token - tight) < 0.1 * (exact - tight)
    assert many.importance_weighted.nats_per_token < many.any_order.nats_per_token


def test_nelbo_reaches_its_exact_value():
    """One short row many times over: the diffusion bound by summing over all sets of masks and all their orders."""
    model, epsilon = random_model(vocab_size=5, seq_length=2, spread=0.5), 1e-3
    row, exact = torch.tensor([[2, 3]]), 0.0
    grid = epsilon + (1 - epsilon) * (np.arange(4000) + 0.5) / 4000
    clean = 1 - (1 - epsilon) * grid
    for masked in ({0}, {1}, {0, 1}):
        first = [p for p in range(2) if p not in masked]
        orders = [(*first, *rest) for rest in itertools.permutations(masked)]
        nats = 0.0
        for order in orders:
            batch = draw_fixed(row, order, masked)
            nats += model(*batch).log_softmax(-1)[range(len(first), 2), row[0, list(order)][len(first) :]].sum().item()
        weight = (1 - epsilon) / (1 - clean) * clean ** len(first) * (1 - clean) ** len(masked)
        exact -= nats / len(orders) * weight.mean()
    batches = [(row.expand(20000, -1).numpy(), np.ones((20000, 2), bool))]
    found = evaluate(model, batches, ObjectiveConfig(alpha_0=1), batch_size=10000).nelbo
    assert found.standard_error < 0.05 * exact / 2
    assert abs(found.nats_per_token - exact / 2) < 5 * found.standard_error


def draw_fixed(row, order, masked):
    """The arguments of the network for one row with these masks in this order."""
    from esolm_megatron.model.attention import PackedLayout

    fed = torch.tensor([4 if p in masked else int(row[0, p]) for p in order])
    return fed, torch.tensor(order), PackedAttention(PackedLayout(len(order), 1))


def test_output_says_which_estimator_each_number_is():
    found = evaluate(random_model(), random_batches(), ObjectiveConfig(alpha_0=1), orders=2)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(found))
    text = console.export_text()
    tree = json.loads(json.dumps(as_dict(found), allow_nan=False))
    for name in NAMES:
        estimate = getattr(found, name)
        assert name in text
        assert f"{estimate.perplexity:.3f}" in text
        assert tree[name]["nats_per_token"] == estimate.nats_per_token
        assert tree[name]["perplexity"] == estimate.perplexity
        assert tree[name]["estimator"] == estimate.estimator
    assert len({getattr(found, name).estimator for name in NAMES}) == 4
    assert "one token a step" in " ".join(text.split())
    assert "2 orders a sequence" in found.any_order.estimator
    assert tree["num_tokens"] == 91
    single = evaluate(random_model(), random_batches(rows=1), ObjectiveConfig(alpha_0=1))
    assert as_dict(single)["nelbo"]["standard_error"] is None


def test_left_to_right_is_exact_whatever_alpha_0_is():
    model = random_model()
    exact = evaluate(model, random_batches(padding=4), ObjectiveConfig(alpha_0=0)).nelbo
    found = evaluate(model, random_batches(padding=4), ObjectiveConfig(alpha_0=0.5), orders=2)
    assert found.left_to_right.nats_per_token == pytest.approx(exact.nats_per_token, rel=1e-12)
    assert found.left_to_right.standard_error == pytest.approx(exact.standard_error, rel=1e-12)
    assert found.any_order.nats_per_token != pytest.approx(exact.nats_per_token, rel=1e-3)


def test_more_orders_never_bound_worse_and_the_ends_are_the_other_estimates():
    found = evaluate(random_model(), random_batches(), ObjectiveConfig(alpha_0=1), orders=20)
    assert list(found.by_orders) == [1, 10, 20]
    first, middle, last = found.by_orders.values()
    assert first > middle > last
    assert first == pytest.approx(found.any_order.nats_per_token, rel=1e-12)
    assert last == pytest.approx(found.importance_weighted.nats_per_token, rel=1e-12)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(found))
    assert f"K = 10: {math.exp(middle):.3f}" in console.export_text()
    assert list(evaluate(random_model(), random_batches(), ObjectiveConfig(alpha_0=0), orders=20).by_orders) == [1]


def test_texts_are_told_per_word_and_per_byte():
    texts = ["ab cd é", "", "x y", "abcdefghijklmnop"]
    rows = TextRows.of(texts, lambda text: [ord(c) % 22 for c in text], 5, 99)
    assert rows.valid.sum(1).tolist() == [5, 2, 3, 5, 5, 5, 1]
    assert rows.tokens[1].tolist() == [ord(" ") % 22, ord("é") % 22, 0, 0, 0]
    assert (rows.num_words, rows.num_bytes) == (6, 8 + 3 + 16)
    found = evaluate(random_model(), [(rows.tokens, rows.valid)], ObjectiveConfig(alpha_0=0))
    tree = json.loads(json.dumps(as_dict(found, rows), allow_nan=False))
    nats = found.nelbo.nats_per_token * 26
    assert tree["nelbo"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / 27)
    assert tree["nelbo"]["word_perplexity"] == pytest.approx(math.exp(nats / 6))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(found, rows))
    assert "bits/byte" in console.export_text(clear=False)
    for said in ("27 bytes for 26 tokens", *(x.estimator for x in found.estimates.values())):
        assert said in " ".join(console.export_text(clear=False).split())
    assert (tree["num_words"], tree["num_bytes"]) == (6, 27)
    wordless = TextRows.of(["  "], lambda text: [1] * len(text), 5, 1)
    assert wordless.num_words == 0
    assert as_dict(found, wordless)["nelbo"]["word_perplexity"] is None


def test_tokens_that_are_given_are_seen_and_do_not_count():
    """Windows: the context comes first from the left, whatever the order of what counts; by the exact likelihood."""
    model, objective = random_model(), ObjectiveConfig(alpha_0=1)
    tokens, valid = joined(random_batches(padding=4))
    scored = valid.copy()
    scored[:, :5] = False
    job = Bounds(model, Rows.of([(tokens, valid)], 22, scored), objective, 3, 4, 2)
    assert job.given
    found = job.result([job.part(n) for n in range(job.count)])
    exact = straight = 0.0
    for row in range(7):
        x = torch.from_numpy(tokens[row, valid[row]])[None]
        places = torch.arange(x.shape[1])[None]
        straight -= log_likelihood(model, x, places, scored=places >= 5).item()
        for k in range(3):
            order = draw_orders(scored[row : row + 1], np.array([row]), 1.0, 4, "evaluate", k)[0]
            order = torch.tensor([[*range(5), *(p for p in order if scored[row, p])]])
            exact -= log_likelihood(model, x, order, scored=torch.arange(x.shape[1])[None] >= 5).item() / 3
    assert found.num_tokens == scored.sum() < valid.sum()
    assert found.any_order.nats_per_token == pytest.approx(exact / scored.sum(), rel=1e-12)
    assert found.left_to_right.nats_per_token == pytest.approx(straight / scored.sum(), rel=1e-12)
    assert (found.nelbo, found.diffusion_part, found.by_time) == (None, None, None)
    assert "nelbo" not in found.estimates
    assert as_dict(found)["nelbo"] is None
    nothing = np.zeros((7, 13), bool)
    with pytest.raises(ValueError, match=r"scored \(7, 12\) must have the shape"):
        Rows.of([(tokens, valid)], 22, nothing[:, 1:])


def test_curves_are_the_parts_of_the_whole():
    model, objective = random_model(), ObjectiveConfig(alpha_0=0.6)
    tokens, valid = joined(random_batches(padding=4))
    found = evaluate(model, random_batches(padding=4), objective, orders=2, seed=3)
    at = valid.sum(0)
    for name, curve in found.by_position.items():
        assert curve.edges == [float(n) for n in range(14)]
        total = sum(nats * count for nats, count in zip(curve.nats, at, strict=True))
        assert total / valid.sum() == pytest.approx(getattr(found, name).nats_per_token, rel=1e-12)
    first = log_likelihood(
        model, torch.from_numpy(tokens[2:]), torch.arange(13).expand(5, -1), scored=torch.arange(13).expand(5, -1) == 12
    )
    assert found.by_position["left_to_right"].nats[12] == pytest.approx(-first.mean().item(), rel=1e-12), (
        "unpadded rows reach it"
    )
    rows = Rows.of([(tokens, valid)], 22)
    parts = [Bounds(model, rows, objective, 2, 3, 4).part(n) for n in range(2)]
    times, masked, nats = (
        np.concatenate([part[name] for part in parts]) for name in ("times", "masked", "masked_nats")
    )
    weights = np.array([elbo_weight(np.array([t]), 0.6, objective.time_epsilon)[0] for t in times])
    assert (weights * nats).sum() / valid.sum() == pytest.approx(found.diffusion_part, rel=1e-12)
    for low, value in zip(found.by_time.edges, found.by_time.nats, strict=False):
        mine = (times >= low) & (times < low + 0.1)
        assert value == (pytest.approx(nats[mine].sum() / masked[mine].sum()) if masked[mine].sum() else None)
    long = evaluate(random_model(seq_length=130), random_batches(rows=2, length=130), objective)
    assert len(long.by_position["any_order"].nats) == 64
    assert evaluate(model, random_batches(), ObjectiveConfig(alpha_0=0)).by_time is None


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "no valid token"),
        ([(np.zeros((2, 5), np.int64), np.zeros((2, 5), bool))], {}, "no valid token"),
        ([*random_batches(), *random_batches(length=11)], {}, r"lengths \[11, 13\]"),
        (random_batches(vocab=30), {}, "ids must lie in 0 to 21"),
        (random_batches(), {"orders": 0}, "orders = 0"),
        (random_batches(), {"batch_size": 0}, "batch_size = 0"),
    ],
)
def test_refusals(batches, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(random_model(), batches, ObjectiveConfig(alpha_0=0.5), **options)


def test_unigram_entropy():
    tokens = np.array([[0, 5, 5, 2], [2, 5, 0, 5], [7, 7, 7, 7]])
    valid = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]], bool)
    p = np.array([2, 2, 4, 1]) / 9
    expected = -(p * np.log(p)).sum()
    assert unigram_entropy([(tokens, valid)]) == pytest.approx(expected, rel=1e-14)
    assert unigram_entropy([(tokens[i : i + 1], valid[i : i + 1]) for i in range(3)]) == pytest.approx(expected)
    with pytest.raises(ValueError, match="no valid token"):
        unigram_entropy([(tokens, np.zeros_like(valid))])
