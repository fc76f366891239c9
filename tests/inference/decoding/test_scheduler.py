"""Plans of every kind, rows of their own pace, early stops, and what is told while rows are being written."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity import random_model
from test_sampler import chi_square_is_fine, close, uncached_logits

from esolm_megatron.inference import PretrainedEsoLM, Sampler, SampleRequest, sample
from esolm_megatron.inference.decoding.decoder import Decoder
from esolm_megatron.inference.decoding.draw import Draw, draw_tokens, penalise, probabilities
from esolm_megatron.inference.decoding.scheduler import plan_rows
from esolm_megatron.inference.sampler import schedule_log_probs
from esolm_megatron.model import cache
from esolm_megatron.objective.likelihood import log_likelihood
from esolm_megatron.objective.noise import words


def planned(*args, mask_id, **fields):
    return plan_rows(SampleRequest(*args, **fields), mask_id)


STOPS = {5: 3, 7: 5, 8: 17, 3: 13}
"""Tokens of these rows below, which end there: at once, and long before they are full."""
GIVEN = torch.tensor([[4, 0, 3, 10, 11, 1, 12, 5, 2, 9, 6, 8, 7], *torch.rand(3, 13).argsort(1).tolist()])
KINDS = {
    "ancestral": {"schedule": "binomial"},
    "uniform": {"schedule": "uniform"},
    "first hitting": {"schedule": "first_hitting"},
    "block distant": {"schedule": "uniform", "order": "block_distant"},
    "left to right": {"schedule": "uniform", "order": "left_to_right"},
    "one order for all": {"schedule": "binomial", "order": GIVEN[0]},
    "an order for each": {"schedule": "uniform", "order": GIVEN},
}
PROMPTS = {
    "no prompt": {},
    "prefix": {"prompt": torch.tensor([3, 1, 4])},
    "holes": {"prompt": torch.tensor([[3, 1, 4, 1]] * 4), "prompt_positions": torch.tensor([11, 0, 7, 2])},
}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_of_every_kind_equals_the_uncached_network(kind, prompt, own):
    """Logits of each pass against the whole prefix fed at once, and the log-probabilities that are returned."""
    model = random_model()
    options = {"alpha_0": 0.6, "steps": 4, "own_schedules": own, "seed": 2, **KINDS[kind], **PROMPTS[prompt]}
    samples = sample(model, 4, 13, **options)
    tokens, log_probs = samples
    num_given = options["prompt"].shape[-1] if "prompt" in options else 0
    in_order, done = tokens.gather(1, samples.order), [num_given] * 4
    fed = torch.full_like(in_order, model.shape.mask_id)
    fed[:, :num_given] = in_order[:, :num_given]
    fed, order = (F.pad(x, (0, 1, 0, 1)) for x in (fed, samples.order))
    decoder = Decoder(model, fed, order)
    for row, ks in enumerate(np.broadcast_to(samples.ks, (4, len(samples.ks[0]) if own else len(samples.ks)))):
        decoder.add(row, ks, num_given)

    def choose(logits, rows, places):
        for row in rows.unique().tolist():
            mine = rows == row
            assert places[mine].tolist() == list(range(done[row], done[row] + int(mine.sum())))
            theirs = uncached_logits(model, tokens[row], samples.order[row], done[row], int(mine.sum()))
            close(logits[mine][:, :-1], theirs[:, :-1])
            done[row] += int(mine.sum())
        return in_order[rows, places]

    with torch.inference_mode():
        while len(decoder.rows):
            decoder.step(choose)
    assert done == [13] * 4
    close(log_probs, schedule_log_probs(model, tokens, samples.order, samples.ks, num_given=num_given))
    if kind == "first hitting":
        scored = log_probs != 0
        close(log_probs.sum(1), log_likelihood(model, tokens, samples.order, scored=scored).detach())


def test_given_orders_are_followed_with_the_prompt_first():
    options = {"mask_id": 22, "alpha_0": 0.5, "steps": 3, "prompt": torch.tensor([1, 2]), "order": GIVEN[0]}
    plans = planned(2, 13, prompt_positions=torch.tensor([9, 0]), **options)
    assert plans[1].order.tolist() == [9, 0, 4, 3, 10, 11, 1, 12, 5, 2, 6, 8, 7]
    for broken in (GIVEN[0, :12], GIVEN[0].clone().fill_(3)):
        with pytest.raises(ValueError, match="order: each row must hold every position 0 to 12 once"):
            planned(2, 13, **{**options, "order": broken})


def test_rows_with_schedules_of_their_own():
    model = random_model()
    options = {"alpha_0": 0.5, "steps": 3, "own_schedules": True}
    samples = sample(model, 6, 13, seed=1, **options)
    assert np.sum(samples.ks, axis=1).tolist() == [13] * 6
    passes = np.count_nonzero(samples.ks, axis=1)
    assert len(set(passes)) > 1, "the test needs rows that end at different times"
    assert samples.num_forward_passes == passes.max(), "no row waits for another"
    parts = PretrainedEsoLM(model, 0.5).sample(6, 13, seed=1, batch_size=4, **options)
    assert torch.equal(samples[0], parts[0])
    assert samples.ks == parts.ks
    counts = [[sum(p.ks[:-1]) for p in planned(300, 20, mask_id=22, alpha_0=1.0, steps=2, own_schedules=True)]]
    assert abs(np.mean(counts) - 10) < 5 * (5 / 300) ** 0.5, "each row draws its own binomial numbers"


def test_first_hitting_has_the_share_of_the_ancestral_sampler():
    plans = planned(400, 32, mask_id=9, alpha_0=0.25, steps=1, schedule="first_hitting", own_schedules=True)
    assert {k for plan in plans for k in plan.ks} == {1}
    sequential = [np.argmax([*(np.diff(p.order[::-1]) > 0).tolist(), True]) for p in plans]
    assert abs(32 - np.mean(sequential) - 1 - 8) < 1


PROPOSED = {f"proposed-{n}": {"schedule": "first_hitting", "propose": 3, "passes": n} for n in (1, 2)}


@pytest.mark.parametrize(
    "options",
    [{}, {"late": 3}, {"fixed_shapes": True, "late": 3}, {"places": 100}, {"places": 90, "late": 3}],
    ids=["now", "late", "fixed, late", "pages", "pages, late"],
)
def test_rows_come_and_go(monkeypatch, options):
    """Plans that enter when others leave give what they give alone, whatever memory they are put in, and when they are read."""
    monkeypatch.setattr(cache, "PAGE", 4)
    model, short = random_model(), 0
    kinds = list(KINDS.values())[:5]
    proposed = {5: PROPOSED["proposed-1"], 6: PROPOSED["proposed-2"], 8: {**PROPOSED["proposed-1"], "propose": "auto"}}
    plans = [
        planned(
            1, 5 + i, mask_id=22, first_row=i, alpha_0=0.6, steps=1 + i % 3, seed=i,
            top_p=0.8 if i % 2 else 1.0, repetition_penalty=1.0 + (i == 4), stop_id=STOPS.get(i), **proposed.get(i, kinds[i % 5]),
        )[0]
        for i in range(9)
    ]  # fmt: skip
    sampler, waiting, made, at = Sampler(model, 3, 13, most=8, **options), list(range(9)), {}, {}
    told, saved = {i: {} for i in range(9)}, {}
    with torch.inference_mode():
        while waiting or sampler.busy:
            short += bool(waiting and sampler.free and not sampler.takes(plans[waiting[0]]))
            while waiting and sampler.takes(plans[waiting[0]]):
                plan = waiting.pop(0)
                at[sampler.add(plans[plan])] = plan
            filled = sampler.step()
            for row, position, token in zip(*filled[:3], strict=True) if filled else ():
                assert told[at[row]].setdefault(position, token) == token
            for row in filled.done if filled else ():
                assert not sampler.at_work(row)
                made[at[row]], saved[at[row]] = sampler.result(row), int(sampler.saved[row])
                sampler.release(row)
        assert len(sampler.free) == 3
        pages = sampler.decoder.cache.free
        assert (short > 0) == ("places" in options), "memory, not rows, is what some wait for"
        assert sorted(pages) == list(range(options.get("places", 0) // 4))
        assert sampler.decoder.cache.table is None or (sampler.decoder.cache.table == len(pages)).all()
        assert any(saved.values()), "the test needs a row that is stopped"
        assert not sampler.plans
        for i, plan in enumerate(plans):
            alone = Sampler(model, 1, 13, late=5 * (i % 2), most=8)  # what follows an end is neither told nor kept
            alone.add(plan)
            while alone.busy:
                alone.step()
            assert torch.equal(alone.result(0)[0], made[i][0])
            close(alone.result(0)[1], made[i][1])
            assert saved[i] == alone.saved[0]
            assert len(told[i]) == len(plan.order) - saved[i]
            assert all(made[i][0][position] == token for position, token in told[i].items())


def test_rows_that_propose_little_have_room_beside_those_that_propose_much(monkeypatch):
    """Groups of masks are as wide as those of the row that proposes most, also where a text ends."""
    monkeypatch.setattr(cache, "PAGE", 4)
    model, results = random_model(), {}
    plans = [
        planned(1, 12, mask_id=22, first_row=i, alpha_0=1.0, steps=1, **PROPOSED["proposed-1"] | {"propose": k})[0]
        for i, k in enumerate((2, 2, 2, "auto"))
    ]
    with torch.inference_mode():
        for together in ([0, 1, 2, 3], [0], [1], [2]):
            sampler = Sampler(model, 4, 12, most=8, places=400, late=3)
            rows = sampler.add_all([plans[i] for i in together])
            while sampler.busy:
                sampler.step()
            for i, row in zip(together, rows, strict=True):
                results.setdefault(i, []).append(sampler.result(row))
    with pytest.raises(ValueError, match="propose = 8: this sampler was made with most = 2; make it with more"):
        Sampler(model, 4, 12, most=2).add(plans[3])
    for i in (0, 1, 2):
        (tokens, log_probs), (alone, theirs) = results[i]
        assert torch.equal(tokens, alone)
        close(log_probs, theirs)


# ------------------------------------------------------------------------------------------------------- early stops


STOPPED = {**KINDS, **PROPOSED}


@pytest.mark.parametrize("kind", STOPPED)
def test_stopped_rows_are_full_rows_cut_at_end_of_text(kind):
    model = random_model()
    options = {
        "alpha_0": 0.5,
        "steps": 6,
        "seed": 3,
        **STOPPED[kind],
        "prompt": torch.tensor([7]),
        "own_schedules": True,
    }
    stop = 5
    whole = sample(model, 4, 13, **options)
    cut = sample(model, 4, 13, **options, stop_id=stop)
    for row in range(4):
        ends = [i for i, token in enumerate(whole[0][row].tolist()) if token == stop] or [12]
        assert torch.equal(whole[0][row, : ends[0] + 1], cut[0][row, : ends[0] + 1])
        same = cut[0][row] == whole[0][row]
        assert (same | (cut[0][row] == stop)).all()
        left_out = (cut[1][row] == 0) & (torch.arange(13) > 0)
        assert int(left_out.sum()) == cut.saved[row]
        assert (cut[0][row][left_out] == stop).all()
    assert cut.num_forward_passes <= whole.num_forward_passes


@pytest.mark.parametrize("passes", [1, 2])
def test_a_stop_saves_work_of_verified_proposals(passes):
    model = random_model()
    options = {"alpha_0": 0.5, "steps": 6, "seed": 5, "schedule": "first_hitting", "propose": 3, "passes": passes}
    whole, cut = (sample(model, 16, 13, **options, stop_id=stop) for stop in (None, 5))
    assert cut.saved.sum() > 20
    assert torch.equal((cut[1] == 0).sum(1), cut.saved)
    assert torch.equal(cut[0][cut.saved == 0], whole[0][cut.saved == 0])


def test_work_that_a_stop_saves_is_counted():
    model = random_model(torch.float32)
    whole = sample(model, 16, 13, alpha_0=0.0, steps=1, seed=1)
    cut = sample(model, 16, 13, alpha_0=0.0, steps=1, seed=1, stop_id=3)
    for row, tokens in enumerate(whole[0].tolist()):
        assert cut.saved[row] == (12 - tokens.index(3) if 3 in tokens else 0)
    assert cut.saved.sum() > 0
    only = sample(model, 1, 13, alpha_0=0.0, steps=1, seed=1, stop_id=int(whole[0][0, 2]))
    assert only.num_forward_passes == 13 - int(only.saved[0]) <= 3
    with pytest.raises(ValueError, match="stop_id = 22"):
        sample(model, 1, 13, alpha_0=0.0, steps=1, stop_id=22)


def test_watching_sees_each_place_once_as_it_is_filled():
    model, seen, passes = random_model(), {}, []

    def watch(count, rows, positions, tokens):
        passes.append(count)
        for row, position, token in zip(rows, positions, tokens, strict=True):
            assert (row, position) not in seen
            seen[row, position] = token

    prompt = torch.tensor([1, 2])
    samples = PretrainedEsoLM(model, 0.5).sample(5, 13, steps=4, prompt=prompt, watch=watch, batch_size=3)
    assert len(seen) == 5 * 11
    assert all(samples[0][at] == token for at, token in seen.items())
    assert passes == 2 * list(range(samples.num_forward_passes))


# ------------------------------------------------------------------------------------------------------------- draws


def test_top_k_and_both_together():
    logits = torch.randn(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    logits[3] = logits[7] = logits.sort().values[-4]  # ties at the fourth place belong to it
    both = [(Draw(top_k=4, top_p=share, temperature=2.0), None) for share in (0.9, 0.4)]
    for draw, size in ((Draw(top_k=4), 6), *both, (Draw(0.0, top_k=2), 1)):
        p = (logits / (draw.temperature or 1)).softmax(0)
        p[p < p.sort().values[-draw.top_k]] = 0
        p = p / p.sum()
        likelier = (p[None] * (p[None] > p[:, None])).sum(1)
        p[likelier >= (draw.top_p if draw.temperature else 1e-9)] = 0
        assert size is None or (p > 0).sum() == size
        raw = torch.from_numpy(words(20000, str(draw)).view(np.int64))
        tokens, log_probs = draw_tokens(logits.expand(20000, -1), raw, draw)
        chi_square_is_fine(torch.bincount(tokens, minlength=500), p / p.sum())
        close(log_probs, logits.log_softmax(0)[tokens])
        kinds = torch.tensor([[draw.temperature, draw.top_p, draw.top_k, 1.0]] * 2, dtype=torch.float64)
        kinds[1] = torch.tensor([0.5, 1, 0, 1])  # each row is drawn in its own way
        found = probabilities(logits.expand(2, -1), kinds, True)
        close(found[0], p / p.sum())
        close(found[1], (logits / 0.5).softmax(0))
        close(probabilities(logits.expand(2, -1), kinds, False)[1], (logits / 0.5).softmax(0))


def test_repetition_is_penalised_once_for_each_token_of_the_row():
    logits = torch.tensor([[2.0, -1.0, 0.5, float("-inf")]], dtype=torch.float64)
    out = penalise(logits, torch.tensor([[0, 0, 1, 3]]), 2.0)
    assert out.tolist() == [[1.0, -2.0, 0.5, float("-inf")]]
    model = random_model(spread=0.3)
    options = {"alpha_0": 0.5, "steps": 6, "prompt": torch.tensor([3])}
    free, never = (sample(model, 8, 13, **options, repetition_penalty=penalty) for penalty in (1.0, 1e9))
    distinct = [np.mean([len(set(row)) for row in x[0].tolist()]) for x in (free, never)]
    assert distinct[1] > distinct[0]
    close(never[1], schedule_log_probs(model, never[0], never.order, never.ks, num_given=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": -1}, "top_k = -1"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0"),
        ({"propose": 0}, "propose = 0"),
        ({"propose": 2, "passes": 3}, "passes = 3"),
        ({"propose": 2}, "use schedule='first_hitting'"),
        ({"propose": 2, "schedule": "first_hitting", "repetition_penalty": 2.0}, "cannot be combined"),
    ],
)
def test_refusals_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        sample(random_model(), 2, 7, **{"alpha_0": 0.5, "steps": 3, **change})
