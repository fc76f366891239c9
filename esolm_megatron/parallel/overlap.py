"""ZeRO 1 beside the arithmetic: gradients of blocks are reduced during backward, new weights gathered during the next forward.

The matrices of some neighbouring blocks are a bucket: a parameter group of DeepSpeed's bf16 optimizer, which it cuts into
equal pieces over data ranks. When backward leaves a bucket in a step's last micro-batch, its gradients are complete, and
each rank gets the sum of its own piece by one reduce-scatter. After the update one all-gather a bucket brings the weights,
for which the bucket's first block waits. Embeddings, the head and vectors go DeepSpeed's way, all at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime import bf16_optimizer
from torch import Tensor, nn

from esolm_megatron.model.layers import split_of
from esolm_megatron.model.transformer import Block, EsoLM


def neighbours(chunks: Sequence[EsoLM], elements: int) -> list[list[Block]]:
    """Neighbouring blocks that hold `elements` in matrices together, or as few more as can be, in the order of forward."""
    found: list[list[Block]] = []
    for chunk in chunks:
        size = 0
        for block in chunk.layers.values():
            assert isinstance(block, Block)
            if size == 0:
                found.append([])
            found[-1].append(block)
            size += sum(p.numel() for p in matrices(block))
            size = 0 if size >= elements else size
    return found


def matrices(block: Block) -> list[nn.Parameter]:
    """A block's parameters that backward leaves complete on each tensor rank."""
    return [p for p in block.parameters() if p.dim() > 1 and not split_of(p).partial_grad]


class Overlap:
    """Takes the reduction and the gathering of `buckets` from `optimizer`, whose last parameter groups they are."""

    def __init__(self, optimizer: bf16_optimizer.BF16_Optimizer, buckets: Sequence[Sequence[Block]]):
        self.optimizer, first = optimizer, len(optimizer.bf16_groups) - len(buckets)
        self.groups = range(first, len(optimizer.bf16_groups))
        self.rest = range(first)
        self.process_group = optimizer.real_dp_process_group[0]
        self.rank, self.size = dist.get_rank(self.process_group), dist.get_world_size(self.process_group)
        self.complete = False
        """Whether the micro-batch in backward is the last of the step; the schedule says so, see `held`."""
        self.reducing: dict[int, Any] = {}
        self.gathering: dict[int, Any] = {}
        bucketed = {id(gradient) for group in self.groups for gradient in optimizer.fp32_groups_gradients[group]}
        whole = optimizer.get_grads_for_norm
        optimizer.non_expert_gradients = [optimizer.fp32_groups_gradients_flat[group] for group in self.rest]

        def gradients_for_norm(for_clipping: bool = False) -> Any:
            if for_clipping:
                return whole(for_clipping=True)
            others = [gradient for gradient in whole()[0] if id(gradient) not in bucketed]
            return [*others, self._norm()], {}

        optimizer.get_grads_for_norm = gradients_for_norm
        optimizer.update_lp_params = self.publish
        for group, blocks in zip(self.groups, buckets, strict=True):
            for block in blocks:
                block.register_forward_pre_hook(partial(self._entered, group, block is blocks[0]))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Around all micro-batches but the last, as megatron-core's schedules enter `no_sync_func`."""
        self.complete = False
        try:
            yield
        finally:
            self.complete = True

    def _entered(self, group: int, lowest: bool, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        if (work := self.gathering.pop(group, None)) is not None:
            work.wait()
        x: Tensor = inputs[0]
        if lowest and torch.is_grad_enabled() and x.requires_grad:
            x.register_hook(partial(self._left, group))

    def _left(self, group: int, gradient: Tensor) -> None:
        """Backward has gone through a bucket's blocks: gradients of parameters come before those of their block's input."""
        if self.complete:
            self._reduce(group)

    def _reduce(self, group: int) -> None:
        if group not in self.reducing:
            whole = self.optimizer.fp32_groups_gradients_flat[group]
            own = self.optimizer.fp32_groups_gradient_flat_partition[group]
            self.reducing[group] = dist.reduce_scatter_tensor(own, whole, group=self.process_group, async_op=True)

    def finish(self) -> None:
        """Gradients of this rank's pieces become means over the data ranks; ask after a step's last backward."""
        for group in reversed(self.groups):  # what backward did not pass
            self._reduce(group)
        for group, work in self.reducing.items():
            work.wait()
            self.optimizer.fp32_groups_gradient_flat_partition[group].mul_(1.0 / self.size)
        self.reducing.clear()
        self.complete = False

    def _norm(self) -> Tensor:
        """(1,) fp32: the norm of the buckets over all data ranks, each of which has a part."""
        own = [self.optimizer.fp32_groups_gradient_flat_partition[group] for group in self.groups]
        squares = torch.stack(torch._foreach_norm(own)).square().sum()[None]
        dist.all_reduce(squares, group=self.process_group)
        return squares.sqrt()

    def publish(self) -> None:
        """Round master weights to the network's and gather them: buckets arrive later, see `arrive`."""
        optimizer = self.optimizer
        self.arrive()
        for own, master in zip(optimizer.bf16_partitioned_groups, optimizer.fp32_groups_flat_partition, strict=True):
            own[self.rank].data.copy_(master.data)
        for group in (*self.rest, *self.groups):
            whole, own = (
                optimizer.bf16_groups_flat[group].data,
                optimizer.bf16_partitioned_groups[group][self.rank].data,
            )
            self.gathering[group] = dist.all_gather_into_tensor(whole, own, group=self.process_group, async_op=True)
        for group in self.rest:
            self.gathering.pop(group).wait()

    def arrive(self) -> None:
        """Wait for weights that are under way; only blocks do so by themselves."""
        while self.gathering:
            self.gathering.popitem()[1].wait()
