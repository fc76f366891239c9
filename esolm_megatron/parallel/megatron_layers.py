"""megatron-core's split layers behind the `Linears` protocol, and its configuration object."""

from __future__ import annotations

from typing import Any, Literal

import megatron.core.parallel_state as ps
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel as tp
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from esolm_megatron.config import Config
from esolm_megatron.model.layers import Split, mark
from esolm_megatron.parallel.float8 import Product
from esolm_megatron.topology import Topology, padded_vocab

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def megatron_config(config: Config, device: torch.device) -> TransformerConfig:
    """What megatron-core's layers and schedules read."""
    m, p, dtype = config.model, config.parallel, DTYPES[config.train.precision]
    interleaved = p.virtual_pipeline_size > 1
    batched = p.batch_p2p_comm if p.batch_p2p_comm is not None else not interleaved
    return TransformerConfig(
        num_layers=p.pipeline_size * p.virtual_pipeline_size,  # read by its checks only, which refuse uneven stages
        hidden_size=m.hidden_size,
        num_attention_heads=m.num_heads,
        num_query_groups=m.kv_heads,
        ffn_hidden_size=m.ffn_size,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=p.tensor_size,
        context_parallel_size=p.context_size,
        pipeline_model_parallel_size=p.pipeline_size,
        virtual_pipeline_model_parallel_size=p.virtual_pipeline_size if interleaved else None,
        sequence_parallel=p.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=device.type == "cpu",
        perform_initialization=False,
        batch_p2p_comm=batched,
        batch_p2p_sync=False,
        overlap_p2p_comm=interleaved and not batched,
        deallocate_pipeline_outputs=p.deallocate_pipeline_outputs,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


class _Column(tp.ColumnParallelLinear):
    fp8: Product | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8 is None or not torch.is_grad_enabled():
            return super().forward(x)[0]
        gather = (
            tp.gather_from_sequence_parallel_region
            if self.sequence_parallel
            else tp.copy_to_tensor_model_parallel_region
        )
        return self.fp8(gather(x), self.weight, self.bias)


class _Row(tp.RowParallelLinear):
    fp8: Product | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8 is None or not torch.is_grad_enabled():
            return super().forward(x.contiguous())[0]  # up to 0.18 the reduction skips non-contiguous input in silence
        add = tp.reduce_from_tensor_model_parallel_region
        if self.sequence_parallel:
            add = tp.reduce_scatter_to_sequence_parallel_region
        y = add(self.fp8(x, self.weight, None))
        return y if self.bias is None else y + self.bias


class MegatronLinears:
    """Layers cut over the tensor-parallel ranks."""

    def __init__(self, megatron: TransformerConfig, topology: Topology, device: torch.device):
        self.megatron, self.device = megatron, device
        self.tensor_size, self.tensor_rank = topology.tensor_size, topology.tensor_rank
        self.sequence_parallel = megatron.sequence_parallel

    def column(self, in_features: int, out_features: int, *, bias: bool, blocks: int = 1) -> nn.Module:
        """ColumnParallelLinear; the caller's `blocks` fused matrices are cut one by one by whoever fills them."""
        options: dict[str, Any] = {"gather_output": False, "init_method": None, "bias": bias}
        layer = _Column(in_features, out_features, config=self.megatron, **options)
        mark(layer.weight, Split(0, blocks))
        if bias:
            mark(layer.bias, Split(0, blocks))
        return layer

    def row(self, in_features: int, out_features: int, *, bias: bool) -> nn.Module:
        """RowParallelLinear; under sequence parallelism its bias sees only this rank's tokens."""
        options: dict[str, Any] = {"input_is_parallel": True, "init_method": None, "bias": bias, "skip_bias_add": False}
        layer = _Row(in_features, out_features, config=self.megatron, **options)
        mark(layer.weight, Split(1))
        if bias:
            mark(layer.bias, Split(partial_grad=self.sequence_parallel))
        return layer

    def vocab_rows(self, vocab_size: int) -> int:
        """This rank's share of the padded vocabulary."""
        return padded_vocab(vocab_size, self.tensor_size) // self.tensor_size

    def vocab_embedding(self, vocab_size: int, hidden_size: int) -> nn.Module:
        """VocabParallelEmbedding."""
        padded = self.vocab_rows(vocab_size) * self.tensor_size
        layer = tp.VocabParallelEmbedding(padded, hidden_size, init_method=None, config=self.megatron)
        mark(layer.weight, Split(0, whole_size=vocab_size))
        return layer

    def copy_to_ranks(self, x: Tensor) -> Tensor:
        """Identity; all-reduce in backward."""
        return tp.copy_to_tensor_model_parallel_region(x)

    def scatter_tokens(self, x: Tensor) -> Tensor:
        """This rank's tokens, in memory of their own: megatron-core's are a view, which would keep those of all ranks."""
        return tp.scatter_to_sequence_parallel_region(x).clone() if self.sequence_parallel else x

    def gather_tokens(self, x: Tensor) -> Tensor:
        """All tokens; in backward this rank's part of a gradient that is already whole."""
        if not self.sequence_parallel:
            return x
        return tp.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False)

    def own_tokens(self, per_token: Tensor) -> Tensor:
        """This rank's entries."""
        if not self.sequence_parallel:
            return per_token
        return per_token.chunk(self.tensor_size)[self.tensor_rank]

    def over_ranks(self, x: Tensor, how: Literal["max", "sum"]) -> Tensor:
        """x reduced in place over the tensor ranks, if there are several."""
        if self.tensor_size == 1:
            return x
        dist.all_reduce(
            x, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM, ps.get_tensor_model_parallel_group()
        )
        return x

    def empty(self, *shape: int) -> nn.Parameter:
        """An uninitialised parameter."""
        return nn.Parameter(torch.empty(*shape, dtype=self.megatron.params_dtype, device=self.device))
