"""The sampler against the reference's steps, the uncached network, exact likelihoods and enumerated distributions."""

import copy
import gc
import itertools
import json
import pickle

import numpy as np
import pytest
import torch
from parity import MASK, MODERN, Reference, fixture_path, load_case, metadata, random_model

from esolm_megatron import load_pretrained
from esolm_megatron.data.tokenizer import load_tokenizer
from esolm_megatron.inference import PretrainedEsoLM, sample
from esolm_megatron.inference.decoding import cuda_graphs
from esolm_megatron.inference.decoding.decoder import decode
from esolm_megatron.inference.decoding.draw import Draw, _first_above, draw_tokens
from esolm_megatron.inference.decoding.scheduler import binomial_schedule, draw_orders, uniform_schedule
from esolm_megatron.inference.sampler import Sampler, schedule_log_likelihood, schedule_log_probs
from esolm_megatron.model.attention import PackedAttention, PackedLayout
from esolm_megatron.model.cache import KVCache
from esolm_megatron.model.pretrained import save_model
from esolm_megatron.objective.likelihood import log_likelihood
from esolm_megatron.objective.noise import alpha, words

SHAPES = {
    "reference": {},
    "modern": MODERN,
    "one_kv_head": {"num_kv_heads": 1, "norm": "rmsnorm"},
}


def random_rows(model, rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.shape.mask_id, (rows, length), generator=generator)
    return tokens, torch.rand(rows, length, generator=generator).argsort(1)


def logits_of_steps(model, tokens, order, ks, num_given=0):
    """Logits of every step, through the cache: a list of (rows, places, logits)."""
    seen, in_order = [], tokens.gather(1, order)

    def choose(logits, rows, places):
        seen.append((rows, places, logits.clone()))
        return in_order[rows, places]

    fed = torch.full_like(in_order, model.shape.mask_id)
    fed[:, :num_given] = in_order[:, :num_given]
    decode(model, fed, order, ks, choose, num_given=num_given)
    assert torch.equal(fed, in_order)
    return seen


def uncached_logits(model, tokens, order, done, num_masks):
    """One row: the whole prefix and the masks of a step, fed at once."""
    order = order[: done + num_masks]
    fed = torch.cat([tokens[order[:done]], torch.full((num_masks,), model.shape.mask_id)])
    return model(fed, order, PackedAttention(PackedLayout(len(fed), 1)))[done:]


def close(mine, theirs, tolerance=1e-10):
    error = (mine - theirs).norm() / theirs.norm()
    assert error < tolerance, f"relative error {error:.1e}"


def chi_square_is_fine(counts, p):
    """Pearson's statistic within 5 standard deviations of its mean; cells of probability 0 must be empty.

    Cells that expect fewer than 5 count as one.
    """
    counts, expected = np.asarray(counts, float), np.asarray(p, float) * float(counts.sum())
    assert not counts[expected == 0].any()
    large = expected >= 5
    counts, expected = (np.append(x[large], x[~large].sum()) for x in (counts, expected))
    if expected[-1] < 5:
        counts, expected = counts[:-1], expected[:-1]
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), max(len(expected) - 1, 1)
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5, f"{statistic:.1f} on {freedom} degrees of freedom"


# ---------------------------------------------------------------------------------------------- the cached network


@pytest.mark.parametrize("name", ["k1", "mix", "blocks8", "generate"])
def test_logits_of_the_references_steps(name):
    if fixture_path("sampler") is None:
        pytest.skip("sampler is only in ../shared/fixtures")
    case, facts = load_case("sampler"), metadata("sampler")
    ks = json.loads(facts["generate.schedule" if name == "generate" else f"{name}.ks"])
    tokens, order = case[f"{name}.x"].long(), case[f"{name}.order"].long()
    steps = logits_of_steps(Reference().loaded(), tokens, order, ks)
    assert len(steps) == len(ks)
    for step, (_, _, logits) in enumerate(steps):
        theirs = case[f"{name}.logits.{step}"]
        close(logits.view(theirs.shape)[..., :MASK], theirs[..., :MASK])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("ks", "num_given"),
    [
        ([1] * 13, 0),
        ([3, 1, 5, 1, 1, 2], 0),
        ([0, 4, 1, 0, 3, 0], 5),
        ([0, 13], 0),
        ([[1, 2, 0, 4, 0, 1], [3, 0, 0, 1, 4, 0], [8, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 7]], 5),  # rows of their own pace
    ],
)
def test_cached_equals_uncached(shape, ks, num_given):
    model = random_model(**SHAPES[shape])
    tokens, order = random_rows(model, 4, 13)
    done = torch.full((4,), num_given)
    steps = logits_of_steps(model, tokens, order, ks, num_given)
    assert len(steps) == np.count_nonzero(np.atleast_2d(ks), axis=1).max(), "a row's empty steps cost no pass"
    for rows, places, logits in steps:
        for row in range(4):
            mine = rows == row
            num_masks = int(mine.sum())
            assert places[mine].tolist() == list(range(done[row], done[row] + num_masks))
            if num_masks:
                theirs = uncached_logits(model, tokens[row], order[row], int(done[row]), num_masks)
                close(logits[mine][:, :-1], theirs[:, :-1])
                done[row] += num_masks
    assert (done == 13).all()


def test_cache_keeps_its_memory_and_no_mask():
    """What a step leaves behind is the tokens' keys, in the memory that was there from the start."""
    model = random_model()
    cache = KVCache(model.shape, 2, 7, torch.float64, torch.device("cpu"))
    start = cache.keys.data_ptr()
    generator = torch.Generator().manual_seed(0)
    written, lengths = {}, [0, 0]
    for num_fed, num_tokens in (([3, 2], [1, 2]), ([2, 4], [2, 3]), ([3, 2], [1, 2])):
        rows = torch.repeat_interleave(torch.arange(2), torch.tensor(num_fed))
        slots = torch.cat([torch.arange(a, a + n) for a, n in zip(lengths, num_fed, strict=True)])
        cache.begin_step(rows, slots, torch.arange(len(rows)))
        k = torch.randn(len(rows), 3, 12, generator=generator, dtype=torch.float64)
        q, v = torch.randn(2, *k.shape, generator=generator, dtype=torch.float64)
        cache(1, q, k, v)
        for row, slot, key in zip(rows.tolist(), slots.tolist(), k, strict=True):
            if slot < lengths[row] + num_tokens[row]:
                written[row, slot] = key
        lengths = [a + n for a, n in zip(lengths, num_tokens, strict=True)]
    assert lengths == [4, 7]
    assert cache.keys.data_ptr() == start
    assert len(written) == 11
    for (row, slot), key in written.items():
        assert torch.equal(cache.keys[1, row, :, slot], key)
    assert not cache.keys[0].any(), "another layer's memory was written"
    cache.move(1, 0, 7)
    assert torch.equal(cache.values[:, 0, :, :7], cache.values[:, 1, :, :7])


def test_a_cache_goes_with_its_owner():
    """By counting references: gigabytes must not wait for a collection of garbage."""
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(x, KVCache) for x in gc.get_objects())
        for options in ({}, {"schedule": "first_hitting", "propose": 2}):
            sample(random_model(), 2, 9, alpha_0=1.0, steps=4, **options)
        assert sum(isinstance(x, KVCache) for x in gc.get_objects()) == before
    finally:
        gc.enable()


def test_verified_proposals_take_one_cache(monkeypatch):
    taken, allocate = [], KVCache.__init__
    monkeypatch.setattr(KVCache, "__init__", lambda self, *a, **b: (taken.append(a), allocate(self, *a, **b))[1])
    sample(random_model(), 2, 9, alpha_0=1.0, steps=4, schedule="first_hitting", propose=2)
    assert len(taken) == 1


def test_logits_are_made_some_at_a_time(monkeypatch):
    model, made = random_model(), []
    whole = sample(model, 3, 13, alpha_0=1.0, steps=2, top_k=5, repetition_penalty=1.3)
    monkeypatch.setattr(cuda_graphs, "LOGITS_AT_ONCE", 4 * model.shape.vocab + 1)
    model.head.register_forward_hook(lambda _, __, logits: made.append(len(logits)))
    parts = sample(model, 3, 13, alpha_0=1.0, steps=2, top_k=5, repetition_penalty=1.3)
    assert max(made) == 4
    assert sum(made) == 39
    assert torch.equal(whole[0], parts[0])
    close(parts[1], whole[1])


def test_the_last_block_goes_on_with_masks_only():
    model, fed = random_model(), []
    last = model.layers[str(model.shape.num_layers - 1)]
    last.mlp.register_forward_hook(lambda _, inputs, __: fed.append(len(inputs[0])))
    samples = sample(model, 3, 13, alpha_0=0.6, steps=4, prompt=torch.tensor([1, 2, 3]), own_schedules=True)
    assert sum(fed) == 3 * 10, "every place that is generated, once"
    assert len(fed) == samples.num_forward_passes
    before = []
    model.layers["0"].mlp.register_forward_hook(lambda _, inputs, __: before.append(len(inputs[0])))
    sample(model, 3, 13, alpha_0=0.6, steps=4, prompt=torch.tensor([1, 2, 3]), own_schedules=True)
    assert sum(before) > 3 * 13, "other blocks are fed the tokens, too"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.3)])
def test_narrow_types_are_close(dtype, tolerance):
    model = random_model(spread=0.5, **MODERN)
    tokens, order = random_rows(model, 3, 13)
    exact = schedule_log_probs(model, tokens, order, [4, 4, 5])
    narrow = schedule_log_probs(model.to(dtype), tokens, order, [4, 4, 5])
    assert narrow.dtype == torch.float32
    assert (narrow - exact).abs().max() < tolerance


# ------------------------------------------------------------------------------------------------------ likelihoods


@pytest.mark.parametrize("shape", SHAPES)
def test_one_a_step_is_the_exact_likelihood(shape):
    model = random_model(**SHAPES[shape])
    tokens, order = random_rows(model, 3, 11)
    one_by_one = schedule_log_likelihood(model, tokens, order, [1] * 11)
    close(one_by_one, log_likelihood(model, tokens, order).detach())
    in_parallel = schedule_log_likelihood(model, tokens, order, [6, 5])
    assert ((in_parallel - one_by_one).abs() > 1e-3).all(), "a parallel step must change the likelihood"


@pytest.mark.parametrize("ks", [[5, 5], [-1, 12], [[3, 8], [4, 8]], []])
def test_schedules_that_do_not_fill_the_row_are_refused(ks):
    model = random_model()
    with pytest.raises(ValueError, match=r"ks: steps fill .*fill the 11 places"):
        schedule_log_likelihood(model, *random_rows(model, 2, 11), ks)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("schedule", "order", "steps", "alpha_0"),
    [
        ("binomial", "random", 4, 0.5),
        ("binomial", "random", 3, 1.0),
        ("uniform", "block_distant", 3, 1.0),
        ("uniform", "left_to_right", 5, 1.0),
        ("binomial", "random", 4, 0.0),
    ],
)
def test_log_probs_are_those_of_the_schedule(schedule, order, steps, alpha_0, temperature):
    model = random_model()
    options = {"alpha_0": alpha_0, "steps": steps, "schedule": schedule, "order": order, "temperature": temperature}
    samples = sample(model, 5, 13, top_p=0.8, **options)
    tokens, log_probs = samples
    assert tokens.shape == log_probs.shape == (5, 13)
    assert tokens.dtype == torch.int64
    assert samples.num_forward_passes == len(samples.ks)
    assert sum(samples.ks) == 13
    assert 0 <= tokens.min() <= tokens.max() < model.shape.mask_id
    close(log_probs, schedule_log_probs(model, tokens, samples.order, samples.ks))
    if max(samples.ks) == 1:
        close(log_probs.sum(1), log_likelihood(model, tokens, samples.order).detach())


PROMPTS = {
    "prefix": ([3, 1, 4], None),
    "suffix": ([3, 1, 4], [10, 11, 12]),
    "holes": ([3, 1, 4, 1, 5], [11, 0, 2, 3, 7]),
    "of each row": ([[3, 1], [4, 1], [5, 9], [2, 6]], [[0, 5], [12, 1], [3, 4], [6, 2]]),
    "none": ([], None),
    "all but one": (list(range(12)), list(range(1, 13))),
    "all": (list(range(13)), None),
}


@pytest.mark.parametrize("which", PROMPTS)
@pytest.mark.parametrize(("steps", "alpha_0"), [(1000000, 0.6), (3, 0.6), (2, 1.0)])
def test_prompts_stay_and_condition(which, steps, alpha_0):
    model = random_model()
    prompt, positions = (None if x is None else torch.tensor(x, dtype=torch.int64) for x in PROMPTS[which])
    samples = sample(
        model, 4, 13, alpha_0=alpha_0, steps=steps, prompt=prompt, prompt_positions=positions, schedule="binomial"
    )
    tokens, log_probs = samples
    ids = prompt.expand(4, -1)
    where = torch.arange(ids.shape[1]).expand(4, -1) if positions is None else positions.expand(4, -1)
    num_given = ids.shape[1]
    assert torch.equal(tokens.gather(1, where), ids)
    assert torch.equal(samples.order[:, :num_given], where)
    assert not log_probs.gather(1, where).any()
    assert sum(samples.ks) == 13 - num_given
    exact = schedule_log_probs(model, tokens, samples.order, samples.ks, num_given=num_given)
    close(torch.cat([log_probs, torch.ones(4, 1)], 1), torch.cat([exact, torch.ones(4, 1)], 1))
    if steps == 1000000 and num_given < 13:
        scored = torch.ones_like(tokens, dtype=torch.bool).scatter(1, where, False)
        close(log_probs.sum(1), log_likelihood(model, tokens, samples.order, scored=scored).detach())


# ---------------------------------------------------------------------------------------------------- distributions


def toy():
    """4 tokens and the mask, rows of 3: all 64 rows, and the model."""
    model = random_model(torch.float32, seed=3, spread=0.5, vocab_size=5, seq_length=3, num_layers=1)
    return model, torch.tensor(list(itertools.product(range(4), repeat=3)))


@pytest.mark.parametrize(
    ("options", "orders", "ks"),
    [
        ({"alpha_0": 0.0, "steps": 1}, [(0, 1, 2)], [1, 1, 1]),
        ({"alpha_0": 1.0, "steps": 2, "schedule": "uniform"}, itertools.permutations(range(3)), [2, 1]),
        ({"alpha_0": 1.0, "steps": 3, "schedule": "uniform"}, itertools.permutations(range(3)), [1, 1, 1]),
    ],
)
def test_samples_have_the_enumerated_distribution(options, orders, ks):
    model, rows = toy()
    each = [schedule_log_likelihood(model, rows, torch.tensor([o]).expand_as(rows), ks).exp() for o in orders]
    p = torch.stack(each).mean(0).double()
    assert abs(p.sum() - 1) < 1e-5
    assert p.max() > 3 * p.min(), "the toy must be far from uniform"
    samples = sample(model, 20000, 3, seed=5, **options)
    assert samples.ks == ks
    counts = torch.bincount((samples[0] * torch.tensor([16, 4, 1])).sum(1), minlength=64)
    chi_square_is_fine(counts, p / p.sum())


def raw_words(count, *key):
    return torch.from_numpy(words(count, *key).view(np.int64))


@pytest.mark.parametrize("vocab", [7, 256, 700])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.9), (1.0, 0.3), (1.5, 0.7)])
def test_draws_follow_temperature_and_nucleus(vocab, temperature, top_p):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(vocab, generator=generator, dtype=torch.float64)
    logits[torch.randperm(vocab, generator=generator)[: vocab // 4]] = float("-inf")
    p = (logits / temperature).softmax(0)
    ranked, index = p.sort(descending=True)
    p[index[ranked.cumsum(0) - ranked >= top_p]] = 0
    rows = logits.float().expand(40000, -1)
    tokens, log_probs = draw_tokens(rows, raw_words(40000, "draw", vocab), Draw(temperature, top_p))
    chi_square_is_fine(torch.bincount(tokens, minlength=vocab), p / p.sum())
    close(log_probs.double(), logits.log_softmax(0)[tokens], 1e-6)


def test_nucleus_keeps_or_drops_equal_tokens_together():
    p = torch.tensor([0.0625, 0.25, 0.5, 0.0625, 0.125, 0.0])  # 0.5, 0.25, 0.125, then two equal ones
    for top_p, kept in (
        (0.499, {2}),
        (0.501, {1, 2}),
        (0.749, {1, 2}),
        (0.88, {0, 1, 2, 3, 4}),
        (1.0, {0, 1, 2, 3, 4}),
    ):
        tokens, _ = draw_tokens(p.log().expand(4000, -1), raw_words(4000, top_p), Draw(top_p=top_p))
        assert set(tokens.tolist()) == kept, top_p
    tokens, _ = draw_tokens(p.log().expand(100, -1), raw_words(100, 1), Draw(temperature=0.0))
    assert set(tokens.tolist()) == {2}


def test_the_ends_of_the_uniform_numbers_draw_possible_tokens():
    logits = torch.full((2, 600), float("-inf"))
    logits[:, [3, 255, 300, 511]] = torch.tensor([0.3, 1.7, -0.4, 0.9])
    tokens, _ = draw_tokens(logits, torch.tensor([0, -1]))
    assert tokens.tolist() == [3, 511]
    cumulative = torch.tensor([[0.0, 0.5, 1.0, 1.0]], dtype=torch.float64)
    for target, place in ((-1e-17, 1), (0.0, 1), (0.5, 2), (1.0, 2), (1.1, 2)):
        assert _first_above(cumulative, torch.tensor([target], dtype=torch.float64)).item() == place


# ----------------------------------------------------------------------------------------------- schedules and orders


def test_binomial_schedule_is_the_ancestral_process():
    """A large row follows the expected share of each step, computed one step after the other."""
    for alpha_0 in (0.3, 1.0):
        n, steps = 400000, 5
        ks = binomial_schedule(n, alpha_0, steps, 7)
        remaining, clean = float(n), alpha(1 - np.arange(6) / 5, alpha_0, 1e-3)
        for k, before, after in zip(ks, clean[:-1], clean[1:], strict=True):
            share = (after - before) / (1 - before)
            assert abs(k - remaining * share) <= 5 * (n * share) ** 0.5
            remaining -= k
        assert remaining == 0 if alpha_0 == 1 else abs(remaining / n - 0.7) < 0.005


def test_binomial_schedule_counts():
    passes = [len(binomial_schedule(1024, 1.0, 1024, seed)) for seed in range(30)]
    assert abs(np.mean(passes) - 1024 * (1 - np.exp(-1))) < 10  # empty steps are skipped
    assert np.std(passes) > 2
    sums = [sum(binomial_schedule(64, 0.25, 8, seed)) for seed in range(400)]
    assert abs(np.mean(sums) - 16) < 5 * np.sqrt(12 / 400)
    assert abs(np.var(sums) - 12) < 5 * 12 * np.sqrt(2 / 400)
    assert binomial_schedule(31, 0.0, 8, 0) == []
    assert binomial_schedule(31, 1.0, 10**7, 0) == [1] * 31
    assert binomial_schedule(0, 1.0, 8, 0) == []


def test_uniform_schedule():
    assert uniform_schedule(13, 1.0, 4) == [4, 3, 3, 3]
    assert uniform_schedule(13, 0.5, 4) == [2, 2, 1, 1]
    assert uniform_schedule(3, 1.0, 7) == [1, 1, 1]
    assert uniform_schedule(13, 0.0, 4) == []


def test_orders():
    prompt = np.array([[5, 0], [2, 11], [12, 3]])
    for kind in ("random", "left_to_right", "block_distant"):
        order = draw_orders(prompt, 13, [3, 2], kind, range(3), 0)
        assert np.array_equal(np.sort(order, 1), np.tile(np.arange(13), (3, 1)))
        assert np.array_equal(order[:, :2], prompt)
        assert (np.diff(order[:, 7:]) > 0).all(), "sequential places go left to right"
        assert (np.diff(order[:, 2:]) > 0).all() == (kind == "left_to_right")
    blocks = draw_orders(np.empty((1, 0), np.int64), 12, [3, 3, 3, 3], "block_distant", range(1), 0)
    assert blocks[0].reshape(4, 3).tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    uneven = draw_orders(np.empty((1, 0), np.int64), 7, [3, 2, 2], "block_distant", range(1), 0)
    assert uneven[0].tolist() == [0, 3, 6, 1, 4, 2, 5]


def test_random_orders_are_uniform():
    order = draw_orders(np.full((6000, 1), 2), 4, [3], "random", range(6000), 1)
    assert (order[:, 0] == 2).all()
    _, counts = np.unique(order, axis=0, return_counts=True)
    chi_square_is_fine(counts, np.full(6, 1 / 6))
    mixed = draw_orders(np.empty((6000, 0), np.int64), 4, [2], "random", range(6000), 1)
    first, counts = np.unique(mixed[:, :2], axis=0, return_counts=True)
    assert len(first) == 12
    chi_square_is_fine(counts, np.full(12, 1 / 12))


# ------------------------------------------------------------------------------------------------ seeds and refusals


def test_seeds_and_batches():
    model = random_model()
    options = {"alpha_0": 0.5, "steps": 4, "top_p": 0.9}
    whole = sample(model, 5, 13, seed=1, **options)
    again = sample(model, 5, 13, seed=1, **options)
    other = sample(model, 5, 13, seed=2, **options)
    assert torch.equal(whole[0], again[0])
    assert torch.equal(whole.order, again.order)
    assert not torch.equal(whole[0], other[0])
    assert not torch.equal(whole.order, other.order)
    assert len(whole[0].unique(dim=0)) == 5
    for first, count in ((0, 2), (2, 3)):
        part = sample(model, count, 13, seed=1, first_row=first, **options)
        assert part.ks == whole.ks
        assert torch.equal(part[0], whole[0][first : first + count])
        close(part[1], whole[1][first : first + count])


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_a_sampler_is_kept_over_parts_and_calls(monkeypatch, fixed_shapes):
    """As on GPUs, whose recorded passes it holds: the same samples, and a new one only where the old does not fit."""
    made, begin = [], Sampler.__init__

    def counted(self, model, num_rows, num_places, cache, most):
        made.append((num_rows, num_places))
        begin(self, model, num_rows, num_places, cache=cache, fixed_shapes=fixed_shapes, late=3, most=most)

    calls = [(5, 13, 2, {}), (2, 13, None, {"stop_id": 3}), (2, 9, None, {"schedule": "first_hitting"}), (1, 13, None, {}),
             (3, 13, None, {}), (3, 13, None, {"schedule": "first_hitting", "propose": 2})]  # fmt: skip
    asked = []

    def watch(count, rows, positions, tokens):
        asked.append((rows.tolist(), positions.tolist(), tokens.tolist()))

    network, results = random_model(), {}
    for lasting in (False, True):
        monkeypatch.setattr(Sampler, "lasting", property(lambda self, lasting=lasting: lasting))
        monkeypatch.setattr(Sampler, "__init__", counted)
        made.clear()
        asked.clear()
        model = PretrainedEsoLM(network, 0.5)
        found = [
            model.sample(n, length, 4, batch_size=size, watch=watch, seed=7, **more) for n, length, size, more in calls
        ]
        results[lasting] = found, list(made), list(asked)
    (fresh, many, told), (again, few, told_again) = results[False], results[True]
    assert many == [(2, 13), (2, 13), (1, 13), (2, 13), (2, 9), (1, 13), (3, 13), (3, 13)]
    assert few == [(2, 13), (3, 13), (3, 13)]
    assert told == told_again
    for a, b in zip(fresh, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip((a[0], a.order, a.saved), (b[0], b.order, b.saved), strict=True))
        close(a[1], b[1])
        assert (a.ks, a.num_forward_passes) == (b.ks, b.num_forward_passes)


def test_samples_is_a_pair_that_copies():
    samples = sample(random_model(), 2, 5, alpha_0=1.0, steps=2)
    for twin in (copy.deepcopy(samples), pickle.loads(pickle.dumps(samples))):
        tokens, log_probs = twin
        assert len(twin) == 2
        assert torch.equal(tokens, samples[0])
        assert torch.equal(log_probs, samples[1])
        assert torch.equal(twin.order, samples.order)
        assert twin.ks == samples.ks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 0}, "num_samples = 0: must be a whole number"),
        ({"length": -3}, "length = -3"),
        ({"steps": 2.5}, "steps = 2.5"),
        ({"alpha_0": 1.2}, "alpha_0 = 1.2"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"schedule": "binomail"}, "one of binomial, uniform"),
        ({"order": "randm"}, "one of random, left_to_right, block_distant"),
        ({"order": "block_distant"}, "use schedule='uniform'"),
        ({"prompt_positions": [1]}, "without a prompt"),
        ({"prompt": [22]}, "prompt: ids must lie in 0 to 21, found 22"),
        ({"prompt": [0.5]}, "must hold integers"),
        ({"prompt": [1] * 8}, "prompt_positions: must lie in 0 to 6"),
        ({"prompt": [1, 2], "prompt_positions": [3]}, "1 positions for 2 prompt tokens"),
        ({"prompt": [1, 2], "prompt_positions": [3, 3]}, "given twice"),
        ({"prompt": [[1, 2]] * 3}, "num_samples = 2"),
    ],
)
def test_refusals_name_the_argument(change, message):
    arguments = {"num_samples": 2, "length": 7, "alpha_0": 0.5, "steps": 3, **change}
    with pytest.raises(ValueError, match=message):
        sample(random_model(), **arguments)


def test_a_broken_model_is_an_error():
    model = random_model()
    model.head.weight.data[3, 5] = float("nan")
    for top_p in (1.0, 0.9):
        with pytest.raises(ValueError, match="not finite"):
            sample(model, 2, 7, alpha_0=1.0, steps=3, top_p=top_p)


# --------------------------------------------------------------------------------------------------- the loaded model


def test_loaded_model_samples_and_scores(tmp_path):
    model = random_model(**MODERN)
    model_folder = tmp_path / "model"
    save_model(model_folder, model.shape, 0.25, model.named_parameters(), dtype=torch.float64)
    loaded = load_pretrained(model_folder, dtype=torch.float64)
    assert loaded.config == model.shape
    assert loaded.alpha_0 == 0.25
    prompt = torch.tensor([4, 7])
    tokens, log_probs = samples = loaded.sample(5, 13, steps=100000, seed=3, prompt=prompt)
    theirs = sample(model, 5, 13, alpha_0=0.25, steps=100000, seed=3, prompt=prompt)
    assert torch.equal(tokens, theirs[0])
    scored = torch.ones(13, dtype=torch.bool).index_fill(0, torch.tensor([0, 1]), False).expand(5, -1)
    log_p = loaded.log_likelihood(tokens, samples.order, scored)
    close(log_p.detach(), log_probs.sum(1))
    log_p.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in loaded.model.parameters())
    with pytest.raises(ValueError, match="tokenizer"):
        _ = loaded.tokenizer
    load_tokenizer("bytes").save(model_folder)
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("def f():")) == "def f():"


def test_defaults_and_batches_of_the_loaded_model():
    model = PretrainedEsoLM(random_model(), 0.5)
    prompt = torch.arange(10).view(5, 2)
    whole = model.sample(5, 13, prompt=prompt, prompt_positions=torch.tensor([12, 3]))
    assert whole.ks == sample(model.model, 5, 13, alpha_0=0.5, steps=13, prompt=prompt).ks
    assert sum(whole.ks) == 11
    parts = model.sample(5, 13, prompt=prompt, prompt_positions=torch.tensor([12, 3]), batch_size=2)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole.order, parts.order)
    close(whole[1], parts[1])
    assert model.sample(2, 13, alpha_0=0.0).ks == [1] * 13
    for arguments, message in (
        ({"batch_size": 0}, "batch_size = 0"),
        ({"batch_size": 2, "prompt": torch.zeros(6, 2, dtype=torch.int64)}, "prompt: 6 rows for num_samples = 5"),
        ({"steps": 0}, "steps = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.sample(5, 13, **arguments)
    with pytest.raises(ValueError, match="scored"):
        model.log_likelihood(whole[0], whole.order, torch.ones(13, dtype=torch.bool))
    with pytest.raises(ValueError, match="not loaded from a folder"):
        _ = model.tokenizer
