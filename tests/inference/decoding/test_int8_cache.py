"""Keys and values of 8 bits: what they hold, what they cost in likelihood, and that nothing else changes with them."""

import pytest
import torch
from parity import MODERN, random_model
from test_cuda_graphs import logits_of
from test_sampler import close

from esolm_megatron.inference import SampleRequest, loss_of_cache, sample
from esolm_megatron.inference.decoding import decoder
from esolm_megatron.inference.decoding.scheduler import plan_rows
from esolm_megatron.inference.sampler import Sampler, schedule_log_probs
from esolm_megatron.model.cache import KVCache

PROMPT = torch.tensor([1, 5, 2, 7])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_kept_is_within_half_a_step_and_a_row_moves_whole(dtype):
    model = random_model(num_heads=2, hidden_size=16)
    cache = KVCache(model.shape, 2, 7, dtype, torch.device("cpu"), int8=True)
    rows, slots = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])
    cache.begin_step(rows, slots, torch.arange(3))
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 3, 2, 8, generator=generator) * torch.tensor([1e-3, 1, 50])[:, None, None]).to(dtype)
    v[1] = 0
    out = cache.store(1, k, v)
    for given, kept, scale in zip((k, v), out[:2], out[2], strict=True):
        found = (kept * scale[..., None])[rows, :, slots].double()
        step = given.double().abs().amax(-1, keepdim=True) / 127
        assert (
            (found - given.double()).abs()
            <= step * (0.5 + 2 * torch.finfo(dtype).eps * 127 * (dtype == torch.bfloat16)) + 1e-9
        ).all()
    assert cache.keys.element_size() == 1
    assert sum(x.nbytes for x in (cache.keys, cache.values, cache.scales)) == 2 * cache.keys.numel() * (8 + 4) / 8
    cache.move(0, 1, 2)
    for x in (cache.keys[1], cache.values[1], *cache.scales[:, 1]):
        assert torch.equal(x[0], x[1])


@pytest.mark.parametrize("shape", [{}, MODERN], ids=["reference", "modern"])
def test_shapes_and_batches_change_nothing_and_8_bits_little(monkeypatch, shape):
    """Rows at fixed shapes as at their own; a row alone as among others; proposals that are verified, too."""
    model, made = random_model(**shape), KVCache.__init__
    options = {"alpha_0": 0.7, "steps": 4, "own_schedules": True, "seed": 3, "prompt": PROMPT}
    plans = plan_rows(SampleRequest(5, 13, **options), model.shape.mask_id)
    exact, _ = logits_of(model, plans, 13, False)
    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "__init__", lambda self, *a, **b: made(self, *a, **(b | {"int8": True})))
        found, _ = logits_of(model, plans[:3], 13, False, later=plans[3:])
        patch.setattr(decoder, "SHORT", 2)  # prompts by themselves, each once
        fixed, _ = logits_of(model, plans[:3], 13, True, later=plans[3:])
    for at, logit in exact.items():
        close(found[at][:-1], fixed[at][:-1])
        close(found[at][:-1], logit[:-1], 0.05)
    assert max(float((found[at] - exact[at])[:-1].abs().max()) for at in exact) > 1e-6, "the cache is of 8 bits"
    for more in ({}, {"schedule": "first_hitting", "own_schedules": False, "propose": 3}):
        whole = sample(model, 5, 13, cache="int8", **(options | more))
        alone = sample(model, 2, 13, cache="int8", first_row=2, **(options | more))
        assert torch.equal(whole[0][2:4], alone[0])
        close(whole[1][2:4], alone[1])


def test_the_loss_of_likelihood_is_told():
    """By hand, of texts that ended early; none without 8 bits; more, the coarser the numbers are."""
    model = random_model()
    options = {"alpha_0": 0.7, "steps": 4, "own_schedules": True, "stop_id": 3, "prompt": PROMPT}
    samples = sample(model, 24, 13, cache="int8", **options)
    assert samples.saved.sum() > 0
    exact = schedule_log_probs(model, samples[0], samples.order, samples.ks, num_given=4)
    lost = [
        float(samples[1][row, at] - exact[row, at])
        for row in range(16)
        for at in samples.order[row, 4 : 13 - int(samples.saved[row])]
    ]
    assert loss_of_cache(model, samples, 4) == pytest.approx(sum(lost) / len(lost), rel=1e-9)
    assert max(map(abs, lost)) > 1e-6
    assert abs(loss_of_cache(model, sample(model, 24, 13, **options), 4)) < 1e-12


def test_the_loss_is_a_divergence():
    """Above zero on average, where keys and values are far coarser than 8 bits."""
    model, kept = random_model(), KVCache.store

    def coarse(self, layer, k, v):
        return kept(self, layer, (k * 2).round() / 2, (v * 2).round() / 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVCache, "store", coarse)
        samples = sample(model, 16, 13, alpha_0=1.0, steps=13, cache="int8")
    assert loss_of_cache(model, samples) > 1e-3


def test_a_kept_sampler_serves_requests_of_its_kind():
    sampler = Sampler(random_model(), 2, 8, cache="int8")
    request = SampleRequest(2, 8, 1.0, 4)
    assert not sampler.serves(request, 1)
    assert sampler.serves(SampleRequest(2, 8, 1.0, 4, cache="int8"), 1)
    assert not sampler.serves(SampleRequest(2, 8, 1.0, 4, cache="int8"), 3)
    with pytest.raises(ValueError, match="cache = '8': must be one of full, int8"):
        sample(random_model(), 2, 8, alpha_0=1.0, steps=4, cache="8")
