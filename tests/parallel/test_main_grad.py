"""Products that add weight gradients up in fp32: what they add, how often, under a compiler and megatron-core's layers."""

from functools import partial

import pytest
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from truth import MODERN, REFERENCE, make_config, share_of_step

from esolm_megatron.parallel.main_grad import AccumulatingLinears

MICRO_BATCHES, LAYERS, MATRICES = (
    4,
    MODERN["num_layers"],
    4,
)  # of a block: queries with keys and values, out, two of the MLP


def test_what_is_added_is_not_rounded():
    """Sums of bf16 gradients are off by a rounding each; the product's own sum is as near as fp32."""
    torch.manual_seed(0)
    layer = AccumulatingLinears(torch.bfloat16).column(24, 40, bias=True)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    plain, exact = layer.weight.detach().clone(), torch.zeros(40, 24, dtype=torch.float64)
    rounded, layer.weight.main_grad = torch.zeros(40, 24), torch.ones(40, 24)
    for _ in range(MICRO_BATCHES):
        x, g = torch.randn(70, 1, 24).bfloat16().requires_grad_(), torch.randn(70, 1, 40).bfloat16()
        y = layer(x)
        y.backward(g)
        assert torch.equal(y, torch.nn.functional.linear(x, plain, layer.bias))
        torch.testing.assert_close(x.grad, g @ plain)
        exact += g[:, 0].double().t() @ x[:, 0].detach().double()
        rounded += g[:, 0].t() @ x[:, 0].detach()
    torch.testing.assert_close(layer.weight.main_grad.double() - 1, exact, rtol=1e-5, atol=1e-5)
    assert (rounded - exact).abs().max() > 1e-2
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


def counts(config):
    """One rank: the types that products of a step added to, the matrices that DeepSpeed added up, and what got nothing."""
    from esolm_megatron.parallel import main_grad
    from esolm_megatron.parallel.engine import Engine

    torch.compile = partial(torch.compile, backend="aot_eager")
    engine, added, by_deepspeed = Engine(config), [], []
    kernel, update = main_grad.megatron_layers.fused_weight_gradient_mlp_cuda, BF16_Optimizer._update_hp_grad

    class Seen(kernel):
        @staticmethod
        def wgrad_gemm_accum_fp32(x, grad, out):
            added.append(out.dtype)
            kernel.wgrad_gemm_accum_fp32(x, grad, out)

    def seen(self, lp, *args, **kwargs):
        by_deepspeed.extend(o.name for o in engine.owned if o.parameter is lp and lp.grad is not None and lp.dim() > 1)
        return update(self, lp, *args, **kwargs)

    main_grad.megatron_layers.fused_weight_gradient_mlp_cuda, BF16_Optimizer._update_hp_grad = Seen, seen
    engine.forward_backward(share_of_step(config, 0, engine.topology.data_rank, engine.topology.data_size))
    missing = [o.name for o in engine.owned if not engine.state.gradients()[o.parameter].any()]
    return added, set(by_deepspeed), missing


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("world", "parallel", "compiled"),
    [
        (1, {}, False),
        (1, {"recompute": "full"}, True),
        (2, {"tensor_size": 2, "sequence_parallel": True}, False),
        (2, {"tensor_size": 2}, True),
        (2, {"zero_stage": 1}, True),
        (2, {"pipeline_size": 2}, True),  # micro-batches are under way together
    ],
    ids=str,
)
def test_each_matrix_is_added_once_a_micro_batch(world, parallel, compiled):
    config = make_config(REFERENCE, parallel=parallel, train={"precision": "bf16", "compile": compiled})
    results = run_ranks(counts, world, config)
    shares = world // parallel.get("tensor_size", 1)  # of micro-batches, or of layers
    for added, _, missing in results:
        assert added == [torch.float32] * (MICRO_BATCHES * LAYERS * MATRICES // shares)
        assert not [name for name in missing if "layers" in name]
    assert set().union(*(names for _, names, _ in results)) == {"embedding.weight", "head.weight"}


@pytest.mark.gloo
def test_a_parameter_without_a_gradient_is_an_error():
    config = make_config(train={"precision": "bf16"})
    (message,) = run_ranks(forgotten, 1, config)
    assert message == "no gradient for final_norm.weight"


def forgotten(config):
    """One rank: what a step says when a parameter has lost its gradient on the way."""
    from esolm_megatron.parallel.engine import Engine

    engine = Engine(config)
    (lost,) = [o.parameter for o in engine.owned if o.name == "final_norm.weight"]
    lost.requires_grad_(False)
    try:
        engine.forward_backward(share_of_step(config, 0))
    except RuntimeError as error:
        return str(error)


def operators_of_a_step(config):
    """One rank: operators that the optimizer's step calls, and its norm as DeepSpeed takes it."""
    from esolm_megatron.parallel.engine import Engine

    engine = Engine(config)
    results = []
    for step in range(2):  # the first makes moments
        engine.forward_backward(share_of_step(config, step, engine.topology.data_rank, engine.topology.data_size))
        with OperatorCount() as count:
            results.append((engine.state.step(1e-3), count.total))
    return results


class OperatorCount(TorchDispatchMode):
    """How many operators were called."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.total += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.gloo
def test_a_step_of_the_optimizer_has_as_many_passes_for_any_number_of_layers():
    counts = {}
    for layers in (2, 6):
        config = make_config(MODERN | {"num_layers": layers}, train={"precision": "bf16"})
        counts[layers] = run_ranks(operators_of_a_step, 2, config)[0][1][1]
    assert counts[2] == counts[6] <= 90, counts  # of which 24 for the bucket that is reduced during backward
