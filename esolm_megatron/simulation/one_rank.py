"""One rank of a world of any size: the real engine builds itself and does a step, on tensors without memory, among ranks that
are not there.

torch's fake process group answers each collective at once; fake tensors have shapes and types, and no data. So what is run is
what a cluster runs (network, ZeRO's partitions, megatron-core's schedules), in a second or some. What it computes is worthless;
what it allocates and sends is not: as on a GPU, see as_gpu.py.

`python -m esolm_megatron.simulation.one_rank RUN.yaml WORLD_SIZE RANK ...` writes what each found as a line of JSON.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import inspect
import itertools
import json
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from esolm_megatron.config import Config, load, with_values
from esolm_megatron.config.tree import KernelsConfig
from esolm_megatron.model.size import run_capacity
from esolm_megatron.objective.esolm import Noised, draw_step
from esolm_megatron.plan.memory import compiled
from esolm_megatron.simulation.as_gpu import as_on_a_gpu, take_a_gpus_branches
from esolm_megatron.topology import Topology

COLLECTIVES = (
    "all_reduce", "broadcast", "reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor",
    "all_to_all", "all_to_all_single", "gather", "scatter", "barrier", "broadcast_object_list", "all_gather_object",
)  # fmt: skip
MESSAGES = ("isend", "irecv", "send", "recv")


class Live(TorchDispatchMode):
    """Bytes of all storages that operators have made and nobody has let go of, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.bytes, self.peak = WeakIdKeyDictionary(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run the operator, and look at what it gave."""
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type != "meta":  # which DeepSpeed keeps for shapes
                self._look(x.untyped_storage())
        return out

    def _look(self, storage) -> None:
        if storage in self.seen:
            return
        size = storage.nbytes()
        self.seen[storage] = size
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.bytes -= size


def _short(ranks: list[int]) -> str:
    """Ranks of a group: first, last and step where they have one."""
    steps = {b - a for a, b in itertools.pairwise(ranks)}
    return f"{ranks[0]} to {ranks[-1]} by {steps.pop()}" if len(steps) == 1 else ", ".join(map(str, ranks))


class Sent:
    """Each collective and message, as [operation, its ranks, bytes]."""

    def __init__(self, rank: int):
        """Notes from now on, for good: libraries keep what they find of torch.distributed when they are imported."""
        self.rank, self.log = rank, list[list[Any]]()
        for name in (*COLLECTIVES, *MESSAGES):
            noting = self._noting(name, getattr(dist, name))
            for module in (dist, c10d):  # one function in both: a message is compared with what c10d calls so
                setattr(module, name, noting)

    def taken(self) -> list[list[Any]]:
        """What was noted since this was last asked."""
        log, self.log = self.log, []
        return log

    def _noting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def noted(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            size = sum(
                x.numel() * x.element_size() for x in tree_leaves(list(given.values())) if isinstance(x, torch.Tensor)
            )
            if name in MESSAGES:
                key = next(key for key in ("dst", "src", "group_dst", "group_src") if given.get(key) is not None)
                peer, group = given[key], given.get("group")
                peer = dist.get_global_rank(group, peer) if key.startswith("group_") and group is not None else peer
                ends = [self.rank, peer] if "send" in name else [peer, self.rank]
                self.log.append(["message", "{} -> {}".format(*ends), size])
            else:
                group = given.get("group")
                ranks = dist.get_process_group_ranks(group) if group is not None else list(range(dist.get_world_size()))
                self.log.append([name, _short(ranks), size])
            return function(*args, **kwargs)

        return noted


@contextmanager
def without_memory(fake: FakeTensorMode) -> Iterator[None]:
    """Tensors made inside have no data. Where the code asks for a number it gets 1, and for a flag no."""
    scalar = torch.ops.aten._local_scalar_dense.default
    before, to = fake_impls.op_implementations_dict.get(scalar), torch.nn.Module.to
    skip_init = torch.nn.utils.skip_init

    def one(mode, function, x):
        if x.dtype in (torch.bool, torch.uint8):  # as of what overflowed
            return False
        return 1.0 if x.dtype.is_floating_point else 1

    fake_impls.op_implementations_dict[scalar] = one
    torch.nn.Module.to = lambda self, *args, **kwargs: self  # type: ignore[assignment,method-assign]
    torch.nn.utils.skip_init = lambda kind, *args, **kwargs: kind(*args, **kwargs)  # moving to a device fails
    try:
        with fake:
            yield
    finally:
        fake_impls.op_implementations_dict[scalar] = before
        torch.nn.Module.to = to  # type: ignore[method-assign]
        torch.nn.utils.skip_init = skip_init


def batch_of(config: Config, topology: Topology) -> Noised:
    """A rank's share of the first step, of tokens that mean nothing."""
    m, t, size = config.model, config.train, topology.data_size
    rows = np.arange(topology.data_rank, t.global_batch_size, size)
    tokens = np.zeros((len(rows), m.seq_length), np.int64)
    return draw_step(
        tokens, np.ones(tokens.shape, bool), rows, config.objective, mask_id=m.mask_id, global_batch_size=t.global_batch_size,
        num_micro_batches=t.global_batch_size // (t.micro_batch_size * size), capacity=run_capacity(config), key=(config.seed, 0),
    )  # fmt: skip


def simulate(config: Config, rank: int, world_size: int) -> dict[str, Any]:
    """What a rank allocates and sends while it builds itself and does one step, of as many micro-batches as fill its pipeline.

    weights, gradients, optimizer: bytes that it holds between steps. activations: the most beyond them in forward and
    backward. built, step: what was called then, see `Sent`.
    """
    p = config.parallel
    topology = Topology(rank, world_size, p.tensor_size, p.pipeline_size, p.context_size)
    each = config.train.micro_batch_size * topology.data_size
    count = min(config.train.global_batch_size // each, 2 * p.pipeline_size)
    take_a_gpus_branches(compiled(config))
    here = {  # what changes no call
        "device": "cpu",
        "compile": compiled(config),
        "fp8": "none",
        "cuda_graphs": False,
        "kernels": KernelsConfig().model_dump(),
    }
    config = with_values(
        config, train={**here, "global_batch_size": count * each}, parallel={"deallocate_pipeline_outputs": False}
    )
    noised = batch_of(config, topology)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    sent = _listening(rank)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    from esolm_megatron.parallel.engine import Engine

    as_on_a_gpu(frees_outputs=p.deallocate_pipeline_outputs)
    live, fake = Live(), FakeTensorMode(allow_non_fake_inputs=True)  # one: another would have storages of its own
    with without_memory(fake), live:
        engine = Engine(config)
    staged, built, held = engine.stage(noised), sent.taken(), live.bytes
    with without_memory(fake), live:
        live.peak = held
        engine.forward_backward(staged)
        passes = live.peak
        engine.state.step(1e-3)
    weights = sum(x.numel() * x.element_size() for chunk in engine.chunks for x in chunk.parameters())
    gradients = 4 * sum(o.parameter.numel() for o in engine.owned) if p.zero_stage < 2 else 0
    found = {"rank": rank, "stage": topology.stage, "micro_batches": count, "weights": weights, "gradients": gradients}
    found |= {"optimizer": live.bytes - weights - gradients, "activations": passes - held}
    return found | {"built": built, "step": sent.taken()}


def _listening(rank: int) -> Sent:
    """The one `Sent` of this process, made before what keeps functions of torch.distributed is imported."""
    global _SENT  # noqa: PLW0603
    if _SENT is None:
        # objects of other ranks would be made of what is in memory
        dist.broadcast_object_list = c10d.broadcast_object_list = _nothing_broadcast
        _SENT = Sent(rank)
    _SENT.rank = rank
    return _SENT


_SENT: Sent | None = None


def _nothing_broadcast(object_list: list[Any], src: Any = None, group: Any = None, device: Any = None) -> None: ...


def main(path: str, world_size: str, *ranks: str) -> int:
    """Simulate the ranks one after the other, and print what each found as a line of JSON."""
    config = load(path, [])
    _listening(0)
    import esolm_megatron.parallel.engine  # noqa: F401  seconds, once for all ranks

    for rank in ranks:
        if child := os.fork():  # a rank's groups and patches are its process' for good
            _, status = os.waitpid(child, 0)
            if code := os.waitstatus_to_exitcode(status):
                if code < 0:
                    sys.stderr.write(f"\nrank {rank} of {world_size} was killed by signal {-code}\n")
                return abs(code)
            continue
        code = 1
        try:
            found = simulate(config, int(rank), int(world_size))
            sys.stdout.write("\n" + json.dumps(found) + "\n")
            sys.stdout.flush()
            code = 0
        except BaseException as error:
            sys.stderr.write(f"\nrank {rank} of {world_size} cannot be simulated: {error}\n")
            sys.stderr.flush()
        os._exit(code)  # nothing here is worth tearing down
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
