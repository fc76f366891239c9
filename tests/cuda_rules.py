"""A stand-in for CUDA's operators, so that the branches that a GPU takes run on CPU tensors.

Each operator that the package calls directly is registered for CPUs under its own name and signature. It computes densely,
in fp32, and insists on what CUDA insists on: the rules stand beside the place of torch's sources where each was seen (2.11
to 2.13: aten/src/ATen/native/transformers/cuda, files flash_attn/flash_api.cpp, attention.cu, attention_backward.cu), or
on a GPU itself. What it cannot show is speed, rounding of the kernels, and rules that nobody has met yet.
"""

import math
from collections import Counter
from contextlib import contextmanager

import numpy as np
import torch

from esolm_megatron.model import kernels

LOW = (torch.bfloat16, torch.float16)


def insist(holds, rule):
    if not holds:
        raise RuntimeError(rule)


def common_rules(q, k, v, heads, *more):
    """mha_fwd, mha_bwd, mha_varlen_fwd and mha_varlen_bwd in flash_api.cpp; `heads` is the dimension that counts them."""
    for x in (q, k, v, *more):
        insist(x.dtype in LOW, "FlashAttention only support fp16 and bf16 data type")
        insist(x.dtype == q.dtype, "query and key must have the same dtype")
        insist(x.stride(-1) == 1, "Input tensor must have contiguous last dimension")
        insist(x.device == q.device, "inputs must be on the same device")
    insist(q.shape[-1] % 8 == 0, "head_size should be a multiple of 8")
    insist(q.shape[-1] <= 256, "FlashAttention only supports head dimension at most 256")
    insist(q.shape[heads] % k.shape[heads] == 0, "Number of heads in key/value must divide number of heads in query")
    insist(k.shape == v.shape, "key and value must have one shape")


def padded_rules(q, k, v, causal, *more):
    common_rules(q, k, v, 1, *more)
    insist(q.dim() == 4, "q must be (B, N, Q, D)")
    insist(q.shape[0] > 0, "batch size must be positive")  # seen on an H200 as well
    insist(q.shape[0] == k.shape[0], "one batch size")
    insist(min(q.shape[2], k.shape[2]) > 0, "no queries or no keys")
    insist(
        not causal or q.shape[2] == k.shape[2], "causal calls align to the bottom right: only squares are meant here"
    )


def state_rules(state, unused):
    """The generator's state is one uint64[2] tensor on the device, then a place holder (end of mha_varlen_fwd)."""
    insist(state.dtype == torch.uint64, "rng_state must be uint64")
    insist(state.shape == (2,), "rng_state has two words")
    insist(unused.dtype == torch.uint64, "the place holder is uint64")


def sums_rules(lse, shape):
    """Read by its address: float32, in order."""
    insist(lse.dtype == torch.float32, "logsumexp must be float32")
    insist(tuple(lse.shape) == tuple(shape), f"logsumexp must have the shape {tuple(shape)}, has {tuple(lse.shape)}")
    insist(lse.is_contiguous(), "logsumexp must be contiguous")


def attend(q, k, v, causal, scale):
    """(N, Q, D), (G, K, D) -> output (N, Q, D) and log-sum-exp (N, Q), fp32; a query that sees nothing gives 0."""
    k, v = (x.float().repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    scores = q.float() @ k.mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse[..., None]) @ v, lse


def differentiate(grad, q, k, v, out, lse, causal, scale):
    """Gradients from whatever output and log-sum-exp are given, summed over query heads that share a key."""
    times = len(q) // len(k)
    wide_k, wide_v = (x.float().repeat_interleave(times, 0) for x in (k, v))
    scores = q.float() @ wide_k.mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    p = torch.exp(scores - lse[..., None])
    d = p * (grad.float() @ wide_v.mT - (grad.float() * out.float()).sum(-1, keepdim=True)) * scale
    dk, dv = ((x.unflatten(0, (-1, times)).sum(1)) for x in (d.mT @ q.float(), p.mT @ grad.float()))
    return tuple(x.to(q.dtype) for x in (d @ wide_k, dk, dv))


def stacked(rows):
    return tuple(torch.stack(x) for x in zip(*rows, strict=True))


def as_laid_out(x, like):
    """at::empty_like(query), in all of these operators: a result lies in memory as the query does."""
    return torch.empty_like(like, dtype=x.dtype).copy_(x) if x.shape == like.shape else x


def padded(q, k, v, causal, scale):
    out, lse = stacked([attend(a, b, c, causal, scale) for a, b, c in zip(q, k, v, strict=True)])
    return as_laid_out(out.to(q.dtype), q), lse


def padded_backward(grad, q, k, v, out, lse, causal, scale):
    rows = zip(grad, q, k, v, out, lse, strict=True)
    return tuple(
        as_laid_out(a, b)
        for a, b in zip(stacked([differentiate(*r, causal, scale) for r in rows]), (q, k, v), strict=True)
    )


def flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    padded_rules(q, k, v, is_causal)
    state, unused = torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64)
    out, lse = padded(q, k, v, is_causal, scale)
    return out, lse, None, None, q.shape[2], k.shape[2], state, unused, torch.empty(0)


def flash_backward(
    grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, causal, state, unused, *, scale=None
):
    # _flash_attention_backward in attention_backward.cu: a defined length means mha_varlen_bwd, which then finds
    # "batch size must be positive" for an empty one; seen on an H200 (2026-11-26), where this refused every GPU
    insist(cum_q is None and cum_k is None, "batch size must be positive")
    padded_rules(q, k, v, causal, grad, out)
    insist((max_q, max_k) == (q.shape[2], k.shape[2]), "the longest lengths are those of q and k")
    state_rules(state, unused)
    sums_rules(lse, q.shape[:3])
    return padded_backward(grad, q, k, v, out, lse, causal, scale)


def run_rules(q, k, v, cum_q, cum_k, max_q, max_k, *more):
    """mha_varlen_fwd and mha_varlen_bwd: lengths are int32, in order, on the device, one more than runs."""
    common_rules(q, k, v, 1, *more)
    insist(q.dim() == 3, "q must be (tokens, N, D)")
    for cum, x, most in ((cum_q, q, max_q), (cum_k, k, max_k)):
        insist(cum.dtype == torch.int32, "cu_seqlens must have dtype int32")
        insist(cum.is_contiguous(), "cu_seqlens must be contiguous")
        insist(cum.device == x.device, "cu_seqlens must be on the device")
        insist(len(cum) > 1, "batch size must be positive")
        insist(int(cum[0]) == 0 and int(cum[-1]) == len(x), "runs must cover the tokens")
        insist(int(cum.diff().max()) == most, "max_seqlen is that of the longest run")
    insist(len(cum_q) == len(cum_k), "as many runs of queries as of keys")


def runs_of(cum_q, cum_k, *tensors):
    """For each run, its piece (heads, tokens, ...) of each of (tensor, is it of queries)."""
    for (a, b), (c, d) in zip(
        zip(cum_q[:-1].tolist(), cum_q[1:].tolist(), strict=True),
        zip(cum_k[:-1].tolist(), cum_k[1:].tolist(), strict=True),
        strict=True,
    ):
        yield [x[a:b].transpose(0, 1) if of_queries else x[c:d].transpose(0, 1) for x, of_queries in tensors]


def flash_runs(q, k, v, cum_q, cum_k, max_q, max_k, dropout_p, causal, return_debug_mask, *, scale=None, **options):
    run_rules(q, k, v, cum_q, cum_k, max_q, max_k)
    pieces = runs_of(cum_q, cum_k, (q, True), (k, False), (v, False))
    causal = causal and max_q > 1  # mha_varlen_fwd drops it for single queries
    outs, sums = zip(*(attend(a, b, c, causal, scale) for a, b, c in pieces), strict=True)
    out = torch.cat([x.transpose(0, 1) for x in outs]).to(q.dtype)
    state, unused = torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64)
    return as_laid_out(out, q), torch.cat(sums, 1), state, unused, torch.empty(0)


def flash_runs_backward(
    grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, causal, state, unused, *, scale=None, **options
):
    run_rules(q, k, v, cum_q, cum_k, max_q, max_k, grad, out)
    state_rules(state, unused)
    sums_rules(lse, (q.shape[1], len(q)))
    tensors = [(grad, True), (q, True), (k, False), (v, False), (out, True), (lse.transpose(0, 1), True)]
    found = [differentiate(*piece, causal, scale) for piece in runs_of(cum_q, cum_k, *tensors)]
    joined = (torch.cat([x.transpose(0, 1) for x in one]) for one in zip(*found, strict=True))
    return tuple(as_laid_out(a, b) for a, b in zip(joined, (q, k, v), strict=True))


def cudnn(q, k, v, bias, compute_log_sumexp, dropout_p=0.0, causal=False, return_debug_mask=False, *, scale=None):
    padded_rules(q, k, v, causal)
    insist(compute_log_sumexp, "without it there is no backward pass")
    insist(bias is None, "no bias here")
    out, lse = padded(q, k, v, causal, scale)
    word = torch.empty((), dtype=torch.int64)
    return out, lse[..., None], None, None, q.shape[2], k.shape[2], word, word, torch.empty(0)


def cudnn_backward(
    grad, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout_p, causal, *, scale=None
):
    padded_rules(q, k, v, causal, grad, out)
    insist(cum_q is None and cum_k is None and bias is None, "defined lengths mean nested tensors")
    # seen on an H200: gradients of q and k wrong by 30 percent, in silence
    insist(kernels.same_layout(grad, out), f"out has strides {out.stride()}, its gradient {grad.stride()}")
    sums_rules(lse, (*q.shape[:3], 1))
    return padded_backward(grad, q, k, v, out, lse[..., 0], causal, scale)


def mm_into(a, b, out_dtype):
    insist(a.dtype in LOW, "out_dtype is for bf16 and fp16 factors")
    insist(a.dtype == b.dtype, "both factors have one type")
    insist(out_dtype in (a.dtype, torch.float32), "out_dtype must be that of the factors or float32")
    return (a.float() @ b.float()).to(out_dtype)


def addmm_into(c, a, b, out_dtype, *, beta=1, alpha=1, out):
    insist(a.dtype in LOW, "out_dtype is for bf16 and fp16 factors")
    insist(a.dtype == b.dtype, "both factors have one type")
    insist(out_dtype == c.dtype == out.dtype, "what is added to has out_dtype")
    return out.copy_(beta * c + alpha * (a.float() @ b.float()))


OPERATORS = {
    "_scaled_dot_product_flash_attention": flash,
    "_scaled_dot_product_flash_attention_backward": flash_backward,
    "_flash_attention_forward": flash_runs,
    "_flash_attention_backward": flash_runs_backward,
    "_scaled_dot_product_cudnn_attention": cudnn,
    "_scaled_dot_product_cudnn_attention_backward": cudnn_backward,
    "mm.dtype": mm_into,
    "addmm.dtype_out": addmm_into,
}


@contextmanager
def rounding():
    """Triton's interpreter narrows fp32 to bf16 as a GPU does, to the nearest; by itself it cuts off (up to 3.9)."""
    try:
        from triton.language import bfloat16, float32
        from triton.runtime import interpreter
    except ImportError:
        yield
        return
    convert = interpreter._convert_float

    def nearest(x, input_dtype, output_dtype, mode):
        if (input_dtype, output_dtype) != (float32, bfloat16):
            return convert(x, input_dtype, output_dtype, mode)
        bits = np.frombuffer(x.tobytes(), np.uint32)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(bits.view(np.float32)), bits >> 16 | 1, up).astype(np.uint16).reshape(x.shape)

    interpreter._convert_float = nearest
    try:
        yield
    finally:
        interpreter._convert_float = convert


@contextmanager
def cuda_operators():
    """CPU tensors take the branches of a GPU inside; yields a Counter of the operators that ran."""
    calls = Counter()

    def counted(name, function):
        def run(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return run

    library = torch.library.Library("aten", "IMPL")
    for name, function in OPERATORS.items():
        library.impl(name, counted(name, function), "CPU")
    kernels.GPU_DEVICES.add("cpu")
    try:
        with rounding():
            yield calls
    finally:
        kernels.GPU_DEVICES.remove("cpu")
        library._destroy()


class FlashAttn:
    """A stand-in for the module flash_attn.flash_attn_interface of the package flash-attn 2.7 and 2.8, which is not here:
    names, order and defaults of its four functions as its source has them, and the rules of its kernels, which are torch's.
    """

    @staticmethod
    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, return_softmax
    ):  # fmt: skip
        plain_rules(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
        rows = [x.transpose(1, 2) for x in (q, k, v)]
        padded_rules(*rows, causal)
        out, lse = padded(*rows, causal, softmax_scale)
        return out.transpose(1, 2), lse, torch.empty(0), torch.empty(2, dtype=torch.int64)

    @staticmethod
    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None,
        leftpad_k=None, seqused_k=None,
    ):  # fmt: skip
        plain_rules(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
        cuts = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        out, lse, *_ = flash_runs(q, k, v, *cuts, 0.0, causal, False, scale=softmax_scale)
        return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)

    @staticmethod
    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        plain_rules(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
        rows = [x.transpose(1, 2) for x in (dout, q, k, v, out)]
        padded_rules(*rows[1:4], causal, rows[0], rows[4])
        sums_rules(softmax_lse, rows[1].shape[:3])
        for place, x in zip((dq, dk, dv), padded_backward(*rows, softmax_lse, causal, softmax_scale), strict=True):
            insist(place.is_contiguous(), "places of gradients are in order")
            place.copy_(x.transpose(1, 2))
        return torch.empty(0)

    @staticmethod
    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        plain_rules(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
        cuts = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        state, unused = torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64)
        found = flash_runs_backward(
            dout, q, k, v, out, softmax_lse, *cuts, 0.0, causal, state, unused, scale=softmax_scale
        )
        for place, x in zip((dq, dk, dv), found, strict=True):
            place.copy_(x)
        return torch.empty(0)


def plain_rules(dropout_p, left, right, softcap, alibi_slopes):
    """Attention without anything else."""
    insist((dropout_p, left, right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None), "plain attention is meant here")
