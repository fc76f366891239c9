"""Weight gradients that products add up in fp32 themselves, over micro-batches: the `main_grad` of a weight.

DeepSpeed's bf16 optimizer (ZeRO 0 and 1) keeps an fp32 gradient of each parameter and adds to it what backward leaves in
bf16. Here the product that makes a matrix's gradient adds into that tensor at once: nothing is rounded to bf16, and no
gradient is written and read once more. Embeddings, vectors and the head go DeepSpeed's way; so does all of ZeRO 2 and 3,
which cut gradients as they come, of offloaded optimizers, and what is multiplied in fp8.

NVIDIA Apex's kernel does it where Apex is installed, torch's product elsewhere; megatron-core's layers call either one.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from megatron.core.tensor_parallel import layers as megatron_layers
from torch import Tensor, nn

from esolm_megatron.config import ConfigError
from esolm_megatron.model.flash import KernelError, difference, milliseconds
from esolm_megatron.model.kernels import add_product
from esolm_megatron.model.layers import PlainLinear, PlainLinears
from esolm_megatron.parallel.float8 import Product
from esolm_megatron.parallel.groups import from_first_rank

MOST_ERROR = 1e-3
"""Relative, of sums in fp32 of products of bf16, which the order of adding up changes by 1e-6."""


class _TorchProduct:
    """What megatron-core calls of Apex's extension, by torch."""

    @staticmethod
    def wgrad_gemm_accum_fp32(x: Tensor, grad: Tensor, main_grad: Tensor) -> None:
        """main_grad (out, in) fp32 += grad (T, out)^T @ x (T, in), both bf16."""
        add_product(main_grad, grad.t(), x)


_APEX = getattr(megatron_layers, "fused_weight_gradient_mlp_cuda", None)
megatron_layers.fused_weight_gradient_mlp_cuda = _APEX or _TorchProduct


def choose(wanted: str, device: torch.device, width: int) -> str:
    """Choose the product: torch's, or Apex's where it is installed, right, and not slower; returns which, for logs.

    wanted: auto, torch or apex. width: of the matrices that decide, (4 width, width).

    Raises:
        ConfigError: Apex is wanted and not installed. KernelError: or gives something else.
    """
    if wanted == "apex" and _APEX is None:
        raise ConfigError(
            "train.kernels.gradients = apex: megatron-core finds no fused_weight_gradient_mlp_cuda; build NVIDIA Apex with "
            "its CUDA extensions, or set auto"
        )
    chosen, why = _TorchProduct, "NVIDIA Apex is not installed" if _APEX is None else "it was asked for"
    if _APEX is not None and wanted != "torch":
        generator = torch.Generator().manual_seed(0)
        x, grad = (torch.randn(2048, n, generator=generator).to(device, torch.bfloat16) for n in (width, 4 * width))
        start = torch.ones(4 * width, width, device=device)
        made, times = [], []
        for product in (_TorchProduct, _APEX):
            made.append(start.clone())
            product.wgrad_gemm_accum_fp32(x, grad, made[-1])
            times.append(milliseconds(partial(product.wgrad_gemm_accum_fp32, x, grad, start.clone()), device))
        error, (torch_ms, apex_ms) = difference(made[1:], made[:1]), from_first_rank(times, device)
        why = f"relative error {error:.2g}, torch {torch_ms:.3g} ms, NVIDIA Apex {apex_ms:.3g} ms"
        if wanted == "apex" and error > MOST_ERROR:
            raise KernelError(f"train.kernels.gradients = apex: {why}; set auto")
        if error <= MOST_ERROR and (wanted == "apex" or apex_ms <= torch_ms):
            chosen = _APEX
    megatron_layers.fused_weight_gradient_mlp_cuda = chosen
    return f"added up in fp32 by {'NVIDIA Apex' if chosen is _APEX else 'torch'}'s products ({why})"


# An operator, for a compiler looks into functions. Its schema does not say that main_grad changes: nothing else in a graph
# reads it, and a declared change would raise its version, which forbids what pipelines do: the backward of one micro-batch
# between the forward and backward of another, which has saved it.
_library = torch.library.Library("esolm", "DEF")
_library.define("linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor main_grad) -> Tensor")


@torch.library.impl(_library, "linear_backward", "CompositeExplicitAutograd")
def _linear_backward(grad: Tensor, x: Tensor, weight: Tensor, main_grad: Tensor) -> Tensor:
    rows = grad.flatten(0, -2)
    with torch.autograd._unsafe_preserve_version_counter(main_grad):
        megatron_layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(x.flatten(0, -2), rows, main_grad)
    return (rows @ weight).view(x.shape)


@torch.library.register_fake("esolm::linear_backward")
def _shaped_like_x(grad: Tensor, x: Tensor, weight: Tensor, main_grad: Tensor) -> Tensor:
    return x.new_empty(x.shape)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, main_grad: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, main_grad)
        ctx.has_bias = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bias = grad.flatten(0, -2).sum(0) if ctx.has_bias else None
        return torch.ops.esolm.linear_backward(grad, *ctx.saved_tensors), None, bias, None


class AccumulatingLinear(PlainLinear):
    """nn.Linear whose weight's gradient goes into `weight.main_grad`, once it has one; or which multiplies in fp8."""

    fp8: Product | None = None

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        main_grad = getattr(self.weight, "main_grad", None)
        if self.fp8 is not None and torch.is_grad_enabled():
            return self.fp8(input, self.weight, self.bias)
        if main_grad is None or not torch.is_grad_enabled():
            return super().forward(input)
        return _Product.apply(input, self.weight, self.bias, main_grad)


class AccumulatingLinears(PlainLinears):
    """Linears of one tensor rank, which a compiler can look into."""

    linear = AccumulatingLinear


def fp32_gradients(optimizer: BF16_Optimizer) -> dict[nn.Parameter, Tensor]:
    """What DeepSpeed's bf16 optimizer adds gradients up in: fp32, shaped as parameters."""
    return {
        parameter: gradient.view(parameter.shape)
        for group, views in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
        for parameter, gradient in zip(group, views, strict=True)
    }


def attach(chunks: Iterable[nn.Module], optimizer: Any) -> None:
    """Let the matrices of blocks add into the optimizer's fp32 gradients, where it has them."""
    gradients = fp32_gradients(optimizer) if isinstance(optimizer, BF16_Optimizer) else {}
    for layer in (layer for chunk in chunks for layer in chunk.modules()):
        splits = isinstance(layer, megatron_layers.ColumnParallelLinear | megatron_layers.RowParallelLinear)
        if gradients and (splits or isinstance(layer, AccumulatingLinear)) and layer.fp8 is None:
            layer.weight.main_grad = gradients[layer.weight]
            torch._dynamo.mark_static_address(layer.weight.main_grad)  # a recorded graph may write there
            layer.gradient_accumulation_fusion = splits


def missing_gradients(optimizer: BF16_Optimizer) -> list[nn.Parameter]:
    """Parameters that got no gradient. DeepSpeed, whose hooks do not see what products add, is told that all have one."""
    missing = []
    for group, arrived in zip(optimizer.bf16_groups, optimizer.fp32_groups_has_gradients, strict=True):
        missing += [p for p, there in zip(group, arrived, strict=True) if not there and not hasattr(p, "main_grad")]
        arrived[:] = [True] * len(arrived)
    return missing
