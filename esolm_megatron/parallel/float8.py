"""Products of blocks in fp8 (`train.fp8`), by torchao; on a CPU it emulates them, rounding as a GPU does.

Inputs, weights and gradients are rounded to 8 bits, each with a scale of its own: one for a tensor (`tensorwise`) or one for
a row (`rowwise`). What is kept stays as it was: bf16 weights, fp32 master weights, checkpoints, exports. So does what is
multiplied without a gradient: validation, and what an export must reproduce, are in bf16. Embedding, head, norms and the
first and last blocks are never in fp8.

Source: torchao.float8 (https://github.com/pytorch/ao/tree/main/torchao/float8).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from esolm_megatron.config import Config, ConfigError
from esolm_megatron.errors import optional
from esolm_megatron.model.transformer import Block, EsoLM

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x (..., in), weight (out, in), bias (out,) or None) -> (..., out)."""

LEAST_CAPABILITY = (8, 9)
"""Of a CUDA device whose tensor cores take fp8 (Ada, Hopper, Blackwell)."""


@cache
def product(recipe: str, device: str, compiled: bool) -> Product:
    """The product of a recipe.

    compiled: its casts are, for callers that no compiler looks into.

    Raises:
        ConfigError: torchao is missing, or the device has no fp8.
    """
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns of kernels that are not called here
    optional("torchao", f"train.fp8={recipe}")
    from torchao.float8.config import Float8LinearConfig
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
    from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig

    if device == "cuda" and torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        name = f"{torch.cuda.get_device_name()} has compute capability {torch.cuda.get_device_capability()}"
        raise ConfigError(f"train.fp8 = {recipe}: {name}, fp8 needs {LEAST_CAPABILITY} or more; set train.fp8=none")
    config = Float8LinearConfig.from_recipe_name(recipe)
    # what is left over of 16 is padded: kernels take no other sizes, and the last tokens' number varies
    gemms = (config.gemm_config_output, config.gemm_config_grad_input, config.gemm_config_grad_weight)
    modes = LinearMMConfig(*(ScaledMMConfig(device == "cpu", gemm.use_fast_accum, False, True) for gemm in gemms))

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = matmul_with_hp_or_float8_args.apply(x, weight.t(), modes, config)
        return y if bias is None else y + bias

    return torch.compile(multiply, fullgraph=True) if compiled else multiply


def attach(model: EsoLM, config: Config, device: str, *, compiled: bool) -> None:
    """Let the matrices of the blocks that `config` does not leave out multiply in fp8."""
    train, last = config.train, config.model.num_layers - config.train.fp8_skip_blocks
    if train.fp8 == "none":
        return
    for block in model.layers.values():
        if isinstance(block, Block) and train.fp8_skip_blocks <= block.layer < last:
            for layer in matrices(block):
                layer.fp8 = product(train.fp8, device, compiled)


def matrices(block: Block) -> list[nn.Module]:
    """A block's linears."""
    return [block.attention.qkv, block.attention.out, block.mlp.fc1, block.mlp.fc2]
