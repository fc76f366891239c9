"""Operators that are others on a GPU: every direct call of one, and what each library asks of its arguments.

Attention kernels compute softmax attention with its log-sum-exp, and gradients from an output and a log-sum-exp that may cover
more keys than the call is given (the identity that ring attention uses). Arguments follow torch's own derivative formulas
(torchgen/packaged/autograd/derivatives.yaml): what a dense call leaves undefined in forward is `None` in backward.

Shapes: q, out, grad (B, N, Q, D); k, v (B, G, K, D), G divides N; log-sum-exp (B, N, Q), natural, fp32 (fp64 for fp64).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

aten = torch.ops.aten
LOW = (torch.bfloat16, torch.float16)
Gradients = tuple[Tensor, Tensor, Tensor]


GPU_DEVICES = {"cuda"}
"""Types of device whose operators are CUDA's; tests add the CPU, with a stand-in of the operators."""


def on_gpu(x: Tensor) -> bool:
    """Whether operators on x are those of CUDA: where they differ from a CPU's, this decides, and nothing else does."""
    return x.device.type in GPU_DEVICES


def wide_product(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix in fp32 or better: bf16 factors are multiplied into fp32."""
    if x.dtype not in LOW:
        return x @ matrix
    if on_gpu(x):
        return torch.mm(x, matrix, out_dtype=torch.float32)
    return x.float() @ matrix.float()


def cached_attention(like: Tensor) -> Callable[..., Tensor] | None:
    """Attention over a cache of this type whose rows' lengths are data: see model/attention_triton.py. None: dense."""
    if not on_gpu(like) or like.dtype == torch.float64:
        return None
    try:
        from esolm_megatron.model.attention_triton import attend
    except ImportError:  # torch for GPUs brings Triton on Linux
        return None
    return attend


class PassKernels(NamedTuple):
    """See model/sampling_triton.py, where they have these names."""

    rotated: Callable[..., tuple[Tensor, Tensor, Tensor]]
    store: Callable[..., None]
    added: Callable[..., tuple[Tensor, Tensor]]


def sampling_kernels(like: Tensor) -> PassKernels | None:
    """Small work of a pass without gradients, in few launches: model/sampling_triton.py. None: torch."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not on_gpu(like) or like.dtype == torch.float64:
        return None
    try:
        from esolm_megatron.model.sampling_triton import added, rotated, store
    except ImportError:
        return None
    return PassKernels(rotated, store, added)


def int8_rows(x: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """A product of few rows with a matrix of 8 bits and its scales, for rows like x; None: widen the matrix."""
    if on_gpu(x) and x.dtype != torch.float64:
        try:
            from esolm_megatron.model.int8_triton import few_rows
        except ImportError:
            return None
        return few_rows
    packed = not on_gpu(x) and x.dtype == torch.bfloat16 and len(x) <= 4 and x.shape[1] % 16 == 0
    return aten._weight_int8pack_mm if packed else None


class Chunk(NamedTuple):
    """Some rows of logits, between the products of the loss.

    logits (m, V') fp32 or fp64, which may be overwritten; bias (V',), not yet added; from `num_ids` on nothing is predicted;
    local (m,) int64, the target's place in the row.
    """

    logits: Tensor
    bias: Tensor | None
    num_ids: int
    local: Tensor


def add_product(out: Tensor, x: Tensor, matrix: Tensor) -> None:
    """out += x @ matrix, in the product itself; `out` as `wide_product` makes it."""
    if x.dtype not in LOW:
        out.addmm_(x, matrix)
    elif on_gpu(x):
        torch.addmm(out, x, matrix, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(x.float(), matrix.float())


@dataclass(frozen=True)
class Runs:
    """Runs of queries, each with its own run of keys, laid end to end.

    query_sizes, key_sizes: tokens in each, on the host. query_ends, key_ends: (runs + 1,) int32, their running sums from 0.
    """

    query_sizes: tuple[int, ...]
    key_sizes: tuple[int, ...]
    query_ends: Tensor
    key_ends: Tensor

    @classmethod
    def of(cls, query_sizes: NDArray[np.int64], key_sizes: NDArray[np.int64]) -> Runs:
        """Runs of these sizes, none of which may be 0."""
        ends = [torch.from_numpy(np.cumsum([0, *x]).astype(np.int32)) for x in (query_sizes, key_sizes)]
        return cls(tuple(query_sizes.tolist()), tuple(key_sizes.tolist()), *ends)

    def split(self, queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """For each run, its piece of each tensor along dimension 2."""
        pieces = [x.split(self.query_sizes, 2) for x in queries] + [x.split(self.key_sizes, 2) for x in keys]
        return zip(*pieces, strict=True)

    @property
    def cuts(self) -> tuple[Tensor, Tensor, int, int]:
        """What CUDA's operators want to know of runs."""
        return self.query_ends, self.key_ends, max(self.query_sizes), max(self.key_sizes)


class Mode(NamedTuple):
    """How a call attends: causal only with as many queries as keys. With runs (B = 1), which only `ragged` kernels see,
    all of this holds inside each run.
    """

    causal: bool
    scale: float
    runs: Runs | None = None


class Kernel(Protocol):
    """One library's attention.

    name: for logs. shared_heads: it takes fewer heads of keys than of queries. ragged: it takes all runs in one call.
    """

    name: str
    shared_heads: bool
    ragged: bool

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp. runs: only where `ragged`, with B = 1."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mode: Mode
    ) -> Gradients:
        """Gradients of q, k and v; `out` and `grad` are laid out alike."""


class CpuFlash:
    """torch's flash attention for CPUs."""

    name, shared_heads, ragged = "torch's flash attention for CPUs", False, False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
        """One operator."""
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, mode.causal, scale=mode.scale)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mode: Mode
    ) -> Gradients:
        """One operator."""
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse.contiguous(), 0.0, mode.causal, scale=mode.scale
        )


class Dense:
    """Plain arithmetic with all scores in memory: for what no kernel of a GPU takes."""

    name, shared_heads, ragged = "dense attention", False, False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
        """In fp32 or better."""
        scores = self._scores(q, k, mode)
        lse = scores.logsumexp(-1)
        return (torch.exp(scores - lse[..., None]) @ v.to(scores.dtype)).to(q.dtype), lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mode: Mode
    ) -> Gradients:
        """In fp32 or better."""
        weights = torch.exp(self._scores(q, k, mode) - lse[..., None])
        wide = weights.dtype
        grad, out = grad.to(wide), out.to(wide)
        d_scores = weights * (grad @ v.mT.to(wide) - (grad * out).sum(-1, keepdim=True)) * mode.scale
        found = d_scores @ k.to(wide), d_scores.mT @ q.to(wide), weights.mT @ grad
        return found[0].to(q.dtype), found[1].to(k.dtype), found[2].to(v.dtype)

    @staticmethod
    def _scores(q: Tensor, k: Tensor, mode: Mode) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = (q.to(wide) @ k.mT.to(wide)) * mode.scale
        if mode.causal:
            above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(above, float("-inf"))
        return scores


class TorchFlash:
    """torch's flash attention for GPUs, or what `activate_flash_attention_impl` put in its place; bf16 and fp16."""

    ragged = True

    def __init__(self, *, shared_heads: bool = True, name: str = "torch's flash attention"):
        self.shared_heads = shared_heads
        self.name = name + ("" if shared_heads else ", heads of keys repeated")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
        """The padded operator, or the one for runs, which wants (tokens, heads, D)."""
        if mode.runs is None:
            return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, mode.causal, scale=mode.scale)[:2]
        rows = [x.squeeze(0).transpose(0, 1) for x in (q, k, v)]
        out, lse = aten._flash_attention_forward(*rows, *mode.runs.cuts, 0.0, mode.causal, False, scale=mode.scale)[:2]
        return out.transpose(0, 1).unsqueeze(0), lse.unsqueeze(0)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mode: Mode
    ) -> Gradients:
        """A defined length says that the call is for runs; so a padded one gives none."""
        # dropout's generator state and a place holder, unread without dropout
        state, unused = (torch.empty(shape, dtype=torch.uint64, device=q.device) for shape in ((2,), ()))
        if mode.runs is None:
            return aten._scaled_dot_product_flash_attention_backward(
                grad, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, mode.causal, state, unused,
                scale=mode.scale,
            )  # fmt: skip
        rows = [x.squeeze(0).transpose(0, 1) for x in (grad, q, k, v, out)]
        found = aten._flash_attention_backward(
            *rows, lse.squeeze(0).contiguous(), *mode.runs.cuts, 0.0, mode.causal, state, unused, scale=mode.scale
        )
        dq, dk, dv = (x.transpose(0, 1).unsqueeze(0) for x in found)
        return dq, dk, dv


class Cudnn:
    """cuDNN's attention: a plan for each new shape, tens of ms, so for shapes that stay; bf16 and fp16."""

    name, shared_heads, ragged = "cuDNN attention", True, False
    _dimensions = 4
    """Of the operator's log-sum-exp: (B, N, Q, 1) up to torch 2.11 at least, (B, N, Q) in later sources."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
        """One operator."""
        out, lse = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, mode.causal, False, scale=mode.scale
        )[:2]
        self._dimensions = lse.dim()
        return out, lse.view(lse.shape[:3])

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mode: Mode
    ) -> Gradients:
        """The log-sum-exp goes back in the shape that forward gave it."""
        state = torch.empty((), dtype=torch.int64, device=q.device)  # dropout's, unread
        lse = lse.contiguous()
        lse = lse.unsqueeze(-1) if self._dimensions == 4 else lse
        return aten._scaled_dot_product_cudnn_attention_backward(
            grad,
            q,
            k,
            v,
            out,
            lse,
            state,
            state,
            None,
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            mode.causal,
            scale=mode.scale,
        )


class FlashPackage:
    """The package flash-attn 2, from 2.7 on, by the functions under its autograd; bf16 and fp16."""

    name, shared_heads, ragged = "flash-attn 2", True, True

    def __init__(self, interface: Any):
        """interface: the module flash_attn.flash_attn_interface."""
        self._interface = interface

    @staticmethod
    def _options(mode: Mode) -> dict[str, Any]:
        cuts = {} if mode.runs is None else dict(zip(_CUTS, mode.runs.cuts, strict=True))
        return cuts | {
            "dropout_p": 0.0, "softmax_scale": mode.scale, "causal": mode.causal, "window_size_left": -1,
            "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None,
        }  # fmt: skip

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
        """It wants (B, tokens, heads, D), or for runs (tokens, heads, D)."""
        rows = [_rows(x, mode) for x in (q, k, v)]
        call = self._interface._flash_attn_forward if mode.runs is None else self._interface._flash_attn_varlen_forward
        out, lse = call(*rows, **self._options(mode), return_softmax=False)[:2]
        return (out.transpose(1, 2), lse) if mode.runs is None else (out.transpose(0, 1)[None], lse[None])

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mode: Mode
    ) -> Gradients:
        """Gradients are written where they are told."""
        given = [_rows(x, mode) for x in (grad, q, k, v, out)]
        found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in given[1:4]]
        whole = mode.runs is None
        call = self._interface._flash_attn_backward if whole else self._interface._flash_attn_varlen_backward
        sums = (lse if whole else lse.squeeze(0)).contiguous()
        call(*given, sums, *found, **self._options(mode), deterministic=False)
        dq, dk, dv = (x.transpose(1, 2) if whole else x.transpose(0, 1)[None] for x in found)
        return dq, dk, dv


_CUTS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


def _rows(x: Tensor, mode: Mode) -> Tensor:
    return x.transpose(1, 2) if mode.runs is None else x.squeeze(0).transpose(0, 1)


@dataclass(frozen=True)
class Call:
    """The shape of a call without runs: (rows, heads, queries, D) attend to (rows, key heads, keys, D)."""

    rows: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    head_dim: int
    causal: bool

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.key_heads else f"{self.heads}/{self.key_heads}"
        lengths = f"{self.queries}" if self.queries == self.keys else f"{self.queries}/{self.keys}"
        return f"{self.rows} x {heads} x {lengths} x {self.head_dim}{' causal' if self.causal else ''}"


@dataclass(frozen=True)
class Chosen:
    """Which kernels this process uses on a GPU; see model/flash.py.

    default: takes runs, and any shape. by_call: faster ones for calls without runs.
    """

    default: Kernel
    by_call: Mapping[Call, Kernel] = field(default_factory=dict)


CHOSEN = Chosen(TorchFlash())
CHOSEN_ON_CPU = CpuFlash()
_DENSE = Dense()


def kernel_for(q: Tensor, k: Tensor, causal: bool, runs: Runs | None) -> Kernel:
    """The kernel of a call: on a GPU the chosen one, where it takes this type and head size."""
    if not on_gpu(q):
        return CHOSEN_ON_CPU
    if q.dtype not in LOW or q.shape[-1] % 8 or q.shape[-1] > 256:
        return _DENSE
    if runs is not None or not CHOSEN.by_call:
        return CHOSEN.default
    call = Call(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], causal)
    return CHOSEN.by_call.get(call, CHOSEN.default)


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, runs: Runs | None = None
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp; causal only with Q = K. runs: what is said for Q and K holds inside each, with B = 1."""
    kernel = kernel_for(q, k, causal, runs)
    if not kernel.shared_heads:
        k, v = for_queries(k, q), for_queries(v, q)
    if runs is None or kernel.ragged:
        return kernel.forward(q, k, v, Mode(causal, scale, runs))
    pieces = [kernel.forward(a, b, c, Mode(causal, scale)) for a, b, c in runs.split([q], [k, v])]
    out, lse = (torch.cat(x, 2) for x in zip(*pieces, strict=True))
    return out, lse


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    runs: Runs | None = None,
) -> Gradients:
    """Gradients of q, k and v through the keys given here, where `out` and `lse` may come from more keys than these.

    `out` and `grad` must be laid out alike: cuDNN's gradients are wrong in silence where they are not.
    """
    if not same_layout(grad, out):
        raise AssertionError(f"an output of strides {out.stride()} has a gradient of strides {grad.stride()}")
    kernel = kernel_for(q, k, causal, runs)
    few = k
    if not kernel.shared_heads:
        k, v = for_queries(k, q), for_queries(v, q)
    if runs is None or kernel.ragged:
        dq, dk, dv = kernel.backward(grad, q, k, v, out, lse, Mode(causal, scale, runs))
    else:
        pieces = [
            kernel.backward(g, a, b, c, o, s, Mode(causal, scale))
            for g, a, o, s, b, c in runs.split([grad, q, out, lse], [k, v])
        ]
        dq, dk, dv = (torch.cat(x, 2) for x in zip(*pieces, strict=True))
    return dq, for_keys(dk, few), for_keys(dv, few)


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lie alike in memory."""
    return a.shape == b.shape and all(s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True) if n > 1)


def laid_out_as(a: Tensor, b: Tensor) -> Tensor:
    """`a`, copied only if its strides are not those of `b`, which has its shape and no gaps.

    All of them: by those of dimensions of one place, too, torch decides how what is indexed out of a tensor lies.
    """
    return a if a.stride() == b.stride() else torch.empty_like(b, dtype=a.dtype).copy_(a)


def for_queries(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values (B, G, K, D) once for each of the queries' heads."""
    times = q.shape[1] // x.shape[1]
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def for_keys(gradient: Tensor, k: Tensor) -> Tensor:
    """A gradient (B, N, K, D) of each query head, summed over those that share a key."""
    return gradient if gradient.shape[1] == k.shape[1] else gradient.unflatten(1, (k.shape[1], -1)).sum(2)
