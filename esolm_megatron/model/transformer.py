"""The network: a pre-norm decoder over packed tokens, whose attention is causal over the generation order.

A pipeline stage is this class with parts missing. What a token sees is decided by `attend`, an argument: packed streams
in training (model/attention.py), a KV cache in sampling (model/cache.py).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esolm_megatron.config import ModelConfig
from esolm_megatron.model.between import EAGER, Between, compiled
from esolm_megatron.model.kernels import sampling_kernels
from esolm_megatron.model.layers import Box, Linears, Mlp, Norm, VocabHead, boxes, split_of, whole_shape
from esolm_megatron.model.rotary import rotary_tables

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q (T, N, D), k (T, G, D), v (T, G, D)) -> (T, N, D)."""


Dropped = tuple[Tensor | None, Tensor | None, Tensor | None]
"""(ids (T',) of the tokens, salts () of a block's two branches), int32, see `hashed_dropout`; None for no dropout."""
NO_DROPOUT: Dropped = None, None, None


class Wanted(Protocol):
    """What the last block is to compute (model/last_block.py)."""

    fed: Tensor
    """(P,) tokens whose queries it is fed."""
    within: Tensor | None
    """(M,) which of those the head looks at; None for all."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (P, N, D) of those tokens, k and v (T, G, D) of all -> (P, N, D)."""


class Attention(nn.Module):
    """Queries, keys and values with rotary positions; `attend` mixes them.

    The rows of `qkv` are grouped by key-value head: the queries that share it, its key, its value.
    """

    def __init__(self, config: ModelConfig, linears: Linears, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.kv_heads = config.kv_heads // linears.tensor_size
        self.queries = config.num_heads // config.kv_heads
        width = config.head_dim
        rows = (config.num_heads + 2 * config.kv_heads) * width
        self.qkv = linears.column(config.hidden_size, rows, bias=config.qkv_bias)
        self.out = linears.row(config.num_heads * width, config.hidden_size, bias=False)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = Norm(config, linears, width, kind="rmsnorm", per_head=True)
            self.k_norm = Norm(config, linears, width, kind="rmsnorm", per_head=True)

    def project(
        self, x: Tensor, rope: tuple[Tensor, Tensor], between: Between = EAGER
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(T', 1, H) -> queries (T, N, D), keys and values (T, G, D)."""
        y = self.qkv(x).contiguous()  # attention kernels want it so; see `matmul`
        norms, eps = None, 0.0
        if self.q_norm is not None and self.k_norm is not None:
            norms, eps = (self.q_norm.weight, self.k_norm.weight), self.q_norm.eps
        return between.heads(y, rope, norms, (self.kv_heads, self.queries, self.head_dim), eps)

    def forward(self, mixed: Tensor) -> Tensor:
        """(P, N, D), what queries found, -> (P', 1, H)."""
        return self.out(mixed.reshape(len(mixed), 1, -1))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, linears: Linears, layer: int):
        super().__init__()
        self.layer, self.dropout, self.linears = layer, config.dropout, linears
        self.norm1 = Norm(config, linears, config.hidden_size)
        self.attention = Attention(config, linears, layer)
        self.norm2 = Norm(config, linears, config.hidden_size)
        self.mlp = Mlp(config, linears)
        self.recompute_mlp, self.between = False, EAGER

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, drop: Dropped, fed: Tensor | None = None
    ) -> Tensor:
        """(T', 1, H) -> (T', 1, H), or (P', 1, H) for the P tokens `fed`, to which the ids of `drop` then belong."""
        q, k, v = self._before(x, rope)
        mixed = attend(self.layer, q if fed is None else q.index_select(0, fed), k, v)
        if fed is not None:
            x = self.linears.scatter_tokens(self.linears.gather_tokens(x).index_select(0, fed))
        return self._after(x, mixed, drop)

    def compile(self, *args: Any, apart: bool = False, **options: Any) -> None:
        """Compile what lies before and after attention, a graph each; blocks of one shape share them.

        Attention itself is kernels already, and other parts of a block than these have no arithmetic. apart: compile what
        lies between products only, where these are not torch's alone or weights come and go.
        """
        self.between = compiled(**options) if apart else EAGER
        for name in ("_before", "_after"):  # of the class, so that compiling again replaces what was compiled
            method = MethodType(getattr(Block, name), self)
            setattr(self, name, method if apart else torch.compile(method, fullgraph=True, **options))

    def _before(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention.project(self.norm1(x, self.between), rope, self.between)

    def _after(self, x: Tensor, mixed: Tensor, drop: Dropped) -> Tensor:
        ids, first, second = drop
        delta, kernels = self.attention(mixed), sampling_kernels(x)
        if kernels is not None and ids is None:
            x, y = kernels.added(x, delta, self.norm2.weight, self.norm2.bias, self.norm2.eps)
            return self.between.add(x, self.mlp(y, self.between), None, None, 0.0)
        x = self.between.add(x, delta, ids, first, self.dropout)
        if self.recompute_mlp and torch.is_grad_enabled():
            y = checkpoint(self._mlp, x, use_reentrant=False, preserve_rng_state=False)
        else:
            y = self._mlp(x)
        return self.between.add(x, y, ids, second, self.dropout)

    def _mlp(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x, self.between), self.between)


class EsoLM(nn.Module):
    """The whole network, or the stage of it that holds `layers`.

    Parameters carry the names of the whole network, whatever the stage: `layers.7.mlp.fc1.weight`.
    """

    def __init__(
        self,
        config: ModelConfig,
        linears: Linears,
        *,
        layers: range | None = None,
        first: bool = True,
        last: bool = True,
        recompute: str = "none",
        offload: bool = False,
    ):
        super().__init__()
        self.shape, self.linears, self.first, self.last = config, linears, first, last
        self.recompute_blocks, self.offload_blocks = recompute == "full", offload
        layers = range(config.num_layers) if layers is None else layers
        if first:
            self.embedding = linears.vocab_embedding(config.vocab, config.hidden_size)
        self.layers = nn.ModuleDict({str(i): Block(config, linears, i) for i in layers})
        for block in self.layers.values():
            block.recompute_mlp = recompute == "selective"
        if last:
            self.final_norm = Norm(config, linears, config.hidden_size)
            self.head = VocabHead(config, linears, own_weight=not (config.tied_embeddings and first))
        self.input_tensor: Tensor | None = None
        self.cuda_graphs, self.between = False, EAGER

    def compile_blocks(self, *, cuda_graphs: bool = False, apart: bool = False, **options: Any) -> None:
        """Compile every block, see `Block.compile`; with `cuda_graphs` a GPU replays all but the last one.

        The last block is fed as many tokens as carry loss, which is another number in each step.
        """
        self.cuda_graphs, self.between = cuda_graphs, compiled(**options)
        for block in self.layers.values():
            replayed = cuda_graphs and block.layer < self.shape.num_layers - 1
            block.compile(apart=apart, **options, **({"mode": "reduce-overhead"} if replayed else {}))

    def set_input_tensor(self, tensors: list[Tensor] | Tensor) -> None:
        """Keep what the stage before sent, for the next forward."""
        self.input_tensor = tensors[0] if isinstance(tensors, list) else tensors

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: Attend,
        *,
        places: Tensor | None = None,
        targets: Tensor | None = None,
        counts: Tensor | None = None,
        dropout_ids: Tensor | None = None,
        last: Wanted | None = None,
        head: bool = True,
    ) -> Tensor:
        """Hidden states of this stage, or at the last one logits, or token losses where `targets` are given.

        tokens, positions: (T,) int64, packed. places: (M,) indices of the tokens that the head looks at; all by default.
        targets: (M,) ids. counts: (M,) what each loss will count, see `predicted_losses`.
        dropout_ids: (T,) int32, one for each token of the step; None turns dropout off.
        last: lets the last block compute what `places` need, and no more. head: without it, the last stage returns what
        `logits` wants.
        Returns (T', 1, H), (M, V / tensor_size) or (M,); (M, H) without the head.
        """
        if self.cuda_graphs:  # what graphs made in an earlier pass may be overwritten from here on
            torch.compiler.cudagraph_mark_step_begin()
        ids = last_ids = None
        if dropout_ids is not None and self.shape.dropout > 0:
            ids = self.linears.own_tokens(dropout_ids)
            last_ids = None if last is None else self.linears.own_tokens(dropout_ids.index_select(0, last.fed))
            # tensors: as a number, each layer's would be compiled for itself
            all_salts = torch.arange(3 * self.shape.num_layers, dtype=torch.int32, device=dropout_ids.device).unbind()
        if self.first:
            x = self.linears.scatter_tokens(self.embedding(tokens[None]).view(len(tokens), 1, -1))
            x = x if ids is None else self.between.drop(x, ids, 0, self.shape.dropout)
        else:
            assert self.input_tensor is not None, "a later stage needs set_input_tensor first"
            x = self.input_tensor
        rope = rotary_tables(positions, self.shape.head_dim, self.shape.rope_base, x.dtype)
        for block in self.layers.values():
            salts = NO_DROPOUT[1:] if ids is None else all_salts[3 * block.layer + 1 : 3 * block.layer + 3]
            inputs: tuple[Any, ...] = (x, rope, attend, (ids, *salts))
            if last is not None and block.layer == self.shape.num_layers - 1:
                inputs, places = (x, rope, last, (last_ids, *salts), last.fed), last.within
            if self.recompute_blocks and torch.is_grad_enabled():
                with waiting_in_host_memory(x) if self.offload_blocks else nullcontext():
                    x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*inputs)
        if not self.last:
            return x
        x = self.linears.gather_tokens(self.final_norm(x)).squeeze(1)
        if places is not None:
            x = x.index_select(0, places)
        return self.logits(x, targets, counts) if head else x

    def logits(self, x: Tensor, targets: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
        """(M, H) normalised hidden states -> (M, V / tensor_size) logits, or (M,) token losses at `targets` (M,)."""
        tied = self.embedding.weight if self.head.weight is None else None
        return self.head(x, tied, targets, counts)

    def whole_names(self) -> dict[str, str]:
        """Local parameter name -> its name in the whole network; a tied head's copy is the embedding."""
        tied = {"head.weight": "embedding.weight"} if self.shape.tied_embeddings else {}
        return {name: tied.get(name, name) for name, _ in self.named_parameters()}


def waiting_in_host_memory(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, what autograd saves of x waits for backward in host memory, pinned where x is on a GPU.

    Copies are queued beside the arithmetic of x's stream: the host does not wait, and memory is free in the stream's order.
    """

    def away(saved: Tensor) -> tuple[torch.device, Tensor]:
        if saved.data_ptr() != x.data_ptr() or saved.shape != x.shape:
            return saved.device, saved
        there = torch.empty(saved.shape, dtype=saved.dtype, pin_memory=saved.is_cuda)
        return saved.device, there.copy_(saved, non_blocking=True)

    def back(kept: tuple[torch.device, Tensor]) -> Tensor:
        device, saved = kept
        return saved.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(away, back)


@torch.no_grad()
def initialise(model: EsoLM, seed: int, width_ratio: float = 1.0) -> None:
    """Fill the weights: equal on every layout, because each whole tensor is a function of (seed, name).

    Matrices are normal with `init_std`, those that write into the residual stream divided by sqrt(2 num_layers); norm
    weights are one, biases zero. width_ratio: of another width than this one, for which init_std holds (muP: Yang et al.
    2022, arXiv 2203.03466): matrices of blocks take its root, the head takes it, embeddings are as they were.
    """
    config, linears = model.shape, model.linears
    names = model.whole_names()
    for local_name, parameter in model.named_parameters():
        name, split = names[local_name], split_of(parameter)
        parameter.zero_()
        if parameter.dim() == 1:
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            continue
        std = config.init_std
        if name.endswith(("attention.out.weight", "mlp.fc2.weight")):
            std /= math.sqrt(2 * config.num_layers)
        std *= {"embedding.weight": 1.0, "head.weight": width_ratio}.get(name, math.sqrt(width_ratio))
        digest = hashlib.blake2b(f"{seed}|{name}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        shape = tuple(parameter.shape)
        whole = torch.randn(whole_shape(shape, split, linears.tensor_size), generator=generator) * std
        for box in boxes(shape, split, linears.tensor_rank, linears.tensor_size):
            place_box(parameter, box, whole)


def place_box(parameter: Tensor, box: Box, whole: Tensor) -> None:
    """Copy a box of a whole tensor to where a rank has it."""
    parameter[_slices(box.local, box.shape)] = whole[_slices(box.whole, box.shape)].to(parameter)


def _slices(start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))


def parameters_with_names(model: EsoLM) -> Iterator[tuple[str, nn.Parameter]]:
    """(name in the whole network, parameter)."""
    names = model.whole_names()
    for name, parameter in model.named_parameters():
        yield names[name], parameter
