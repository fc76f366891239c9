"""The parts of a block that have weights, and the `Linears` protocol through which parallelism is given to them.

Shapes: T packed tokens (T/tensor_size of them between blocks with sequence parallelism), H hidden_size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from esolm_megatron.config import ModelConfig
from esolm_megatron.model.between import EAGER, Between
from esolm_megatron.model.kernels import GPU_DEVICES, on_gpu, wide_product
from esolm_megatron.model.loss import predicted_losses
from esolm_megatron.model.products import matmul
from esolm_megatron.topology import padded_vocab


@dataclass(frozen=True)
class Split:
    """How a tensor rank's piece of a parameter lies in the whole one.

    dim: the dimension that is cut; None where every rank holds the whole.
    blocks: matrices fused along that dimension, each cut by itself (2 for the gate and up matrices of SwiGLU).
    whole_size: size of the whole along dim where the ranks' pieces are padded past it (vocabulary).
    partial_grad: each tensor rank sees only its heads or tokens, so gradients must be summed over tensor ranks.
    """

    dim: int | None = None
    blocks: int = 1
    whole_size: int | None = None
    partial_grad: bool = False


@dataclass(frozen=True)
class Box:
    """A rectangle of a parameter: where it starts in the rank's piece, where in the whole, and its shape."""

    local: tuple[int, ...]
    whole: tuple[int, ...]
    shape: tuple[int, ...]


def whole_shape(local_shape: tuple[int, ...], split: Split, tensor_size: int) -> tuple[int, ...]:
    """Shape of the whole parameter."""
    if split.dim is None:
        return tuple(local_shape)
    size = split.whole_size or local_shape[split.dim] * tensor_size
    return (*local_shape[: split.dim], size, *local_shape[split.dim + 1 :])


def boxes(local_shape: tuple[int, ...], split: Split, tensor_rank: int, tensor_size: int) -> Iterator[Box]:
    """The rectangles of the whole parameter that a rank holds; padding is in none of them."""
    zeros = (0,) * len(local_shape)
    if split.dim is None:
        yield Box(zeros, zeros, tuple(local_shape))
        return
    dim, whole = split.dim, whole_shape(local_shape, split, tensor_size)
    piece = local_shape[dim] // split.blocks
    for block in range(split.blocks):
        start = block * piece * tensor_size + tensor_rank * piece
        size = min(piece, whole[dim] - start)
        if size > 0:
            yield Box(_put(zeros, dim, block * piece), _put(zeros, dim, start), _put(local_shape, dim, size))


def _put(numbers: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*numbers[:dim], value, *numbers[dim + 1 :])


def mark(parameter: nn.Parameter, split: Split) -> None:
    """Attach `split` to a parameter, for initialisation, checkpoints and gradient sums."""
    parameter.esolm_split = split  # type: ignore[attr-defined]


def split_of(parameter: nn.Parameter) -> Split:
    """What `mark` attached."""
    return parameter.esolm_split  # type: ignore[attr-defined]


class Linears(Protocol):
    """What a block needs to know of tensor parallelism: nothing but these calls."""

    tensor_size: int
    tensor_rank: int
    sequence_parallel: bool

    def column(self, in_features: int, out_features: int, *, bias: bool, blocks: int = 1) -> nn.Module:
        """(T', 1, in) -> (T, 1, out / tensor_size): output features are cut."""

    def row(self, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        """(T, 1, in / tensor_size) -> (T', 1, out): input features are cut, results summed."""

    def vocab_rows(self, vocab_size: int) -> int:
        """Rows of the vocabulary that this rank holds, padding included."""

    def vocab_embedding(self, vocab_size: int, hidden_size: int) -> nn.Module:
        """(1, T) ids -> (1, T, H): vocabulary rows are padded, and cut."""

    def copy_to_ranks(self, x: Tensor) -> Tensor:
        """Identity whose gradient is summed over the tensor ranks."""

    def scatter_tokens(self, x: Tensor) -> Tensor:
        """(T, 1, H) -> this rank's (T', 1, H) with sequence parallelism."""

    def gather_tokens(self, x: Tensor) -> Tensor:
        """(T', 1, H) -> (T, 1, H); the gradient that comes back is whole on every rank."""

    def own_tokens(self, per_token: Tensor) -> Tensor:
        """(T,) -> the (T',) entries of this rank's tokens."""

    def over_ranks(self, x: Tensor, how: Literal["max", "sum"]) -> Tensor:
        """x -> its maximum or sum over the tensor ranks, without a gradient; x may be overwritten."""

    def empty(self, *shape: int) -> nn.Parameter:
        """An uninitialised parameter of the run's dtype and device."""


class PlainLinear(nn.Linear):
    """nn.Linear by `matmul`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return matmul(input, self.weight, self.bias)


class PlainLinears:
    """Linears of one device, for inference and as the truth that split ones are compared with."""

    tensor_size, tensor_rank, sequence_parallel = 1, 0, False
    linear: type[nn.Linear] = PlainLinear

    def __init__(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", *, pad_vocab: bool = False
    ):
        """pad_vocab: as split ones have it; else the vocabulary has as many rows as ids."""
        self.options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.pad_vocab = pad_vocab

    def column(self, in_features: int, out_features: int, *, bias: bool, blocks: int = 1) -> nn.Module:
        """nn.Linear."""
        return self._linear(in_features, out_features, bias, Split(0, blocks), Split(0, blocks))

    def row(self, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        """nn.Linear."""
        return self._linear(in_features, out_features, bias, Split(1), Split())

    def _linear(self, in_features: int, out_features: int, bias: bool, weight: Split, vector: Split) -> nn.Module:
        layer = nn.utils.skip_init(self.linear, in_features, out_features, bias=bias, **self.options)
        mark(layer.weight, weight)
        if bias:
            mark(layer.bias, vector)
        return layer

    def vocab_rows(self, vocab_size: int) -> int:
        """All, and padding where it is wanted."""
        return padded_vocab(vocab_size, 1) if self.pad_vocab else vocab_size

    def vocab_embedding(self, vocab_size: int, hidden_size: int) -> nn.Module:
        """nn.Embedding."""
        rows = self.vocab_rows(vocab_size)
        layer = nn.Embedding(rows, hidden_size, _weight=self.empty(rows, hidden_size))
        mark(layer.weight, Split(0, whole_size=vocab_size))
        return layer

    def copy_to_ranks(self, x: Tensor) -> Tensor:
        """x."""
        return x

    scatter_tokens = gather_tokens = own_tokens = copy_to_ranks

    def over_ranks(self, x: Tensor, how: Literal["max", "sum"]) -> Tensor:
        """x."""
        return x

    def empty(self, *shape: int) -> nn.Parameter:
        """An uninitialised parameter; a matrix for a GPU with rows of zeros behind it in memory, see `with_spare_rows`."""
        if len(shape) == 2 and torch.device(self.options["device"]).type in GPU_DEVICES:
            return nn.Parameter(torch.zeros(padded_vocab(shape[0], 1), shape[1], **self.options)[: shape[0]])
        return nn.Parameter(torch.empty(*shape, **self.options))


def with_spare_rows(matrix: Tensor) -> Tensor:
    """The matrix with the rows that lie behind it in its memory: products of an odd number of columns are slow on GPUs."""
    rows = padded_vocab(len(matrix), 1)
    alone = matrix.untyped_storage().nbytes() == rows * matrix.shape[1] * matrix.element_size()
    if not (alone and matrix.is_contiguous() and matrix.storage_offset() == 0):
        return matrix
    return matrix.as_strided((rows, matrix.shape[1]), matrix.stride())


class Norm(nn.Module):
    """LayerNorm with bias or RMSNorm over the last dimension, of `width` channels."""

    def __init__(self, config: ModelConfig, linears: Linears, width: int, *, kind: str = "", per_head: bool = False):
        super().__init__()
        self.kind, self.eps = kind or config.norm, config.norm_eps
        split = Split(partial_grad=linears.sequence_parallel or per_head)
        self.weight = linears.empty(width)
        mark(self.weight, split)
        self.bias = None
        if self.kind == "layernorm":
            self.bias = linears.empty(width)
            mark(self.bias, split)

    def forward(self, x: Tensor, between: Between = EAGER) -> Tensor:
        """x normalised, same shape and dtype; statistics are taken in fp32 or better."""
        return between.normalise(x, self.weight, self.bias, self.eps, self.kind)


class Mlp(nn.Module):
    """Two matrices with GELU-tanh between them, or SwiGLU with its gate and up matrices fused."""

    def __init__(self, config: ModelConfig, linears: Linears):
        super().__init__()
        self.gated = config.activation == "swiglu"
        blocks = 2 if self.gated else 1
        self.fc1 = linears.column(config.hidden_size, blocks * config.ffn_size, bias=config.mlp_bias, blocks=blocks)
        self.fc2 = linears.row(config.ffn_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, between: Between = EAGER) -> Tensor:
        """(T', 1, H) -> (T', 1, H)."""
        return self.fc2(between.activate(self.fc1(x), self.gated))


class _Fp32Logits(torch.autograd.Function):
    """bf16 matrices multiplied into fp32 logits: rounding logits to bf16 costs 1e-2 rms in the token loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """(M, H), (V, H) -> fp32 (M, V)."""
        ctx.save_for_backward(x, weight)
        return wide_product(x, weight.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients in the matrices' own dtype."""
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)
        return grad @ weight, grad.t() @ x


class VocabHead(nn.Module):
    """The output head: hidden states to fp32 logits of this rank's slice of the vocabulary, or to losses.

    The mask token and the padding of the vocabulary get minus infinity.
    """

    def __init__(self, config: ModelConfig, linears: Linears, *, own_weight: bool):
        super().__init__()
        self.linears, self.mask_id = linears, config.mask_id
        size = linears.vocab_rows(config.vocab)
        self.start, split = linears.tensor_rank * size, Split(0, whole_size=config.vocab)
        self.weight, self.bias = None, None
        if own_weight:
            self.weight = linears.empty(size, config.hidden_size)
            mark(self.weight, split)
        if config.output_bias:
            self.bias = linears.empty(size)
            mark(self.bias, split)

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        targets: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """(M, H) -> (M, V / tensor_size), or (M,) losses where `targets` (M,) are given; fp32 (fp64 for fp64 weights).

        weight: the tied embedding. counts: (M,) what each loss will count, see `predicted_losses`.
        """
        matrix = self.weight if weight is None else weight
        assert matrix is not None
        x, num_ids = self.linears.copy_to_ranks(x), max(self.mask_id - self.start, 0)
        if targets is not None:
            return predicted_losses(
                x,
                matrix,
                self.bias,
                targets,
                counts,
                first_id=self.start,
                num_ids=num_ids,
                over_ranks=self.linears.over_ranks,
            )
        whole = len(matrix)
        if on_gpu(matrix) and not torch.is_grad_enabled():
            matrix = with_spare_rows(matrix)
        low = x.dtype in (torch.bfloat16, torch.float16)
        logits = _Fp32Logits.apply(x, matrix) if low else matmul(x, matrix).contiguous()
        if logits.shape[1] > whole:
            logits = logits[:, :whole]
        if self.bias is not None:
            logits = logits + self.bias.to(logits.dtype)
        logits[:, num_ids:] = float("-inf")  # in place: nothing saved for backward is changed
        return logits
