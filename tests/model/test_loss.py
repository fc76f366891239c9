"""The chunked loss: equal to the plain one, and bounded in memory."""

import pytest
import torch
import torch.nn.functional as F
from cuda_rules import cuda_operators
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esolm_megatron.model import loss
from esolm_megatron.model.kernels import Chunk
from esolm_megatron.model.loss import predicted_losses
from esolm_megatron.simulation.one_rank import Live

OPTIONS = {"first_id": 0, "num_ids": 46, "over_ranks": lambda x, how: x}


def random_inputs(dtype, places=23, ids=47, width=11, bias=True):
    generator = torch.Generator().manual_seed(1)
    shapes = [(places, width), (ids, width), *([(ids,)] if bias else [])]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    return tensors + [None] * (not bias), torch.randint(0, ids - 1, (places,), generator=generator)


def plain_losses(x, weight, bias, targets):
    logits = F.linear(x, weight, bias)
    return F.cross_entropy(logits.index_fill(1, torch.tensor([46]), float("-inf")), targets, reduction="none")


CHUNKS = [10**6, 47 * 5, 47, 1]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_losses_and_gradients_are_those_of_all_logits(chunk, bias, known):
    """known: what each loss counts is said beforehand, and gradients are made in forward, up to a factor."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        inputs, targets = random_inputs(dtype, bias=bias)
        grad, given = torch.linspace(-1, 2, 23, dtype=dtype), [x for x in inputs if x is not None]
        ours = predicted_losses(*inputs, targets, grad / 3 if known else None, chunk=chunk, **OPTIONS)
        truth = plain_losses(*inputs, targets)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)
        theirs = torch.autograd.grad(truth, given, grad)
        for _ in range(2):  # a backward pass leaves what it used as it was
            for a, b in zip(torch.autograd.grad(ours, given, grad, retain_graph=True), theirs, strict=True):
                assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_a_loss_that_counts_otherwise_than_was_said_is_refused():
    inputs, targets = random_inputs(torch.float32)
    counts = torch.linspace(0.5, 2, 23)
    losses = predicted_losses(*inputs, targets, counts, **OPTIONS)
    with pytest.raises(RuntimeError, match="no multiple of sum"):
        losses.sum().backward()
    predicted_losses(*inputs, targets, counts, **OPTIONS).mul(7 * counts).sum().backward()
    low, targets = random_inputs(torch.bfloat16)
    once, often = (
        torch.autograd.grad(predicted_losses(*low, targets, counts, **OPTIONS), low, times * counts)
        for times in (1, 257)
    )
    for a, b in zip(once, often, strict=True):  # 16 bits cannot hold this factor
        assert (b == (257 * a.float()).bfloat16()).float().mean() > 0.98
    for bad in (float("nan"), float("inf")):  # passed on, for whoever judges steps
        found = torch.autograd.grad(predicted_losses(*inputs, targets, counts, **OPTIONS), inputs, bad * counts)
        assert not any(x.isfinite().all() for x in found)
    nothing = predicted_losses(inputs[0][:0], *inputs[1:], targets[:0], counts[:0], **OPTIONS)
    assert all(not x.any() for x in torch.autograd.grad(nothing.sum(), inputs))


class Products(TorchDispatchMode):
    """How often matrices are multiplied, and how often an operator reads or writes all logits of a chunk."""

    def __init__(self, width):
        super().__init__()
        self.width, self.products, self.passes = width, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, out)) if torch.is_tensor(x) and x.dim() == 2 and len(x) == 5]
        views = ("slice", "view", "t", "alias", "detach", "transpose")
        if name in ("mm", "addmm", "addmm_", "linear"):
            self.products += 1
        elif any(x.shape[1] == self.width for x in tensors) and name not in views:
            self.passes += 1
        return out


@pytest.mark.parametrize(("known", "products", "passes"), [(True, 3, 9), (False, 4, 15)])
def test_no_logit_is_made_twice_where_counts_are_known(known, products, passes):
    """Four chunks of five rows: their logits, and two products with the gradient; for no chunk anything else."""
    inputs, targets = random_inputs(torch.float32, places=20)
    counts = torch.ones(20)
    with Products(47) as seen:
        predicted_losses(*inputs, targets, counts if known else None, chunk=47 * 5, **OPTIONS).sum().backward()
    assert seen.products == 4 * products
    assert seen.passes <= 4 * passes


@pytest.mark.parametrize("chunk", [10**6, 47 * 5])
@pytest.mark.parametrize("known", [True, False])
def test_bf16_makes_fp32_losses(chunk, known):
    inputs, targets = random_inputs(torch.bfloat16)
    ours = predicted_losses(*inputs, targets, torch.ones(23) if known else None, chunk=chunk, **OPTIONS)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    truth = plain_losses(*wide, targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(truth.sum(), wide), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).norm() < 1e-2 * b.norm()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_ids", [46, 5, 0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tritons_passes_are_the_plain_ones(monkeypatch, bias, num_ids, dtype):
    """Interpreted on a CPU: several blocks of a row, a slice of the vocabulary that is padding for the most part or whole."""
    pytest.importorskip("triton")
    from esolm_megatron.model import loss_triton

    monkeypatch.setattr(loss_triton, "BLOCK", 16)
    generator = torch.Generator().manual_seed(3)
    logits, scale, minus = (torch.randn(s, generator=generator) for s in ((6, 47), (6,), (6,)))
    vector = torch.randn(47, generator=generator).to(dtype) if bias else None
    local = torch.tensor([0, 4, 3, 45, 46, 16])
    found = {}
    for name, work in (("plain", loss._Plain()), ("triton", loss_triton.Fused())):
        given = logits.clone()
        top, total, hit = work.top_and_sum(Chunk(given, vector, num_ids, local))
        shown = torch.where(local < num_ids, hit, 0)  # of others nobody asks
        gradient = work.gradient(Chunk(given, vector, num_ids, local), top, scale, minus * (local < num_ids), dtype)
        found[name] = (top, total, shown, gradient)
    for a, b in zip(found["plain"], found["triton"], strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-2 if b.dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert not found["triton"][3][:, num_ids:].any()


def test_the_loss_of_a_gpu_uses_them():
    """CUDA's branch on a CPU: three products of 16 bits, two kernels a chunk, the gradient added up by the product."""
    pytest.importorskip("triton")
    inputs, targets = random_inputs(torch.bfloat16)
    counts = torch.linspace(0.5, 2, 23)
    truth = predicted_losses(*inputs, targets, counts, chunk=47 * 5, **OPTIONS)
    theirs = torch.autograd.grad(truth, inputs, counts)
    with cuda_operators() as calls:
        assert type(loss.elementwise(torch.empty(1))).__name__ == "Fused"
        ours = predicted_losses(*inputs, targets, counts, chunk=47 * 5, **OPTIONS)
        found = torch.autograd.grad(ours, inputs, counts)
    assert calls == {"mm.dtype": 6, "addmm.dtype_out": 4}  # five chunks' logits and the first one's weight gradient
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)
    for a, b in zip(found, theirs, strict=True):
        assert (a - b).float().norm() < 5e-3 * b.float().norm()


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


@pytest.mark.parametrize("known", [True, False])
def test_memory_does_not_grow_with_places_times_vocabulary(known):
    """4 and 16 times the chunk: no tensor is larger than a chunk."""
    for places, ids in ((256, 1024), (1024, 1024), (512, 2048)):
        inputs, targets = random_inputs(torch.float32, places, ids, width=16)
        options = {"first_id": 0, "num_ids": ids - 1, "over_ranks": lambda x, how: x, "chunk": 2**16}
        with Allocations() as seen:
            predicted_losses(*inputs, targets, torch.ones(places) if known else None, **options).sum().backward()
        assert seen.largest == 2**16
    inputs, targets = random_inputs(torch.float32, 256, 1024, width=16)
    with Allocations() as seen:
        plain_losses(*inputs, targets)
    assert seen.largest == 4 * 2**16, "and the plain loss makes all logits"


def test_no_two_chunks_and_no_two_wide_copies_are_there_at_once(monkeypatch):
    """Bytes at most on a GPU: a chunk in fp32 and its gradient in bf16; the head's gradient once in fp32, between two in bf16."""
    monkeypatch.setattr(loss, "WANTED", "torch")
    peaks = []
    for width in (16, 1024):  # the chunks of the one outweigh the head's gradient, as that of the other does the chunks
        (x, weight, _), targets = random_inputs(torch.bfloat16, 256, 1024, width, bias=False)
        with cuda_operators(), Live() as live:
            made = predicted_losses(
                x, weight, None, targets, torch.ones(256), **OPTIONS | {"num_ids": 1023}, chunk=2**16
            )
            forward, live.peak = live.peak, live.bytes
            made.sum().backward()
        peaks.append((forward, live.peak, 1024 * width, 256 * width))
    for forward, backward, matrix, rows in peaks:
        given = 2 * matrix + 2 * rows + 40 * 256  # the inputs, and some numbers of each place
        assert forward <= max(6 * 2**16 + 4 * matrix, 6 * matrix) + 2 * rows + given
        assert backward <= 8 * matrix + 8 * rows + given
    assert peaks[0][0] > 6 * 2**16
    assert peaks[1][1] > 8 * peaks[1][2]


def test_the_network_uses_it():
    """A head of 2048 places and 200,000 ids makes 4 x 10^8 logits, and no tensor of more than a third of that."""
    from parity import random_model

    model = random_model(torch.float32, num_layers=1, hidden_size=4, num_heads=1, vocab_size=200_000, seq_length=2048)
    from esolm_megatron.model.attention import PackedAttention, PackedLayout

    tokens = torch.arange(2048)
    with Allocations() as seen:
        model(tokens, tokens, PackedAttention(PackedLayout(2048, 1)), targets=tokens).sum().backward()
    assert 2**26 < seen.largest <= 2**27
