"""Which layouts are legal, and why the others are refused. Most of the refused ones would train, silently, something else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_FREED = "parallel.deallocate_pipeline_outputs = true: interleaved over gloo it sends freed memory; set it to false"


def layout_problems(c: Any) -> Iterator[str]:
    """What is wrong with how a run is split, whatever the number of processes."""
    yield from _tensor_and_context_problems(c)
    yield from _stage_problems(c)
    yield from _zero_problems(c.parallel)
    p = c.parallel
    if p.offload_activations and p.recompute != "full":
        yield f"parallel.offload_activations = true: recompute = {p.recompute} keeps more than blocks' inputs; set recompute=full"
    if p.virtual_pipeline_size > 1 and p.batch_p2p_comm and p.pipeline_size == 2:
        yield "parallel.batch_p2p_comm = true: with 2 interleaved stages messages are swapped in silence; set it to false or null"
    if p.virtual_pipeline_size > 1 and p.deallocate_pipeline_outputs and c.train.device == "cpu":
        yield _FREED
    micro_batches = c.train.global_batch_size // c.train.micro_batch_size
    if p.virtual_pipeline_size > 1 and micro_batches % p.pipeline_size:
        found = f"interleaving needs a multiple of parallel.pipeline_size = {p.pipeline_size} micro-batches, found {micro_batches}"
        yield f"train.global_batch_size = {c.train.global_batch_size}: {found}"


def _tensor_and_context_problems(c: Any) -> Iterator[str]:
    m, p = c.model, c.parallel
    tp, cp = p.tensor_size, p.context_size
    for name, value in (("num_heads", m.num_heads), ("num_kv_heads", m.num_kv_heads), ("ffn_hidden_size", m.ffn_size)):
        if value is not None and value % tp:
            yield f"parallel.tensor_size = {tp}: must divide model.{name} = {value}"
    yield from _head_problems(m, tp, cp)
    if p.sequence_parallel and tp == 1:
        yield "parallel.sequence_parallel = true: needs parallel.tensor_size of 2 or more; set it to false"
    cut = cp * (tp if p.sequence_parallel else 1)
    if m.seq_length % cut:
        names = {(True, False): "sequence parallelism needs a multiple of parallel.tensor_size",
                 (False, True): "context parallelism needs a multiple of parallel.context_size",
                 (True, True): "sequence and context parallelism need a multiple of tensor_size x context_size"}  # fmt: skip
        yield f"model.seq_length = {m.seq_length}: {names[p.sequence_parallel, cp > 1]} = {cut}"


def _head_problems(m: Any, tp: int, cp: int) -> Iterator[str]:
    """Inside attention a context rank's query heads are those of whole key-value heads, or share a single one."""
    if m.num_heads % tp or m.kv_heads % tp:
        return  # told already
    heads, shared = m.num_heads // tp, m.kv_heads // tp
    fits = [n for n in range(1, heads + 1) if heads % n == 0 and (shared % n == 0 or n % shared == 0)]
    if cp not in fits:
        why = f"it must divide the {shared} key-value heads of a tensor rank, or be a multiple of them"
        if heads % cp:
            why = f"times tensor_size = {tp} it must divide model.num_heads = {m.num_heads}"
        yield f"parallel.context_size = {cp}: {why}; use one of {fits}"


def _stage_problems(c: Any) -> Iterator[str]:
    layers, p = c.model.num_layers, c.parallel
    pp, vp, given = p.pipeline_size, p.virtual_pipeline_size, p.layers_per_stage
    if vp > 1 and pp == 1:
        yield f"parallel.virtual_pipeline_size = {vp}: needs parallel.pipeline_size of 2 or more; set it to 1"
    elif layers < pp * vp:
        yield (
            f"model.num_layers = {layers}: each of pipeline_size x virtual_pipeline_size = {pp} x {vp} chunks needs a layer; "
            "use fewer chunks"
        )
    elif given is not None and len(given) != pp:
        yield f"parallel.layers_per_stage = {list(given)}: must have parallel.pipeline_size = {pp} entries"
    elif given is not None and sum(given) != layers:
        yield f"parallel.layers_per_stage = {list(given)}: adds up to {sum(given)}, but model.num_layers = {layers}"
    elif given is not None and min(given) < vp:
        yield f"parallel.layers_per_stage = {list(given)}: each stage needs a layer for each of its {vp} chunks"


def _zero_problems(p: Any) -> Iterator[str]:
    stage = p.zero_stage
    if stage >= 2 and p.pipeline_size > 1:
        yield f"parallel.zero_stage = {stage}: with pipeline stages it hangs (3) or corrupts gradients (2); use zero_stage=1"
    if p.offload_optimizer and stage == 0:
        yield "parallel.offload_optimizer = true: ZeRO 0 keeps every state on every rank; use zero_stage=1 or more"
    if p.offload_parameters and stage < 3:
        yield f"parallel.offload_parameters = true: zero_stage = {stage} keeps whole weights on the device; use zero_stage=3"
    elif p.offload_parameters and not p.offload_optimizer:
        yield "parallel.offload_parameters = true: the update needs them beside the optimizer; set offload_optimizer=true"


def world_problems(config: Any, world_size: int, device: str) -> list[str]:
    """What is wrong with running `config` on `world_size` processes of `device`; empty when nothing is."""
    p, t, out = config.parallel, config.train, []
    model_size = p.tensor_size * p.context_size * p.pipeline_size
    if world_size % model_size:
        names, sizes = "tensor_size x pipeline_size", f"{p.tensor_size} x {p.pipeline_size}"
        if p.context_size > 1:
            names, sizes = f"{names} x context_size", f"{sizes} x {p.context_size}"
        return [
            f"world size = {world_size}: must be a multiple of parallel.{names} = {sizes}; "
            f"start {-(-world_size // model_size) * model_size} processes or change the sizes"
        ]
    data_size = world_size // model_size
    per_step = t.micro_batch_size * data_size
    if t.global_batch_size % per_step:
        out.append(
            f"train.global_batch_size = {t.global_batch_size}: must be a multiple of micro_batch_size x data-parallel size = "
            f"{t.micro_batch_size} x {data_size}"
        )
    elif p.virtual_pipeline_size > 1 and (t.global_batch_size // per_step) % p.pipeline_size:
        out.append(
            f"train.global_batch_size = {t.global_batch_size}: leaves {t.global_batch_size // per_step} micro-batches to a rank, "
            f"but interleaving needs a multiple of parallel.pipeline_size = {p.pipeline_size}"
        )
    if device == "cpu" and p.virtual_pipeline_size > 1 and p.deallocate_pipeline_outputs:
        out.append(_FREED)
    return out
