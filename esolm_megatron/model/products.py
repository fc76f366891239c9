"""Matrix products, and how inference on a CPU makes those of a few rows faster.

A decoding pass multiplies a few rows with every matrix once, so it is bound by how the library reads the matrix. oneDNN
reads a matrix in a layout of its own up to 3 times as fast as `F.linear` reads a plain one (figures in docs/benchmarks.md).
Nothing of this concerns training, GPUs, fp64 or bf16.
"""

from __future__ import annotations

import platform
from contextvars import ContextVar, Token

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MOST_ROWS = 256
_COPY_AFTER = 32
"""Passes after which copies pay: making them costs as much as a few."""
_MOST_BYTES = 2 << 30
"""Matrices of more than this together are not copied into oneDNN's layout; it then reads them as they are."""


def has_onednn() -> bool:
    """Whether this torch can call oneDNN's product on a layout of its own; only x86-64 has been tried."""
    usual = platform.machine().lower() in ("x86_64", "amd64")
    return usual and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class FastProducts:
    """While entered, inference multiplies a few rows with the model's matrices by oneDNN. Enter it once for each pass.

    After some passes the matrices are copied into oneDNN's layout, for as long as this object lives; weights that change
    later need a new one. Without effect where the model is on a GPU or not in fp32, or torch has no oneDNN.
    """

    def __init__(self, model: nn.Module):
        self._model = model  # while it lives, no other tensor has the id of one of its own
        self._matrices = {id(p): p.detach() for p in model.parameters() if p.dim() == 2}
        found = self._matrices.values()
        if not has_onednn() or any(p.device.type != "cpu" or p.dtype != torch.float32 for p in found):
            self._matrices = {}
        self._copies = sum(p.numel() * p.element_size() for p in found) <= _MOST_BYTES
        self._entered, self._tokens = 0, list[Token]()

    def __enter__(self) -> FastProducts:
        if self._entered == _COPY_AFTER and self._copies:
            for key, matrix in self._matrices.items():
                self._matrices[key] = _in_own_layout(matrix)
        self._entered += 1
        self._tokens.append(_CURRENT.set(self._matrices))
        return self

    def __exit__(self, *_: object) -> None:
        _CURRENT.reset(self._tokens.pop())


_CURRENT: ContextVar[dict[int, Tensor] | None] = ContextVar("fast products", default=None)


def _in_own_layout(matrix: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(matrix, 16)  # the layout for 16 rows serves 1 to 256


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, within `FastProducts` by the fastest way for so many rows; the result need not be contiguous."""
    matrices = None if torch.compiler.is_compiling() else _CURRENT.get()
    if matrices is None or (matrix := matrices.get(id(weight))) is None:
        return F.linear(x, weight, bias)
    rows = x.numel() // x.shape[-1]
    if rows == 2 and weight.shape[0] > weight.shape[1]:  # from the right this is faster than any layout
        columns = x.flatten(0, -2).t()
        out = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
        return out.t().unflatten(0, x.shape[:-1])
    if rows > _MOST_ROWS:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), matrix, bias, "none", [], "")
