"""Passes of fixed shapes give what passes of their own shapes give; only their recording needs a GPU."""

import copy
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cuda_rules import cuda_operators
from parity import MODERN, random_model
from test_sampler import close
from torch.utils._python_dispatch import TorchDispatchMode

from esolm_megatron.inference import SampleRequest, sample
from esolm_megatron.inference import sampler as sampler_module
from esolm_megatron.inference.decoding import decoder as decoder_module
from esolm_megatron.inference.decoding import draw_triton
from esolm_megatron.inference.decoding.cuda_graphs import RecordedPasses, Size
from esolm_megatron.inference.decoding.decoder import Decoder
from esolm_megatron.inference.decoding.draw import fused_draw
from esolm_megatron.inference.decoding.scheduler import plan_rows
from esolm_megatron.inference.sampler import Sampler
from esolm_megatron.model import attention_triton, sampling_triton
from esolm_megatron.model import cache as cache_module
from esolm_megatron.model.cache import KVCache, Queries


def logits_of(model, plans, length, fixed_shapes, later=()):
    """Logits of every pass, by row and place; the `later` plans enter after two passes. And the decoder."""
    fed = torch.full((len(plans) + len(later) + 1, length + 1), 1)  # places hold anything before they are filled
    order = F.pad(torch.stack([torch.from_numpy(plan.order) for plan in [*plans, *later]]), (0, 1, 0, 1))
    decoder, found = Decoder(model, fed, order, fixed_shapes=fixed_shapes), {}

    def enter(row, plan):
        fed[row, : len(plan.given)] = torch.from_numpy(plan.given)
        decoder.add(row, plan.ks, len(plan.given), (plan.given.tobytes(), plan.order[: len(plan.given)].tobytes()))

    def choose(logits, rows, places):
        for row, place, logit in zip(rows.tolist(), places.tolist(), logits, strict=True):
            if row < len(fed) - 1 and place < length:  # the others are computed for nothing
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


def test_long_prompts_are_fed_apart_in_chunks_and_once(monkeypatch):
    """Rows 0, 1 and 4 share a prompt, one of them comes later; row 3 has a short one."""
    monkeypatch.setattr(decoder_module, "SHORT", 3)
    monkeypatch.setattr(decoder_module, "CHUNK", 4)
    monkeypatch.setattr(decoder_module, "FED_AT_ONCE", 8)
    model, fed, moved = random_model(), [], []
    long, other, short = [1, 5, 2, 9, 9, 3, 7], [1, 5, 2, 9, 9], [4, 2]
    prompts = [long, long, other, short, long]
    plans = [
        plan_rows(SampleRequest(1, 16, alpha_0=0.6, steps=3, first_row=i, prompt=torch.tensor(x)), model.shape.mask_id)[
            0
        ]
        for i, x in enumerate(prompts)
    ]
    ragged, _ = logits_of(model, plans[:4], 16, False, later=plans[4:])
    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "move", lambda self, *args, move=KVCache.move: (moved.append(args), move(self, *args)))
        patch.setattr(
            RecordedPasses,
            "feed",
            lambda self, size, row, *args, feed=RecordedPasses.feed: (
                fed.append((size, row.tolist(), args[-1] is None)),
                feed(self, size, row, *args),
            ),
        )
        fixed, _ = logits_of(model, plans[:4], 16, True, later=plans[4:])
    assert ragged.keys() == fixed.keys()
    for at, logit in ragged.items():
        close(fixed[at][:-1], logit[:-1])
    apart = [(size.width, rows) for size, rows, prefill in fed if prefill]
    assert apart == [(4, [0, 2]), (4, [0, 2]), (4, [4]), (4, [4])]
    assert moved == [(0, 1, 7)]
    assert max(size.width for size, _, prefill in fed if not prefill) <= 16


def test_many_passes_have_few_sizes():
    """One token a pass, and ragged passes: what is recorded is replayed."""
    model = random_model()
    for options in ({"schedule": "first_hitting", "steps": 1}, {"schedule": "binomial", "steps": 64}):
        plans = plan_rows(SampleRequest(3, 300, alpha_0=1.0, **options), model.shape.mask_id)
        _, decoder = logits_of(model, plans, 300, True)
        assert sum(decoder.recorded.counts.values()) == len(plans[0].ks)
        assert len(decoder.recorded.counts) <= 16


class Host(TorchDispatchMode):
    """Operators of a pass, and how often one hands the host a number that only the device knows."""

    ASKS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2")

    FREE = ("view", "_unsafe_view", "expand", "select", "slice", "split", "unbind", "transpose", "permute", "unsqueeze", "t",
            "squeeze", "detach", "reshape", "chunk",
            "expand_as", "alias", "as_strided", "empty", "empty_like", "new_empty", "empty_strided")  # fmt: skip
    """No launch of a GPU."""

    def __init__(self):
        super().__init__()
        self.count, self.asked, self.launches = 0, [], Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.count += 1
        if name not in self.FREE and name.removesuffix("_copy") not in self.FREE:
            self.launches[name] += 1
        masks = [x for x in args[1] if x is not None] if name.startswith("index") and isinstance(args[1], list) else []
        if name in self.ASKS or any(x.dtype == torch.bool for x in masks):
            self.asked.append(name)
        return function(*args, **(kwargs or {}))


class Stub:
    """In place of a Triton kernel: notes that it was launched, and does nothing."""

    def __init__(self, name, seen):
        self.name, self.seen = name, seen

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.seen.launches.update([self.name])


def counted_pass(options, rows=3, length=24, stubbed=None, **shape):
    """Operators of one pass of a sampler through a GPU's branches, and what it asked the host."""
    model = random_model(**MODERN | shape).bfloat16()
    most = 8 if options.get("propose") == "auto" else options.get("propose", 1)
    sampler = Sampler(model, rows, length, fixed_shapes=True, late=2, cache=options.get("cache", "full"), most=most)
    sampler.add_all(plan_rows(SampleRequest(rows, length, alpha_0=1.0, **options), model.shape.mask_id))
    with torch.inference_mode(), cuda_operators():
        sampler.kernel = fused_draw(sampler.log_probs)
        sampler.step(watched=False)
        recorder, (key, count) = sampler.decoder.recorder, next(iter(sampler.decoder.recorder._ready.items()))
        assert count == 1
        with Host() as seen:
            if stubbed is not None:
                stubbed(seen)
            if most > 1:
                sampler.verified.run(*key[0], key[1])
            else:
                sampler.decoder.recorded.run(key[0], sampler._choose)
        assert recorder._ready.total() == 1
    return seen


def test_a_pass_asks_the_host_nothing():
    """What a GPU records, by the operators that it calls: also with a nucleus, top-k and a penalty."""
    pytest.importorskip("triton")
    uniform = {"schedule": "uniform", "steps": 12}
    for options in ({}, {"top_p": 0.5, "top_k": 7, "repetition_penalty": 1.2}, {"cache": "int8"}):
        assert counted_pass({**uniform, **options}).asked == []
    for options in ({"propose": 3}, {"propose": "auto", "top_p": 0.5, "top_k": 7}, {"propose": 4, "passes": 2}):
        assert counted_pass({"schedule": "first_hitting", "steps": 1, **options}).asked == []
    with Host() as seen:
        assert torch.ones(3).any()
        torch.ones(3)[torch.ones(3).bool()]
    assert seen.asked == ["_local_scalar_dense", "index"], "this would be seen"


def launches_of(monkeypatch, options, **sizes):
    """What one pass launches, Triton's kernels by their names."""
    with monkeypatch.context() as patch:

        def stubbed(seen):
            for module, names in (
                (attention_triton, ("_attend", "_merge")),
                (sampling_triton, ("_rotate", "_store", "_add_normalise")),
                (draw_triton, ("_draw",)),
            ):
                for name in names:
                    patch.setattr(module, name, Stub(name, seen))

        return counted_pass(options, stubbed=stubbed, **sizes).launches


@pytest.mark.parametrize("cache", ["full", "int8"])
def test_a_block_is_few_launches(monkeypatch, cache):
    """Four products, norm, rotation, the write into the cache, attention, sum with norm, SwiGLU's two, sum."""
    pytest.importorskip("triton")
    options = {"schedule": "uniform", "steps": 12, "cache": cache}
    two, three = (launches_of(monkeypatch, options, num_layers=n) for n in (2, 3))
    block = three - two
    assert block.total() == 12, block
    assert {"_rotate", "_store", "_attend", "_add_normalise"} <= block.keys()
    assert (two - block - block).total() < 70, two - block - block


def test_a_pass_has_as_many_launches_whatever_the_batch(monkeypatch):
    pytest.importorskip("triton")
    for options in ({"schedule": "uniform", "steps": 12}, {"schedule": "first_hitting", "steps": 1, "propose": 3}):
        assert launches_of(monkeypatch, options, rows=2) == launches_of(monkeypatch, options, rows=5)


def test_passes_of_proposals_have_few_sizes():
    """Of all passes of a call, whose rows are at different places of their texts."""
    pytest.importorskip("triton")
    for options, sizes in (({}, 3), ({"passes": 2}, 6), ({"propose": "auto"}, 3)):
        request = SampleRequest(4, 60, 1.0, 1, schedule="first_hitting", **{"propose": 4, **options})
        sampler = Sampler(random_model(), 4, 60, fixed_shapes=True, late=2, most=8)
        sampler.add_all(plan_rows(request, 22))
        with torch.inference_mode():
            while sampler.busy:
                sampler.step()
        ready = sampler.decoder.recorder._ready
        assert len(ready) <= sizes, ready.keys()
        if "passes" in options:  # in turn: proposals, and one mask after each; or masks after the last token
            assert {min(key[0][1:]) for key in ready} == {1}, ready.keys()
        assert ready.total() > 10


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "uniform", "steps": 3, "own_schedules": True},
        {"schedule": "uniform", "steps": 3, "top_k": 9, "repetition_penalty": 1.3, "stop_id": 4},
        {"schedule": "first_hitting", "steps": 1, "propose": 3},
        {"schedule": "uniform", "steps": 3, "own_schedules": True, "cache": "int8"},
        {"schedule": "first_hitting", "steps": 1, "propose": 3, "cache": "int8"},
    ],
    ids=["plain", "penalised and stopped", "proposals", "int8", "int8 and proposals"],
)
def test_the_branch_of_a_gpu_draws_the_tokens_of_a_cpu(monkeypatch, options, rows):
    """Fixed shapes, both kernels and late reading together, in fp32, from the same words."""
    pytest.importorskip("triton")
    model, fields = random_model(torch.float32, **MODERN), {"alpha_0": 0.7, "seed": 3, **options}
    theirs = sample(model, rows, 13, **fields)
    monkeypatch.setattr(sampler_module, "Sampler", partial(Sampler, fixed_shapes=True, late=2))
    with cuda_operators():
        ours = sample(model, rows, 13, **fields)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours.saved, theirs.saved)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-4)


def test_a_large_batch_has_few_sizes():
    """T = 128 at batch 512 and L 1024, whose passes each have another horizon."""
    plans = plan_rows(SampleRequest(512, 1024, alpha_0=1.0, steps=128), 22)
    ks = np.array(plans[0].ks)
    sizes = {Size.around(512, a + b, b, 512) for a, b in zip([0, *ks], ks, strict=False)}
    assert len(ks) > 100
    assert len(sizes) <= 20


def test_what_rows_see_without_a_kernel_is_asked_of_no_device():
    """No kernel takes fp64, whose keys a GPU reads densely: on a device of which no number can be asked."""
    like = torch.empty(0, dtype=torch.float64, device="meta")
    stored, slots = (torch.empty(*shape, dtype=torch.int64, device="meta") for shape in ((3,), (3, 4)))
    seen = Queries.fixed(stored, slots, 9, like, (slots, slots))
    assert seen.stored is stored
    assert seen.bias.shape == (3, 1, 4, 9)
    assert seen.bias.is_meta


@pytest.mark.parametrize("more", [{}, {"cache": "int8"}, {"schedule": "first_hitting", "propose": 4}])
def test_pages_change_no_token(monkeypatch, more):
    """Through a GPU's branches, kernels included, and dense: texts of several pages, and prompts that rows share."""
    pytest.importorskip("triton")
    monkeypatch.setattr(cache_module, "PAGE", 64)
    model = random_model(torch.float32, **MODERN)
    fields = {"alpha_0": 0.9, "seed": 3, "schedule": "uniform", "steps": 3, "prompt": torch.arange(100) % 20, **more}
    fields["order"] = "left_to_right" if "propose" in more else "random"
    length = 104 if "propose" in more else 140
    theirs = sample(model, 2, length, **fields)
    monkeypatch.setattr(sampler_module, "Sampler", partial(Sampler, fixed_shapes=True, late=2, places=64 * 8))
    dense = sample(model, 2, length, **fields)
    with cuda_operators():
        ours = sample(model, 2, length, **fields)
    for found in (dense, ours):
        assert torch.equal(found[0], theirs[0])
        torch.testing.assert_close(found[1], theirs[1], rtol=1e-4, atol=1e-4)


def test_a_pass_in_bf16_through_cudas_operators():
    """At the shapes that a GPU records, with the products that it has."""
    model = random_model(**MODERN).bfloat16()
    plans = plan_rows(SampleRequest(3, 13, alpha_0=0.5, steps=4), model.shape.mask_id)
    plain, _ = logits_of(model, plans, 13, True)
    truth, _ = logits_of(copy.deepcopy(model).double(), plans, 13, True)
    with cuda_operators() as calls:
        ours, _ = logits_of(model, plans, 13, True)
    assert calls["mm.dtype"] > 0
    assert ours.keys() == plain.keys()
    at = list(truth)
    exact, rounded, found = (torch.stack([x[i][:-1].double() for i in at]) for x in (truth, plain, ours))
    assert ours[at[0]].dtype == torch.float32
    assert (found - exact).norm() < 1.2 * (rounded - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("numbers", np.random.default_rng(0).integers(1, 700, (40, 3)).tolist())
def test_a_size_holds_what_it_must_and_little_more(numbers):
    size = Size.around(*numbers, most_rows=700)
    for found, wanted, waste in zip((size.rows, size.width, size.masks), numbers, (2, 1.5, 1.5), strict=True):
        assert wanted <= found < waste * wanted + 1 or found <= 8
    assert Size.around(size.rows, size.width, size.masks, 700) == size
