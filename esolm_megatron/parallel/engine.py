"""The engine: the trainer hands it noised micro-batches and gets losses; it alone knows ranks, stages and shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import megatron.core.parallel_state as ps
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from esolm_megatron.checkpoint import Checkpoint, Piece
from esolm_megatron.config import Config
from esolm_megatron.objective.esolm import Noised, OrderedRows, PackedBatch, mean_loss, pack
from esolm_megatron.parallel import groups, pipeline, zero
from esolm_megatron.parallel.context import own_share
from esolm_megatron.parallel.layers import megatron_config
from esolm_megatron.parallel.zero_state import ZeroState
from esolm_megatron.topology import padded_vocab


@dataclass(frozen=True)
class StepResult:
    """A step's loss per token over the global batch, its diffusion and sequential parts, and the gradient norm."""

    loss: float
    diffusion: float
    sequential: float
    grad_norm: float


class Engine:
    """A model that is split over processes, with its optimizer."""

    def __init__(self, config: Config):
        """Join the run that the environment describes, and build this rank's share from config.seed."""
        self.config = config
        self.topology, self.device = groups.start(config)
        megatron = megatron_config(config, self.device)
        self.chunks = pipeline.build_chunks(config, megatron, self.topology, self.device)
        self.owned = zero.owned_parameters(config, self.chunks, self.topology)
        self.deepspeed = zero.build(config, self.chunks, self.owned)
        self.state = ZeroState(self.deepspeed, self.owned, self.topology, config.optim.ema_decay)

    @property
    def is_first_rank(self) -> bool:
        """Whether this process writes what exists once in a run."""
        return self.topology.rank == 0

    @property
    def _reports(self) -> bool:
        """On each replica's last stage, the first tensor rank of each context rank, which alone saw its tokens."""
        return self.topology.stage == self.topology.pipeline_size - 1 and self.topology.tensor_rank == 0

    def forward_backward(self, noised: Noised) -> Tensor:
        """Add up gradients of one global batch, of which `noised` is this rank's share.

        Returns the global (3,) fp64: loss, diffusion part, sequential part, each per valid token of its rows.
        """
        num_valid = self._over_replicas(noised.num_valid)
        scale = len(noised.micro_batches) * self.topology.data_size  # the schedule and DeepSpeed take means
        kept = self._run(noised.micro_batches, pipeline.loss_outcome(num_valid, scale), forward_only=False)
        if self.config.parallel.zero_stage < 2:  # the others are finished as they come
            zero.finish_gradients(self.config, self.chunks, self.state.gradients(), self.topology)
        return self._report(kept, num_valid)

    def _run(self, batches: list[PackedBatch], outcome: pipeline.Outcome, **options: bool) -> list[Tensor]:
        """`pipeline.run` on this context rank's share of whole micro-batches."""
        rank, size = self.topology.context_rank, self.topology.context_size
        shares = [own_share(batch, rank, size).to(self.device) for batch in batches]
        through = self.deepspeed if self.config.parallel.zero_stage >= 2 else None
        return pipeline.run(self.chunks, shares, outcome, through=through, **options)  # type: ignore[arg-type]

    def train_step(self, noised: Noised, lr: float) -> StepResult:
        """One optimizer step on a global batch."""
        loss, diffusion, sequential = self.forward_backward(noised).tolist()
        return StepResult(loss, diffusion, sequential, self.state.step(lr))

    def evaluate(self, noised: Noised) -> tuple[Tensor, Tensor]:
        """(2,) fp64 weighted loss sums of both parts over all replicas, and the (2,) valid tokens they belong to."""
        num_valid = self._over_replicas(noised.num_valid)
        kept = self._run(noised.micro_batches, pipeline.loss_outcome(num_valid, 1.0), forward_only=True)
        return self._sums(kept), num_valid

    def _over_replicas(self, counts: Tensor) -> Tensor:
        total = counts.to(self.device, copy=True)  # the caller's stays its own
        dist.all_reduce(total, group=ps.get_data_parallel_group())
        return total

    def _sums(self, kept: list[Tensor]) -> Tensor:
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        if self._reports:
            sums += torch.stack(kept).double().sum(0)
        dist.all_reduce(sums)
        return sums

    def _report(self, kept: list[Tensor], num_valid: Tensor) -> Tensor:
        sums = self._sums(kept)
        return torch.cat([mean_loss(sums, num_valid)[None], sums / num_valid.clamp(min=1)])

    def probe(self) -> dict[str, Tensor]:
        """A fixed input and this network's logits for it, which a converted model must reproduce.

        tokens, positions (L',) int64; logits_weight and, with a moving average, logits_ema (L', V) fp32. On every rank.
        """
        m = self.config.model
        multiple = self.topology.token_multiple
        length = max(min(64, m.seq_length) // multiple, 1) * multiple  # every rank has a share
        generator = np.random.default_rng(0)
        tokens = generator.integers(0, m.mask_id, (1, length))
        order = generator.permutation(length)[None]
        masked = np.isin(np.arange(length), order[0, length // 2 :])[None]
        rows = OrderedRows(tokens, order, masked, np.ones((1, length)), np.zeros(1, np.int64))
        batch = pack(rows, [], m.mask_id, 0)
        out = {"tokens": batch.tokens.cpu(), "positions": batch.positions.cpu(), "logits_weight": self._logits(batch)}
        if self.state.ema:
            with self.state.averaged_weights():
                out["logits_ema"] = self._logits(batch)
        return out

    def _logits(self, batch: PackedBatch) -> Tensor:
        """(M, V) fp32 on the CPU of every rank."""
        top, vocab = self.topology, self.config.model.vocab
        copies = [batch] * top.pipeline_size  # the interleaved schedule takes no fewer
        kept = self._run(copies, pipeline.logits_outcome, forward_only=True, want_logits=True)
        local = padded_vocab(vocab, top.tensor_size) // top.tensor_size
        whole = torch.zeros(len(batch.places), local * top.tensor_size, device=self.device)
        if kept and top.data_rank == 0:
            start, mine = top.tensor_rank * local, batch.places % top.context_size == top.context_rank
            whole[mine.to(self.device), start : start + local] = kept[0].nan_to_num(neginf=0.0)
        dist.all_reduce(whole)
        whole[:, self.config.model.mask_id :] = float("-inf")
        return whole[:, :vocab].cpu()

    def pieces(self) -> Iterator[Piece]:
        """What this rank has to save."""
        return self.state.pieces()

    def restore(self, checkpoint: Checkpoint, kinds: tuple[str, ...], num_steps: int) -> None:
        """Continue from a checkpoint written by any layout."""
        self.state.restore(checkpoint.read_box, kinds, num_steps)

    def all_ranks(self, number: int) -> list[int]:
        """Every rank's `number`, in the order of ranks."""
        out: list[int] = [0] * self.topology.world_size
        dist.all_gather_object(out, number)
        return out

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` holds on any rank; the same answer on all."""
        value = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def close(self) -> None:
        """Leave the run."""
        groups.stop()
