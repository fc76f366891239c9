"""Who does each job of a step on this device: what a run uses, what else was found, and why this one.

A job is attention, the matrices of blocks (`linears`), what is between them (`norms`), adding up their gradients
(`gradients`), what is between the products of the loss, and the optimizer. `train.kernels` names one; what is named and
missing or wrong ends the run.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.distributed as dist

from esolm_megatron.config import Config, ConfigError
from esolm_megatron.model import flash, kernels, loss
from esolm_megatron.model.size import run_capacity
from esolm_megatron.objective.esolm import micro_batch_layout
from esolm_megatron.parallel import groups, main_grad, nvidia_te
from esolm_megatron.parallel.groups import from_first_rank
from esolm_megatron.topology import Topology


def choose(config: Config, topology: Topology, device: torch.device) -> dict[str, str]:
    """Choose for this process, before its network is built; job -> who, and what else there was, for logs.

    Raises:
        ConfigError, KernelError: what `train.kernels` names is not there, or wrong.
    """
    compiled = config.train.compile if config.train.compile is not None else device.type == "cuda"
    return {
        "attention": _attention(config, topology, device),
        "linears": _linears(config, topology, compiled, device),
        "norms": _norms(config, compiled, device),
        "gradients": _gradients(config, topology, device),
        "loss": _loss(config, device),
        "optimizer": _optimizer(config),
    }


def on_this_machine(config: Config) -> dict[str, str]:
    """What `choose` says here for a run of any size, asked by one process that is in no run."""
    p, device = config.parallel, groups.device_of(config)
    groups.join(device, 0, 1, p.timeout_s)
    try:
        world = p.tensor_size * p.pipeline_size * p.context_size
        return choose(config, Topology(0, world, p.tensor_size, p.pipeline_size, p.context_size), device)
    finally:
        dist.destroy_process_group()


def _optimizer(config: Config) -> str:
    adam = f"torch's fused AdamW, DeepSpeed ZeRO {config.parallel.zero_stage}"
    return adam if config.optim.name == "adamw" else f"Muon for the matrices of blocks; {adam}, for the rest"


def _attention(config: Config, topology: Topology, device: torch.device) -> str:
    """One rank times the kernels; the others take its word for what is fastest."""
    wanted, model = config.train.kernels.attention, config.model
    chosen = flash.choose(device, wanted)
    lasting = config.data.cross_document and config.train.precision == "bf16"
    if not kernels.on_gpu(torch.empty(0, device=device)) or not lasting:
        if wanted == "cudnn":
            raise ConfigError(
                "train.kernels.attention = cudnn: it is for calls of a lasting shape, which want train.precision=bf16 and "
                "data.cross_document=true"
            )
        return chosen
    split = topology.tensor_size * topology.context_size
    heads, key_heads = model.num_heads // split, max(model.kv_heads // split, 1)
    calls = flash.padded_calls(micro_batch_layout(config, run_capacity(config)), heads, key_heads, model.head_dim)
    if wanted not in ("auto", "cudnn"):
        return chosen
    times = flash.time_calls(calls, torch.bfloat16, device) if topology.rank == 0 else None
    return "; ".join([chosen, *flash.use(from_first_rank(times, device), calls, wanted=wanted)])


def _norms(config: Config, compiled: bool, device: torch.device) -> str:
    torchs = "torch, compiled" if compiled else "torch"
    if config.train.kernels.norms != "te":
        return torchs
    return f"Transformer Engine's in blocks ({nvidia_te.tried(config, 'norms', device)}); {torchs}, for the others"


def _linears(config: Config, topology: Topology, compiled: bool, device: torch.device) -> str:
    split = topology.tensor_size > 1 or config.parallel.zero_stage == 3 or nvidia_te.wanted(config)
    plain = "torch, compiled with what is between them" if compiled and not split else "megatron-core"
    skip, layers = config.train.fp8_skip_blocks, config.model.num_layers
    if config.train.fp8 == "none":
        return plain
    if config.train.kernels.linears == "te":
        who = f"Transformer Engine's fp8 ({nvidia_te.tried(config, 'linears', device)})"
    else:
        who = f"torchao's fp8, {config.train.fp8}"
    return f"{who}, in blocks {skip} to {layers - skip - 1}; {plain} in the others"


def _gradients(config: Config, topology: Topology, device: torch.device) -> str:
    wanted, split = config.train.kernels.gradients, topology.pipeline_size > 1 or topology.tensor_size > 1
    in_products = (
        config.train.precision == "bf16" and config.parallel.zero_stage < 2 and not config.parallel.offload_optimizer
    )
    if wanted in ("torch", "apex") and not in_products:
        raise ConfigError(
            f"train.kernels.gradients = {wanted}: products add gradients up in bf16 runs of ZeRO 0 and 1 without offload; set auto"
        )
    if wanted == "deepspeed" or not in_products:
        return "DeepSpeed" if config.train.precision == "bf16" or split else "torch and DeepSpeed"
    return main_grad.choose(wanted, device, config.model.hidden_size)


def _loss(config: Config, device: torch.device) -> str:
    wanted = loss.WANTED = config.train.kernels.loss
    there = device.type == "cuda" and find_spec("triton") is not None
    if wanted == "triton" and not there:
        raise ConfigError(
            f"train.kernels.loss = triton: needs a GPU and the package triton, found device {device.type}; set auto"
        )
    return "the project's Triton kernels" if there and wanted != "torch" else "torch"
