"""Weights of 8 bits for inference: half of a bf16 matrix, and of the time to read it, which is what a pass over few rows takes.

Each row of a block's matrix becomes whole numbers from -127 to 127 and one scale, its largest absolute value / 127. Activations
stay as they are. Embedding, head, norms and biases stay, too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esolm_megatron.model.kernels import int8_rows
from esolm_megatron.model.transformer import EsoLM

FEW_ROWS = 16


class Int8Linear(nn.Module):
    """What an nn.Linear gives, about."""

    matrix: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        wide = linear.weight.detach().float()
        scale = (wide.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        self.register_buffer("matrix", (wide / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(linear.weight.dtype))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out); no gradient of the matrix."""
        rows = x.reshape(-1, x.shape[-1])
        product = int8_rows(rows) if len(rows) <= FEW_ROWS else None
        if product is None:
            out = F.linear(rows, self.matrix.to(x.dtype)) * self.scale
        else:
            out = product(rows.contiguous(), self.matrix, self.scale)
        out = out if self.bias is None else out + self.bias
        return out.unflatten(0, x.shape[:-1])


def with_int8_weights(model: EsoLM) -> EsoLM:
    """The network with its blocks' matrices in 8 bits, in place, one after the other."""
    for module in [*model.layers.modules()]:
        for name, linear in [*module.named_children()]:
            if isinstance(linear, nn.Linear):
                setattr(module, name, Int8Linear(linear))
    return model
