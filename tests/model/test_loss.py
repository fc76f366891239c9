"""The chunked loss: equal to the plain one, and bounded in memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esolm_megatron.model.loss import predicted_losses

OPTIONS = {"first_id": 0, "num_ids": 46, "over_ranks": lambda x, how: x}


def random_inputs(dtype, places=23, ids=47, width=11, bias=True):
    generator = torch.Generator().manual_seed(1)
    shapes = [(places, width), (ids, width), *([(ids,)] if bias else [])]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    return tensors + [None] * (not bias), torch.randint(0, ids - 1, (places,), generator=generator)


def plain_losses(x, weight, bias, targets):
    logits = F.linear(x, weight, bias)
    return F.cross_entropy(logits.index_fill(1, torch.tensor([46]), float("-inf")), targets, reduction="none")


@pytest.mark.parametrize(("chunk", "kept"), [(10**6, 1), (10**6, 0), (47 * 5, 2), (47 * 5, 9), (47, 0), (1, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_losses_and_gradients_are_those_of_all_logits(chunk, kept, bias):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        inputs, targets = random_inputs(dtype, bias=bias)
        ours = predicted_losses(*inputs, targets, chunk=chunk, kept=kept, **OPTIONS)
        truth = plain_losses(*inputs, targets)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)
        grad, given = torch.linspace(-1, 2, 23, dtype=dtype), [x for x in inputs if x is not None]
        theirs = torch.autograd.grad(truth, given, grad)
        for _ in range(2):  # a backward pass leaves what it used as it was
            for a, b in zip(torch.autograd.grad(ours, given, grad, retain_graph=True), theirs, strict=True):
                assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("chunk", [10**6, 47 * 5])
def test_bf16_makes_fp32_losses(chunk):
    inputs, targets = random_inputs(torch.bfloat16)
    ours = predicted_losses(*inputs, targets, chunk=chunk, kept=1, **OPTIONS)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    truth = plain_losses(*wide, targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(truth.sum(), wide), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).norm() < 1e-2 * b.norm()


class Allocations(TorchDispatchMode):
    """The largest tensor that any operator gives, in elements."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if torch.is_tensor(x)]
        self.largest = max([self.largest, *sizes])
        return out


def test_memory_does_not_grow_with_places_times_vocabulary():
    """4 and 16 times the chunk: no tensor is larger than a chunk, and no more chunks than said are kept."""
    for places, ids in ((256, 1024), (1024, 1024), (512, 2048)):
        inputs, targets = random_inputs(torch.float32, places, ids, width=16)
        with Allocations() as seen:
            losses = predicted_losses(
                *inputs, targets, first_id=0, num_ids=ids - 1, over_ranks=lambda x, how: x, chunk=2**16, kept=2
            )
            assert [x.numel() for x in losses.grad_fn.exps] == [2**16, 2**16]
            losses.sum().backward()
        assert seen.largest == 2**16
    inputs, targets = random_inputs(torch.float32, 256, 1024, width=16)
    with Allocations() as seen:
        plain_losses(*inputs, targets)
    assert seen.largest == 4 * 2**16, "and the plain loss makes all logits"


def test_the_network_uses_it():
    """A head of 512 places and 200,000 ids makes 10^8 logits, and no tensor of more than a third of that."""
    from parity import random_model

    model = random_model(torch.float32, num_layers=1, hidden_size=4, num_heads=1, vocab_size=200_000, seq_length=512)
    from esolm_megatron.model.attention import PackedAttention, PackedLayout

    tokens = torch.arange(512)
    with Allocations() as seen:
        model(tokens, tokens, PackedAttention(PackedLayout(512, 1)), targets=tokens).sum().backward()
    assert 2**24 < seen.largest <= 2**25
