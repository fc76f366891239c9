"""The engine: the trainer hands it noised micro-batches and gets losses; it alone knows ranks, stages and shards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import megatron.core.parallel_state as ps
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from esolm_megatron.checkpoint import Checkpoint, Piece
from esolm_megatron.config import Config
from esolm_megatron.model.layers import split_of
from esolm_megatron.objective.esolm import Noised, OrderedRows, PackedBatch, mean_loss, pack
from esolm_megatron.parallel import groups, main_grad, pipeline, providers, replicas, zero
from esolm_megatron.parallel.context import own_share
from esolm_megatron.parallel.gate import Gate
from esolm_megatron.parallel.megatron_layers import megatron_config
from esolm_megatron.parallel.overlap import Overlap
from esolm_megatron.parallel.zero_state import ZeroState
from esolm_megatron.topology import padded_vocab

PROBE_TOKENS = 8


@dataclass(frozen=True)
class StepResult:
    """A step's loss per token over the global batch, its diffusion and sequential parts, and the gradient norm."""

    loss: float
    diffusion: float
    sequential: float
    grad_norm: float


@dataclass(frozen=True)
class Staged:
    """A rank's share of one step, cut to what it feeds itself, and ready to be copied to its device."""

    shares: list[PackedBatch]
    num_valid: Tensor


class Engine:
    """A model that is split over processes, with its optimizer."""

    def __init__(self, config: Config):
        """Join the run that the environment describes, and build this rank's share from config.seed."""
        self.config = config
        self.topology, self.device = groups.start(config)
        self.providers = providers.choose(config, self.topology, self.device)
        """Job of a step -> who does it, for logs."""
        megatron = megatron_config(config, self.device)
        self.chunks = pipeline.build_chunks(config, megatron, self.topology, self.device)
        self.owned = zero.owned_parameters(config, self.chunks, self.topology)
        self.deepspeed = zero.build(config, self.chunks, self.owned)
        if config.train.kernels.gradients != "deepspeed":
            main_grad.attach(self.chunks, self.deepspeed.optimizer)
        self.overlap: Overlap | None = getattr(self.deepspeed, "overlap", None)
        if self.overlap is not None:
            megatron.no_sync_func = self.overlap.held
        self.work = Stopwatch(self.device)
        self.state = ZeroState(self.deepspeed, self.owned, self.topology, config.optim.ema_decay)
        each_holds_all = config.parallel.zero_stage == 0
        self.state.share_matrices(
            ps.get_tensor_model_parallel_group()
            if each_holds_all
            else ps.get_tensor_and_data_parallel_group(with_context_parallel=True)
        )
        self._own_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.evidence = (0.0, 0.0)
        """Of the last `try_step`: the loss as this rank's tokens gave it, and a fingerprint of its norms and biases."""

    @property
    def is_first_rank(self) -> bool:
        """Whether this process writes what exists once in a run."""
        return self.topology.rank == 0

    @property
    def _reports(self) -> bool:
        """On each replica's last stage, the first tensor rank of each context rank, which alone saw its tokens."""
        return self.topology.stage == self.topology.pipeline_size - 1 and self.topology.tensor_rank == 0

    def stage(self, noised: Noised) -> Staged:
        """`noised` made ready for a step; no collective and nothing on the device, so that a thread may do it ahead."""
        rank, size = self.topology.context_rank, self.topology.context_size
        multiple = self.topology.tensor_size  # of tokens, which sequence parallelism cuts
        shares = [own_share(batch, rank, size, multiple) for batch in noised.micro_batches]
        return Staged([x.pinned() for x in shares] if self.device.type == "cuda" else shares, noised.num_valid)

    def forward_backward(self, noised: Noised | Staged) -> Tensor:
        """Add up gradients of one global batch, of which `noised` is this rank's share.

        Returns the global (3,) fp64: loss, diffusion part, sequential part, each per valid token of its rows.
        """
        staged = noised if isinstance(noised, Staged) else self.stage(noised)
        num_valid = self._over_replicas(staged.num_valid)
        scale = len(staged.shares) * self.topology.data_size  # the schedule and DeepSpeed take means
        with self.work:
            outcome = pipeline.loss_outcome(num_valid, scale)
            kept = self._run(staged, outcome, forward_only=False, num_valid=num_valid)
            if self.overlap is not None:
                self.overlap.finish()
        if self.config.parallel.zero_stage < 2:  # the others are finished as they come
            zero.finish_gradients(self.config, self.chunks, self.state.gradients(), self.topology)
        self._own_loss = mean_loss(torch.stack(kept).double().sum(0), num_valid) if kept else num_valid.new_zeros(())
        return self._report(kept, num_valid)

    def _evidence(self) -> Tensor:
        """(2,) fp64 of this rank alone, before anything is summed over ranks; see `replicas.accusations`."""
        whole = [o.parameter for o in self.owned if split_of(o.parameter).dim is None]
        pieces = [getattr(parameter, "ds_tensor", parameter) for parameter in whole]  # what ZeRO 3 leaves of it here
        return torch.stack([self._own_loss, replicas.fingerprint(pieces, self.device)])

    def _run(self, staged: Staged, outcome: pipeline.Outcome, **options: Any) -> list[Tensor]:
        """`pipeline.run` on this rank's shares of micro-batches."""
        shares = [share.to(self.device) for share in staged.shares]
        through = self.deepspeed if self.config.parallel.zero_stage >= 2 else None
        return pipeline.run(self.chunks, shares, outcome, through=through, **options)  # type: ignore[arg-type]

    def train_step(self, noised: Noised, lr: float) -> StepResult:
        """One optimizer step on a global batch."""
        loss, diffusion, sequential = self.forward_backward(noised).tolist()
        return StepResult(loss, diffusion, sequential, self.state.step(lr))

    def evaluate(self, noised: Noised) -> tuple[Tensor, Tensor]:
        """(2,) fp64 weighted loss sums of both parts over all replicas, and the (2,) valid tokens they belong to."""
        num_valid = self._over_replicas(noised.num_valid)
        kept = self._run(self.stage(noised), pipeline.loss_outcome(num_valid, 1.0), forward_only=True)
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
        # few tokens, for training waits; far apart, so that the rotary embedding of all positions is tried
        length = max(min(PROBE_TOKENS, m.seq_length) // multiple, 1) * multiple  # every rank has a share
        generator = np.random.default_rng(0)
        tokens = generator.integers(0, m.mask_id, (1, length))
        places, masked = np.arange(length)[None], np.arange(length)[None] >= length // 2
        batch = pack(OrderedRows(tokens, places, masked, np.ones((1, length)), np.zeros(1, np.int64)), [], m.mask_id, 0)
        positions = generator.permutation(max(length, m.seq_length))[:length]
        batch = replace(batch, positions=torch.from_numpy(positions).to(batch.positions))
        out = {"tokens": batch.tokens.cpu(), "positions": batch.positions.cpu(), "logits_weight": self._logits(batch)}
        if self.state.ema:
            with self.state.averaged_weights():
                out["logits_ema"] = self._logits(batch)
        return out

    def _logits(self, batch: PackedBatch) -> Tensor:
        """(M, V) fp32 on the CPU of every rank."""
        top, vocab = self.topology, self.config.model.vocab
        copies = Noised([batch] * top.pipeline_size, torch.zeros(2))  # the interleaved schedule takes no fewer
        kept = self._run(self.stage(copies), pipeline.logits_outcome, forward_only=True, want_logits=True)
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

    def restore(self, checkpoint: Checkpoint, *, new_optimizer: bool = False) -> None:
        """Continue from a checkpoint written by any layout; or from its weights alone, with moments that begin anew."""
        kinds = ["weight"] if new_optimizer else checkpoint.kinds()
        done = 0 if new_optimizer else checkpoint.manifest.get("numbers", {}).get("optimizer_steps", checkpoint.step)
        self.state.restore(checkpoint.read_box, {kind: {*checkpoint.names(kind)} for kind in kinds}, done)

    def all_ranks(self, number: int) -> list[int]:
        """Every rank's `number`, in the order of ranks."""
        return self.everywhere(number)

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` holds on any rank; the same answer on all."""
        value = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def release(self) -> None:
        """Give the device's memory back, and stay in the run's process groups for another engine of the same layout."""
        self.settle()
        self.deepspeed.destroy()

    def close(self) -> None:
        """Leave the run."""
        self.settle()
        groups.stop()

    def settle(self) -> None:
        """Wait for weights that the last step left under way."""
        if self.overlap is not None:
            self.overlap.arrive()

    def try_step(
        self, noised: Noised | Staged, lr: float, problem_of: Callable[[float, float], str | None]
    ) -> tuple[StepResult, str | None]:
        """One optimizer step, unless `problem_of(loss, grad_norm)` has an objection on any rank; returns it too.

        A refused step leaves weights, moments, moving average and the number of steps untouched on all ranks.
        """
        losses = self.forward_backward(noised)
        # ZeRO 1 and 2 write all weights anew in the step: a wrong one would vanish with its traces
        loss, diffusion, sequential, *evidence = torch.cat([losses, self._evidence()]).tolist()
        self.evidence = evidence[0], evidence[1]
        with Gate(self.deepspeed.optimizer, lambda norm: problem_of(loss, norm), self.any_rank) as gate:
            self.state.step(lr)
        return StepResult(loss, diffusion, sequential, gate.norm), gate.problem

    def disagreements(self) -> list[str]:
        """A line for each parameter whose bits differ between data or context replicas, naming ranks; the same on all ranks.

        Ask before a step's update: it rounds the master weights into new ones everywhere, so that a wrong weight vanishes
        and a wrong master weight becomes everyone's. Each rank compares its master weights with its weights for that.
        """
        self.settle()
        group = ps.get_data_parallel_group(with_context_parallel=True)
        found = replicas.disagreements([(o.name, o.parameter) for o in self.owned], group)
        found += [
            f"{name}: rank {self.topology.rank} holds a master weight that is not its weight"
            for name in self.state.strayed()
        ]
        return list(dict.fromkeys(line for lines in self.everywhere(found) for line in lines))

    def table(self, numbers: Sequence[float]) -> np.ndarray:
        """(world_size, n) fp64: every rank's numbers, on every rank."""
        mine = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        rows = [torch.empty_like(mine) for _ in range(self.topology.world_size)]
        dist.all_gather(rows, mine)
        return torch.stack(rows).cpu().numpy()

    @property
    def reads(self) -> bool:
        """Whether this rank reads the rows of its model replica."""
        top = self.topology
        return top.stage == top.tensor_rank == top.context_rank == 0

    @property
    def shares_rows(self) -> bool:
        """Whether a model replica has more ranks than the one that reads."""
        return self.topology.data_size < self.topology.world_size

    def from_reader(self, words: np.ndarray) -> np.ndarray:
        """The int64 (n,) words of the rank that reads for this replica, on all its ranks; each passes n of them."""
        box = torch.from_numpy(words).to(self.device)
        first_stage = [ps.get_tensor_and_context_parallel_group()] if self.topology.stage == 0 else []
        for group in (*first_stage, ps.get_pipeline_model_parallel_group()):
            ranks = dist.get_process_group_ranks(group)
            if len(ranks) > 1:
                dist.broadcast(box, ranks[0], group=group)
        return box.cpu().numpy()

    def everywhere(self, value: Any) -> list[Any]:
        """Every rank's `value`, which pickles, in the order of ranks."""
        out: list[Any] = [None] * self.topology.world_size
        dist.all_gather_object(out, value)
        return out

    def from_first_rank(self, value: Any) -> Any:
        """The first rank's `value`, on every rank."""
        return groups.from_first_rank(value, self.device)


class Stopwatch:
    """Seconds that this rank's device spent in `with`, the last time; ranks of other replicas are not waited for inside.

    Stages and tensor ranks do wait for each other there, so a slow rank shows in all ranks of its replica.
    """

    def __init__(self, device: torch.device):
        on_gpu = device.type == "cuda"
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
        self._start = self._end = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()
        if self._events:
            self._events[0].record()

    def __exit__(self, *exception: object) -> None:
        self._end = time.perf_counter()
        if self._events:
            self._events[1].record()

    def seconds(self) -> float:
        """Ask once the step is over: on a GPU it waits for the work."""
        if not self._events:
            return self._end - self._start
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000
