"""Kernels are tried before they are trusted, and a step calls them as often as it must."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from truth import MODERN, REFERENCE, make_config, plain_model, share_of_step

from esolm_megatron.model import flash, kernels
from esolm_megatron.model.kernels import CpuFlash
from esolm_megatron.objective.esolm import mean_loss, part_sums

CPU = torch.device("cpu")


def test_a_cpu_has_one_library():
    assert flash.choose(CPU) == "torch's flash attention for CPUs"
    assert flash.error_of(kernels.CHOSEN_ON_CPU, CPU) < 0.01, "bf16 against fp32"


@pytest.mark.parametrize("wrong", ["forward", "backward", "nan"])
def test_a_wrong_kernel_is_noticed(monkeypatch, wrong):
    """Of the mask stream's calls alone, so that a kernel that fails on merged log-sum-exps is found out."""

    class Bad(CpuFlash):
        def forward(self, q, *rest):
            out, lse = super().forward(q, *rest)
            factor = {"forward": 1.1, "nan": float("nan")}.get(wrong, 1.0)
            return (out * factor if q.dtype == torch.bfloat16 and q.shape[2] < 128 else out), lse

        def backward(self, grad, q, *rest):
            dq, dk, dv = super().backward(grad, q, *rest)
            return (dq * 1.2 if wrong == "backward" and q.dtype == torch.bfloat16 and q.shape[2] < 128 else dq), dk, dv

    monkeypatch.setattr(kernels, "CHOSEN_ON_CPU", Bad())
    assert flash.error_of(Bad(), CPU) > 0.02


class Operators(TorchDispatchMode):
    """How often each operator runs in a step, and the bytes of what they make, views of what they were given left out."""

    def __init__(self, model, tokens):
        super().__init__()
        self.model, self.tokens = model, tokens
        self.calls, self.bytes = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        made = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.bytes += x.untyped_storage().nbytes()
        return made


def operators_of_step(shape, alpha_0, num_layers):
    config = make_config(shape | {"num_layers": num_layers, "seq_length": 160}, objective={"alpha_0": alpha_0})
    model, noised = plain_model(config), share_of_step(config, 0, num_micro_batches=1)
    (batch,) = noised.micro_batches
    with Operators(model, batch.tokens.numel()) as seen:
        losses = model(batch.tokens, batch.positions, batch.attend, targets=batch.targets, last=batch.last)
        mean_loss(part_sums(losses, batch), noised.num_valid).backward()
    return seen


@pytest.mark.parametrize(("shape", "alpha_0", "most"), [
    (REFERENCE, 1.0, 44), (REFERENCE, 0.5, 100), (REFERENCE, 0.0, 87), (MODERN, 1.0, 131), (MODERN, 0.5, 205),
])  # fmt: skip
def test_operators_of_a_block(shape, alpha_0, most):
    """A block more costs this many operators that compute, forward and backward; views are free."""
    views = {"view", "t", "transpose", "slice", "split", "split_with_sizes", "detach", "unsqueeze", "_unsafe_view", "expand",
             "permute", "alias", "select", "squeeze", "as_strided", "empty", "empty_like", "reshape"}  # fmt: skip
    few, many = (operators_of_step(shape, alpha_0, layers).calls for layers in (2, 3))
    more = {name: many[name] - few.get(name, 0) for name in many if name not in views and many[name] > few.get(name, 0)}
    flash_calls = [v for k, v in more.items() if "flash_attention" in k]
    parts = {1.0: 1, 0.5: 3, 0.0: 2}[alpha_0]  # the causal rows; with masks, past keys (if any) and recent ones
    assert flash_calls == [parts, parts]
    assert more.get("mm", 0) + more.get("addmm", 0) == 4 * 3
    assert sum(more.values()) <= most, more


@pytest.mark.parametrize(("shape", "alpha_0", "most"), [
    (REFERENCE, 1.0, 31), (REFERENCE, 0.5, 40.2), (REFERENCE, 0.0, 42.2), (MODERN, 1.0, 76), (MODERN, 0.5, 84.5),
])  # fmt: skip
def test_bytes_of_a_block(shape, alpha_0, most):
    """What a block more allocates in a step, forward and backward, in numbers of hidden_size for each token that is fed."""
    few, many = (operators_of_step(shape, alpha_0, layers) for layers in (2, 3))
    assert few.tokens == many.tokens
    weights = sum(p.numel() for p in many.model.layers["0"].parameters())
    width = (many.bytes - few.bytes - 4 * weights) / (4 * many.tokens * many.model.shape.hidden_size)
    assert 0.9 * most < width <= most
