"""What a GPU keeps in memory, on tensors without data: its branches are taken, and its kernels are asked for shapes only.

Names stay those of CPU tensors. Operators that only CUDA has know the shapes of what they give wherever they are called; for
what is Triton's there are stand-ins that allocate what it allocates, and for what a compiler fuses, ones that keep for backward
what it would keep (tests/plan compares the sum of them with a compiler's own).
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from esolm_megatron.model import between, flash, kernels, loss, transformer


class _Loss:
    """As `loss_triton.Fused`: gradients are written beside the logits, in the narrow type."""

    @staticmethod
    def top_and_sum(chunk):
        return tuple(chunk.logits.new_empty(len(chunk.logits)) for _ in range(3))

    @staticmethod
    def gradient(chunk, top, scale, minus, dtype):
        return torch.empty(chunk.logits.shape, dtype=dtype)


class _Activated(torch.autograd.Function):
    """The activation, of which only its input is kept."""

    @staticmethod
    def forward(ctx, y, gated):
        ctx.save_for_backward(y)
        return torch.empty(*y.shape[:-1], y.shape[-1] // (2 if gated else 1), dtype=y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return torch.empty_like(ctx.saved_tensors[0]), None


class _Rotated(torch.autograd.Function):
    """Queries and keys of a product; where they are normalised it is kept, with what divides each."""

    @staticmethod
    def forward(ctx, y, sizes, *norms):
        groups, queries, width = sizes
        q, k = (y.new_empty(len(y), heads, width) for heads in (groups * queries, groups))
        ctx.shape = y.shape
        ctx.save_for_backward(
            *norms, *((y, *(x.new_empty(x.shape[:2], dtype=torch.float32) for x in (q, k))) if norms else ())
        )
        return q, k

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        return grads[0].new_empty(ctx.shape), None, *(torch.empty_like(x) for x in ctx.saved_tensors[:2])


def _heads(y, rope, norms, sizes, eps):
    groups, queries, width = sizes
    return *_Rotated.apply(y, sizes, *(norms or ())), y.view(len(y), groups, queries + 2, width)[:, :, -1]


class _Dropped(torch.autograd.Function):
    """Dropout, of which nothing is kept that is not kept anyway."""

    @staticmethod
    def forward(ctx, x):
        return torch.empty_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return torch.empty_like(grad)


class _RmsNorm(torch.autograd.Function):
    """As CUDA's fused one: its input and a number for each vector are kept."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def take_a_gpus_branches(compiled: bool) -> None:
    """For good: of this process, which does nothing else. compiled: keep what a compiler keeps."""
    kernels.GPU_DEVICES.add("cpu")
    instead = [
        (flash, "error_of", lambda kernel, device: 0.0),  # nothing is computed here that could be wrong, or slow
        (flash, "time_calls", lambda calls, dtype, device: None),
        (flash, "use", lambda times, calls, wanted: []),
        (loss, "elementwise", lambda logits: _Loss()),
        (F, "rms_norm", lambda x, shape, weight, eps: _RmsNorm.apply(x, weight)),
        (transformer, "compiled", lambda **options: between.EAGER),
        (torch, "compile", lambda function, **options: function),
    ]
    if compiled:
        instead.append((between, "hashed_dropout", lambda x, ids, salt, p: _Dropped.apply(x)))
    for module, name, function in instead:
        setattr(module, name, function)
    if compiled:
        for name, function in {"heads": _heads, "activate": _Activated.apply, "drop": between.hashed_dropout}.items():
            object.__setattr__(between.EAGER, name, function)


def as_on_a_gpu(*, frees_outputs: bool) -> None:
    """Libraries get the settings that they have there, where an engine on CPUs has others; it must not be loaded before
    collectives are noted. frees_outputs: `parallel.deallocate_pipeline_outputs`, which gloo does not bear.
    """
    from esolm_megatron.parallel import engine, zero

    megatron, deepspeed = engine.megatron_config, zero.deepspeed_config

    def frees(*args):
        made = megatron(*args)
        made.deallocate_pipeline_outputs = frees_outputs
        return made

    def overlaps(config):
        settings = deepspeed(config)
        settings["zero_optimization"]["overlap_comm"] = config.parallel.zero_stage >= 2
        return settings

    engine.megatron_config, zero.deepspeed_config = frees, overlaps
    # which a fake broadcast would not keep
    zero.deepspeed.runtime.zero.utils.get_lst_from_rank0 = lambda numbers: numbers
