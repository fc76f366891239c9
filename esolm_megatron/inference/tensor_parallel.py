"""A model whose matrices are cut over processes, for what does not fit one GPU. All of them sample the same tokens.

Each has some heads, some channels of the MLPs and some of the vocabulary. What they give is summed after a block's second and
fourth matrix and after the embedding, and logits are put together, so that each draws from all of them: random numbers are
keyed by (seed, row, place), and sums come to all processes alike.
"""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from esolm_megatron.config import ConfigError
from esolm_megatron.inference.loaded_model import PretrainedEsoLM
from esolm_megatron.model import flash
from esolm_megatron.model.layers import PlainLinear, PlainLinears, Split, mark
from esolm_megatron.model.pretrained import load_model, read_config
from esolm_megatron.model.products import matmul
from esolm_megatron.model.transformer import EsoLM
from esolm_megatron.topology import padded_vocab


class _Row(PlainLinear):
    def forward(self, input: Tensor) -> Tensor:
        """(..., in / processes) -> (..., out), summed over processes; the bias comes once."""
        out = matmul(input, self.weight).contiguous()
        dist.all_reduce(out)
        return out if self.bias is None else out + self.bias


class _Embedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        """(1, T) ids -> (1, T, H): zeros for others' ids, summed."""
        own = input - dist.get_rank() * self.num_embeddings
        inside = (own >= 0) & (own < self.num_embeddings)
        out = F.embedding(torch.where(inside, own, 0), self.weight) * inside[..., None]
        dist.all_reduce(out)
        return out


class SplitLinears(PlainLinears):
    """Linears of one of the processes that joined. No gradients."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        super().__init__(dtype, device)
        self.tensor_size, self.tensor_rank = dist.get_world_size(), dist.get_rank()

    def column(self, in_features: int, out_features: int, *, bias: bool, blocks: int = 1) -> nn.Module:
        """(..., in) -> (..., out / processes)."""
        return self._linear(in_features, out_features // self.tensor_size, bias, Split(0, blocks), Split(0, blocks))

    def row(self, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        """(..., in / processes) -> (..., out)."""
        layer = nn.utils.skip_init(_Row, in_features // self.tensor_size, out_features, bias=bias, **self.options)
        mark(layer.weight, Split(1))
        if bias:
            mark(layer.bias, Split())
        return layer

    def vocab_rows(self, vocab_size: int) -> int:
        """As many in each process."""
        return padded_vocab(vocab_size, self.tensor_size) // self.tensor_size

    def vocab_embedding(self, vocab_size: int, hidden_size: int) -> nn.Module:
        """(1, T) ids -> (1, T, H)."""
        layer = nn.utils.skip_init(_Embedding, self.vocab_rows(vocab_size), hidden_size, **self.options)
        mark(layer.weight, Split(0, whole_size=vocab_size))
        return layer

    def over_ranks(self, x: Tensor, how: Literal["max", "sum"]) -> Tensor:
        """x -> its maximum or sum over processes."""
        dist.all_reduce(x, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM)
        return x


class SplitEsoLM(EsoLM):
    """The network on one of the processes, with whole logits."""

    def logits(self, x: Tensor, targets: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
        """(M, H) -> (M, V) logits on every process, or (M,) token losses."""
        own = super().logits(x, targets, counts)
        if targets is not None:
            return own
        parts = own.new_empty(self.linears.tensor_size, *own.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), own.contiguous())
        return parts.transpose(0, 1).flatten(1)[:, : self.shape.vocab].contiguous()


def load_split(folder: str | Path, dtype: torch.dtype, device: torch.device) -> PretrainedEsoLM:
    """The model of an inference folder, cut over the processes that RANK and WORLD_SIZE tell of, which this joins.

    Raises:
        ConfigError: that many processes do not divide the model. PretrainedError: as `load_model`.
    """
    info, size = read_config(folder), int(os.environ["WORLD_SIZE"])
    m = info.model
    for name, value in (("num_heads", m.num_heads), ("num_kv_heads", m.kv_heads), ("ffn_hidden_size", m.ffn_size)):
        if value % size:
            raise ConfigError(f"--processes {size}: must divide the model's {name} = {value}")
    if not dist.is_initialized():
        options = {"device_id": device} if device.type == "cuda" else {}
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10), **options)
    model = load_model(folder, dtype, device, network=SplitEsoLM, linears=SplitLinears(dtype, device))
    flash.choose(device)
    return PretrainedEsoLM(model, info.alpha_0, Path(folder), cross_document=info.cross_document)
