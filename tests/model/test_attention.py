"""Two-stream attention against the dense computation that it replaces."""

import math

import numpy as np
import pytest
import torch

from esolm_megatron.model.attention import (
    DocumentRuns,
    PackedAttention,
    PackedLayout,
    causal_attention,
    mask_stream_attention,
)


def dense_mask_stream(q, k_self, v_self, k_clean, v_clean):
    """The same attention by one explicit softmax over clean keys and the own key."""
    times, capacity, length = q.shape[1] // k_self.shape[1], q.shape[2], k_clean.shape[2]
    k_self, v_self, k_clean, v_clean = (x.repeat_interleave(times, 1) for x in (k_self, v_self, k_clean, v_clean))
    place = torch.arange(length - capacity, length)[:, None]
    hidden = torch.arange(length)[None] >= place
    scale = 1 / math.sqrt(q.shape[-1])
    scores = (q @ k_clean.mT * scale).masked_fill(hidden, float("-inf"))
    own = (q * k_self).sum(-1, keepdim=True) * scale
    weights = torch.cat([scores, own], -1).softmax(-1)
    return weights[..., :-1] @ v_clean + weights[..., -1:] * v_self


def random_inputs(capacity, length, dtype, heads=6, kv_heads=3, rows=2, dim=10):
    generator = torch.Generator().manual_seed(1)
    shapes = [(rows, heads, capacity, dim)] + [(rows, kv_heads, n, dim) for n in (capacity, capacity, length, length)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize(("capacity", "length"), [(7, 13), (13, 13), (1, 13), (12, 13), (1, 1)])
def test_mask_stream_equals_dense(capacity, length):
    inputs = random_inputs(capacity, length, torch.float64)
    ours, dense = mask_stream_attention(*inputs), dense_mask_stream(*inputs)
    torch.testing.assert_close(ours, dense, rtol=1e-12, atol=1e-13)
    grad = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(dense, inputs, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def test_mask_stream_bf16_is_close_to_fp64():
    exact = random_inputs(7, 13, torch.float64)
    rounded = [x.detach().to(torch.bfloat16).requires_grad_() for x in exact]
    ours, truth = mask_stream_attention(*rounded), dense_mask_stream(*exact)
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - truth).abs().max() < 0.05
    for mine, theirs in zip(
        torch.autograd.grad(ours.sum(), rounded), torch.autograd.grad(truth.sum(), exact), strict=True
    ):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - theirs).abs().max() < 0.1


def test_packed_attention_keeps_rows_apart():
    """Each row of a packed micro-batch gets what it would get alone, and every key's gradient stays in its row."""
    layout = PackedLayout(seq_length=11, num_plain=2, groups=((3, 5), (1, 11)))
    assert layout.num_tokens == 6 * 11 + 3 * 5 + 11
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(layout.num_tokens, n, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        for n in (6, 2, 2)
    )
    out = PackedAttention(layout)(0, q, k, v)

    def row(x, start, size):
        return x[start : start + size].transpose(0, 1)[None]

    for i in range(6):
        alone = causal_attention(*(row(x, 11 * i, 11) for x in (q, k, v)))
        torch.testing.assert_close(row(out, 11 * i, 11), alone)
    starts = [(66 + 5 * i, 5, 11 * (2 + i)) for i in range(3)] + [(81, 11, 55)]
    for start, capacity, clean in starts:
        alone = dense_mask_stream(*(row(x, start, capacity) for x in (q, k, v)), *(row(x, clean, 11) for x in (k, v)))
        torch.testing.assert_close(row(out, start, capacity), alone)
    (gk,) = torch.autograd.grad(out[66:71].sum(), k)
    touched = gk.abs().sum((1, 2)) > 0
    expected = torch.zeros(layout.num_tokens, dtype=torch.bool)
    expected[22:32], expected[66:71] = True, True
    assert torch.equal(touched, expected), "row 0 of group 0 may reach its own clean keys 0..9 and its own masks only"


def test_documents_get_what_they_would_get_alone():
    """Documents of 0, 1 and more tokens, with none, some and all of them in the mask stream, in two groups of rows."""
    plain, clean = np.array([[11, 0, 0, 0], [1, 5, 4, 1]]), [np.array([[1, 4, 6], [3, 0, 8]]), np.array([[2, 9]])]
    masks = [np.array([[1, 0, 4], [1, 0, 4]]), np.array([[2, 9]])]
    layout = PackedLayout(seq_length=11, num_plain=2, groups=((2, 5), (1, 11)))
    generator = torch.Generator().manual_seed(4)
    q, k, v = (
        torch.randn(layout.num_tokens, n, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        for n in (6, 2, 2)
    )
    out = PackedAttention(layout, DocumentRuns.of([plain, *clean], masks))(0, q, k, v)

    def piece(x, start, size):
        return x[start : start + size].transpose(0, 1)[None]

    token, alone, sizes = 0, [], np.concatenate([x.ravel() for x in (plain, *clean)])
    for size in sizes:
        if size:
            alone.append(causal_attention(*(piece(x, token, size) for x in (q, k, v))))
        token += size
    assert token == 5 * 11
    starts = np.cumsum(sizes) - sizes
    for start, size, count in zip(starts[8:], sizes[8:], np.concatenate([m.ravel() for m in masks]), strict=True):
        if count:
            alone.append(
                dense_mask_stream(
                    *(piece(x, token, count) for x in (q, k, v)), *(piece(x, start, size) for x in (k, v))
                )
            )
        token += count
    truth = torch.cat([x[0].transpose(0, 1) for x in alone])
    torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-13)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(truth, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
