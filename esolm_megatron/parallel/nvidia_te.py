"""NVIDIA's Transformer Engine for the matrices of blocks in fp8 and for norms, where `train.kernels` names it.

Its modules keep nothing here: each is made without memory, and lent the weight of a layer of ours, so checkpoints, ZeRO and
tensor ranks know nothing of them. They have no history either: scales are those of the tensors at hand (current scaling).
Without a gradient (validation, probes, exports) torch computes, as with torchao's fp8. No compiler looks into these modules,
so what is between products is compiled apart.

Source: https://docs.nvidia.com/deeplearning/transformer-engine/user-guide/api/pytorch.html (`Linear`, `RMSNorm`, `LayerNorm`,
`autocast`, `is_fp8_available`) and api/common.html (`Float8CurrentScaling`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esolm_megatron.config import Config, ConfigError
from esolm_megatron.model.between import normalise
from esolm_megatron.model.flash import KernelError, difference, milliseconds
from esolm_megatron.model.transformer import Block, EsoLM
from esolm_megatron.parallel.float8 import matrices

MOST_ERROR = {"linears": 2**-3, "norms": 2**-6}
"""Relative, against bf16: half a place of fp8's last bit; some of bf16's."""


def wanted(config: Config) -> bool:
    """Whether a run names it for a job."""
    kernels = config.train.kernels
    return "te" in (kernels.norms, kernels.linears)


def _package(job: str) -> Any:
    said = f"train.kernels.{job} = te"
    try:
        te = importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # what its libraries raise where they do not fit is of many kinds
        raise ConfigError(
            f"{said}: Transformer Engine cannot be imported ({error}); build it with "
            "`pip install --no-build-isolation transformer-engine[pytorch]`, or set auto"
        ) from error
    if not hasattr(te, "autocast"):
        raise ConfigError(f"{said}: this Transformer Engine has no `autocast`; install a newer one, or set auto")
    return te


def product(te: Any, layer: nn.Module) -> Any:
    """What `layer.fp8` takes: x (..., in), weight (out, in), bias -> (..., out), multiplied in fp8."""
    recipe = importlib.import_module("transformer_engine.common.recipe").Float8CurrentScaling()
    out_features, in_features = layer.weight.shape
    lent = te.Linear(in_features, out_features, bias=False, params_dtype=layer.weight.dtype, device="meta")

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if lent.weight is not weight:
            lent.weight = weight
        with te.autocast(enabled=True, recipe=recipe):
            y = lent(x)
        return y if bias is None else y + bias

    return multiply


class Normalise:
    """`normalise` of model/between.py by Transformer Engine's norms, a module lent to each weight."""

    def __init__(self, te: Any):
        self.kinds, self.lent = {"rmsnorm": te.RMSNorm, "layernorm": te.LayerNorm}, dict[int, nn.Module]()

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> Tensor:
        """x normalised over its last dimension, same shape and dtype."""
        if not torch.is_grad_enabled():
            return normalise(x, weight, bias, eps, kind)
        module = self.lent.get(id(weight))
        if module is None:
            module = self.lent[id(weight)] = self.kinds[kind](len(weight), eps=eps, device="meta", dtype=weight.dtype)
            module.weight = weight
            if bias is not None:
                module.bias = bias
        return module(x)


def attach(model: EsoLM, config: Config) -> None:
    """Let it multiply and normalise in a network's blocks, as `train.kernels` says; after the network is compiled."""
    train, last = config.train, config.model.num_layers - config.train.fp8_skip_blocks
    te, blocks = None, [block for block in model.layers.values() if isinstance(block, Block)]
    if train.kernels.linears == "te":
        te = _package("linears")
        for block in blocks:
            for layer in matrices(block) if train.fp8_skip_blocks <= block.layer < last else ():
                layer.fp8 = product(te, layer)
    if train.kernels.norms == "te":
        mine = Normalise(te or _package("norms"))
        for block in blocks:
            block.between = replace(block.between, normalise=mine)


def tried(config: Config, job: str, device: torch.device) -> str:
    """The job done once at the run's width, against torch in bf16; error and times, for logs.

    Raises:
        ConfigError: it is not there, or the device has no fp8. KernelError: it gives something else.
    """
    te, width = _package(job), config.model.hidden_size
    if job == "linears" and not (found := te.is_fp8_available(return_reason=True))[0]:
        raise ConfigError(f"train.kernels.linears = te: no fp8 here ({found[1]}); set train.fp8=none and auto")
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2048, 1, width, generator=generator).to(device, torch.bfloat16) for _ in range(2))
    made, times = [], []
    for by_te in (False, True):
        layer = nn.Linear(width, width, bias=False, device=device, dtype=torch.bfloat16)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(width, width, generator=generator.manual_seed(1)) / width**0.5)
        vector = nn.Parameter(torch.linspace(0.5, 1.5, width, device=device).to(torch.bfloat16))
        bias = nn.Parameter(vector.detach().clone()) if config.model.norm == "layernorm" else None
        if job == "linears":
            call = partial(product(te, layer) if by_te else F.linear, weight=layer.weight, bias=None)
            learnt: list[Tensor] = [layer.weight]
        else:
            how = Normalise(te) if by_te else normalise
            call = partial(how, weight=vector, bias=bias, eps=config.model.norm_eps, kind=config.model.norm)
            learnt = [vector] if bias is None else [vector, bias]
        fed = x.clone().requires_grad_()
        out = call(fed)
        out.backward(y)
        made.append([out.detach(), fed.grad, *(p.grad for p in learnt)])
        times.append(milliseconds(partial(_there_and_back, call, fed, y), device))
    error = max(difference([mine], [theirs]) for mine, theirs in zip(made[1], made[0], strict=True))
    said = (
        f"relative error {error:.2g}, torch's {times[0]:.3g} ms, Transformer Engine's {times[1]:.3g} ms at {width} wide"
    )
    if error > MOST_ERROR[job]:
        raise KernelError(f"train.kernels.{job} = te: {said}; set auto")
    return said


def _there_and_back(call: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> None:
    call(x).backward(grad)
