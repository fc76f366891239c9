"""Process groups: torch.distributed and megatron-core's grid, on GPUs over NCCL or on CPUs over gloo.

Everything that differs between the two is here and in `TorchOnCpu`.
"""

from __future__ import annotations

import datetime
import os
from typing import Any

import megatron.core.parallel_state as ps
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules

from esolm_megatron.config import Config, ConfigError, world_problems
from esolm_megatron.topology import Topology


class TorchOnCpu:
    """The torch module as megatron-core's schedules see it without a GPU: `device="cuda"` means the CPU there."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        """torch.zeros on the CPU."""
        return torch.zeros(*args, device="cpu", **kwargs)


def device_of(config: Config) -> torch.device:
    """The device that this process trains on.

    Raises:
        ConfigError: a GPU is asked for, but this machine shows none.
    """
    wanted, there = config.train.device, torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise ConfigError(
            "train.device = cuda: torch sees no GPU here; set train.device=cpu or auto, or see esolm doctor"
        )
    if wanted == "cpu" or not there:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def from_first_rank(value: Any, device: torch.device) -> Any:
    """The first rank's `value`, which pickles, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, device=device)
    return box[0]


def start(config: Config) -> tuple[Topology, torch.device]:
    """Join the run, or stay in it: this process's coordinates and device. Reads RANK and WORLD_SIZE as torchrun and srun set them.

    Raises:
        ConfigError: the number of processes does not fit the configuration.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = device_of(config)
    problems = world_problems(config, world_size, device.type)
    if problems:
        raise ConfigError("\n".join(problems))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif torch.cuda.is_available():
        raise ConfigError(
            "train.device = cpu: on a machine with GPUs hide them, CUDA_VISIBLE_DEVICES='', or use device=auto"
        )
    else:
        torch.cuda.current_device = lambda: device  # type: ignore[assignment,return-value]
        schedules.torch = TorchOnCpu()
    if not dist.is_initialized():
        join(device, rank, world_size, config.parallel.timeout_s)
    sizes = config.parallel
    if not ps.model_parallel_is_initialized():
        ps.initialize_model_parallel(
            tensor_model_parallel_size=sizes.tensor_size,
            pipeline_model_parallel_size=sizes.pipeline_size,
            virtual_pipeline_model_parallel_size=sizes.virtual_pipeline_size
            if sizes.virtual_pipeline_size > 1
            else None,
            context_parallel_size=sizes.context_size,
            create_gloo_process_groups=False,
        )
    topology = Topology(rank, world_size, sizes.tensor_size, sizes.pipeline_size, sizes.context_size)
    assert topology.context_rank == ps.get_context_parallel_rank()
    assert topology.tensor_rank == ps.get_tensor_model_parallel_rank()
    assert topology.stage == ps.get_pipeline_model_parallel_rank()
    assert topology.data_rank == ps.get_data_parallel_rank()
    return topology, device


def join(device: torch.device, rank: int, world_size: int, timeout_s: float) -> None:
    """Become one of `world_size` processes that talk over NCCL or gloo; a lone one needs no address."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed wants it even of a lone process
    options: dict[str, Any] = {"timeout": datetime.timedelta(seconds=timeout_s)}
    if device.type == "cuda":
        options["device_id"] = device
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        options["store"] = dist.HashStore()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=world_size, **options)


def stop() -> None:
    """Leave the run."""
    LoneUnit.group = None
    ps.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


class ModelParallelUnit:
    """What DeepSpeed asks of an `mpu`, answered from megatron-core's groups."""

    get_data_parallel_group = staticmethod(lambda: ps.get_data_parallel_group(with_context_parallel=True))
    get_data_parallel_rank = staticmethod(lambda: ps.get_data_parallel_rank(with_context_parallel=True))
    get_data_parallel_world_size = staticmethod(lambda: ps.get_data_parallel_world_size(with_context_parallel=True))
    get_tensor_model_parallel_group = staticmethod(ps.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(ps.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(ps.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_src_rank = staticmethod(ps.get_tensor_model_parallel_src_rank)
    get_pipeline_model_parallel_group = staticmethod(ps.get_pipeline_model_parallel_group)
    get_pipeline_model_parallel_rank = staticmethod(ps.get_pipeline_model_parallel_rank)
    get_pipeline_model_parallel_world_size = staticmethod(ps.get_pipeline_model_parallel_world_size)
    get_model_parallel_group = staticmethod(ps.get_model_parallel_group)

    @classmethod
    def get_data_parallel_group_ranks(cls) -> list[int]:
        """Global ranks of the replicas of this piece of the model."""
        return dist.get_process_group_ranks(cls.get_data_parallel_group())

    @classmethod
    def get_data_parallel_src_rank(cls) -> int:
        """The first of them."""
        return cls.get_data_parallel_group_ranks()[0]

    @classmethod
    def get_model_parallel_world_size(cls) -> int:
        """Ranks that hold one whole model."""
        return ps.get_tensor_model_parallel_world_size() * ps.get_pipeline_model_parallel_world_size()

    @classmethod
    def get_model_parallel_rank(cls) -> int:
        """Stage-major place among them."""
        tensor = ps.get_tensor_model_parallel_world_size()
        return ps.get_pipeline_model_parallel_rank() * tensor + ps.get_tensor_model_parallel_rank()


class LoneUnit(ModelParallelUnit):
    """The same for an optimizer that every data rank holds whole (ZeRO 0): each is its own data-parallel group."""

    group: Any = None

    @classmethod
    def get_data_parallel_group(cls) -> Any:
        """A group of this process alone; made once per run."""
        if cls.group is None:
            cls.group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        return cls.group

    @staticmethod
    def get_data_parallel_rank() -> int:
        """0."""
        return 0

    @staticmethod
    def get_data_parallel_world_size() -> int:
        """1."""
        return 1
