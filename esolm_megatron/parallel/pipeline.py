"""One pass of a step's micro-batches through all pipeline stages, by megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import megatron.core.parallel_state as ps
import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from esolm_megatron.config import Config
from esolm_megatron.model.layers import Linears
from esolm_megatron.model.size import layers_of_stages
from esolm_megatron.model.transformer import EsoLM, initialise
from esolm_megatron.objective.esolm import PackedBatch, mean_loss, part_sums, token_counts
from esolm_megatron.parallel import float8, nvidia_te
from esolm_megatron.parallel.context import ContextAttention, ContextLastBlock
from esolm_megatron.parallel.main_grad import AccumulatingLinears
from esolm_megatron.parallel.megatron_layers import DTYPES, MegatronLinears
from esolm_megatron.topology import Topology, layers_of_chunk


def build_chunks(config: Config, megatron: TransformerConfig, topology: Topology, device: torch.device) -> list[EsoLM]:
    """This stage's chunks of the network, initialised from config.seed."""
    compiled = config.train.compile if config.train.compile is not None else device.type == "cuda"
    linears: Linears = MegatronLinears(megatron, topology, device)
    # ZeRO 3 fetches weights around calls of modules, and megatron-core's layers are not one graph
    apart = topology.tensor_size > 1 or config.parallel.zero_stage == 3 or nvidia_te.wanted(config)
    if compiled and not apart:
        linears = AccumulatingLinears(DTYPES[config.train.precision], device, pad_vocab=True)
    num_stages, num_chunks = topology.pipeline_size, config.parallel.virtual_pipeline_size
    stages = layers_of_stages(config)
    chunks = []
    for chunk in range(num_chunks):
        model = EsoLM(
            config.model,
            linears,
            layers=layers_of_chunk(stages, topology.stage, chunk, num_chunks),
            first=topology.stage == 0 and chunk == 0,
            last=topology.stage == num_stages - 1 and chunk == num_chunks - 1,
            recompute=config.parallel.recompute,
            offload=config.parallel.offload_activations,
        )
        initialise(model, config.seed, config.optim.width_ratio(config.model.hidden_size))
        if config.train.kernels.linears != "te":
            float8.attach(model, config, device.type, compiled=compiled and apart)
        if compiled:
            model.compile_blocks(cuda_graphs=config.train.cuda_graphs, apart=apart)
        nvidia_te.attach(model, config)
        # what megatron-core's schedules look up on a model
        model.config, model.model_type = megatron, ModelType.encoder_or_decoder  # type: ignore[assignment]
        model.vp_stage = chunk if num_chunks > 1 else None  # type: ignore[assignment]
        chunks.append(model)
    return chunks


Outcome = Callable[[Tensor, PackedBatch], tuple[Tensor, Tensor]]
"""Last stage's output and its micro-batch -> (what is differentiated, what is kept)."""


def loss_outcome(num_valid: Tensor, scale: float) -> Outcome:
    """The loss of a context rank's part of a micro-batch, and its (2,) sums over the parts of the loss.

    num_valid: (2,) over the whole global batch. Context ranks need no factor: megatron-core multiplies the loss by their
    number, and ZeRO's mean over data and context ranks divides by it.
    """

    def outcome(losses: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        sums = part_sums(losses, batch)
        return mean_loss(sums, num_valid) * scale, sums.detach()

    return outcome


def logits_outcome(logits: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Keep a copy of the logits."""
    return logits.new_zeros(()), logits.detach().clone()


def run(
    chunks: Sequence[EsoLM],
    batches: Sequence[PackedBatch],
    outcome: Outcome,
    *,
    forward_only: bool,
    want_logits: bool = False,
    num_valid: Tensor | None = None,
    through: Callable[..., Tensor] | None = None,
) -> list[Tensor]:
    """What `outcome` kept of each micro-batch, on the last stage; an empty list elsewhere.

    batches: this context rank's shares of micro-batches of one layout, on the device. Gradients are added up in the
    parameters unless forward_only. num_valid: (2,) of the whole global batch, from which it
    is known what each token counts. through: called in a chunk's place where ZeRO gathers weights or cuts gradients.
    """
    layout = batches[0].layout

    group = ps.get_context_parallel_group() if ps.get_context_parallel_world_size() > 1 else None

    def forward_step(iterator: Iterator[PackedBatch], model: EsoLM) -> tuple[Tensor, Any]:
        batch = next(iterator)
        assert batch.layout == layout, "micro-batches of a step share one static layout"
        output = (through or model)(
            batch.tokens,
            batch.positions,
            batch.attend if group is None else ContextAttention(batch.attend, group),
            places=batch.places,
            targets=None if want_logits else batch.targets,
            counts=None if num_valid is None else token_counts(batch, num_valid),
            dropout_ids=None if forward_only else batch.dropout_ids,
            last=None if want_logits else batch.last if group is None else ContextLastBlock(batch.last, group),
        )
        return output, lambda tensor: outcome(tensor, batch)

    iterators = [iter(batches) for _ in chunks]
    with torch.set_grad_enabled(not forward_only):
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=len(batches),
            seq_length=layout.num_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )
