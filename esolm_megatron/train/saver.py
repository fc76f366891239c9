"""Checkpoints written beside the steps: training stops only while a rank's pieces are copied to host memory.

    main thread     step | copy | step | step | step | step ...
    every rank's thread         write, hash, fsync -> rank_XXXXX.json, which appears whole and last
    first rank's thread         ... then waits for the listings of all ranks -> commit -> prune

The threads of different ranks meet in the staging folder and nowhere else. A second process group would do too, but a
collective in a thread must come in the same order on all ranks and hangs where one of them is gone; the files are needed
anyway, and say more: they are on the disk. Threads do, rather than processes: hashing, writing and fsync hold no
interpreter lock. Errors travel by the main threads: a flag in the all-reduce that every step makes.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from esolm_megatron.checkpoint import CheckpointError, Piece
from esolm_megatron.checkpoint import folder as checkpoint
from esolm_megatron.config import Config
from esolm_megatron.topology import Topology

_ALIGNED = 64
_CLOSE_S = 20.0
_LONG_WAIT_S = 0.1

logger = logging.getLogger(__name__)


class Ranks(Protocol):
    """What a saver needs of an Engine; the two calls are collective."""

    topology: Topology

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` holds on any rank."""

    def all_ranks(self, number: int) -> list[int]:
        """Every rank's `number`."""


class HostMemory:
    """Host memory reserved once and filled again at every save; pinned where the pieces come from a GPU."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._pinned = False

    def reserve(self, pieces: Iterable[Piece]) -> None:
        """Make room for copies of `pieces`; its pages are touched, so that the first copy is as quick as the others."""
        listed = list(pieces)
        total = sum(_room(piece.tensor) for piece in listed)
        if total <= len(self._bytes):
            return
        self.release()
        self._bytes = torch.empty(total, dtype=torch.uint8).fill_(0)
        if any(piece.tensor.is_cuda for piece in listed):
            # pin_memory=True would round up to a power of two
            code = torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), total, 0)
            self._pinned = int(code) == 0
            if not self._pinned:
                logger.warning("%.1f GB of host memory could not be pinned (%s): copies are slower", total / 1e9, code)

    def copies(self, pieces: Iterable[Piece]) -> list[Piece]:
        """The pieces with their tensors copied here; valid until the next call."""
        listed, out, start = list(pieces), [], 0
        self.reserve(listed)
        for piece in listed:
            tensor = piece.tensor
            room = self._bytes[start : start + tensor.numel() * tensor.element_size()]
            copy = room.view(tensor.dtype).view(tensor.shape)
            copy.copy_(tensor, non_blocking=True)
            out.append(replace(piece, tensor=copy))
            start += _room(tensor)
        if any(piece.tensor.is_cuda for piece in listed):
            torch.cuda.current_stream().synchronize()
        return out

    def release(self) -> None:
        """Give the memory back."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
        self._bytes, self._pinned = torch.empty(0, dtype=torch.uint8), False


def _room(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED


@dataclass
class _Save:
    """A save in flight."""

    step: int
    pieces: list[Piece]
    manifest: Mapping[str, Any]
    probe: Mapping[str, Tensor] | None
    started: float = field(default_factory=time.monotonic)
    written: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None


class Saver:
    """Saves the checkpoints of a run, one at a time, beside its steps.

    As a context manager it drains at the end; after an exception it only lets the save in flight finish, for a while.
    """

    def __init__(self, config: Config, ranks: Ranks):
        """Collective. What a process of an earlier start still writes lies in folders of another name than this one's."""
        self.run_dir, self.keep = config.run_dir, config.checkpoint
        self.rank, self.world_size = ranks.topology.rank, ranks.topology.world_size
        self.timeout_s = config.parallel.timeout_s
        self.attempt = f"{ranks.all_ranks(secrets.randbits(62))[0]:016x}"
        self._any_rank = ranks.any_rank
        self._memory = HostMemory()
        self._save: _Save | None = None
        self._error: CheckpointError | None = None
        self._abandoned = threading.Event()

    @property
    def failed(self) -> bool:
        """Whether a save of this rank failed; to be all-reduced at each step, and then `check` called by all."""
        return self._error is not None

    def check(self) -> None:
        """Collective: raise CheckpointError on all ranks if a save failed on any; older checkpoints stay."""
        if self._any_rank(self.failed):
            self._abandoned.set()
            raise self._error or CheckpointError(
                f"{self.run_dir}: another rank could not write its part of a checkpoint; see its log"
            )

    def reserve(self, pieces: Iterable[Piece]) -> None:
        """Reserve the memory that `save` of such pieces needs, so that the first save is as quick as the others."""
        self._memory.reserve(pieces)

    def save(
        self,
        step: int,
        pieces: Iterable[Piece],
        manifest: Mapping[str, Any],
        probe: Mapping[str, Tensor] | None = None,
    ) -> float:
        """Collective: seconds that training was stopped. The pieces may change when this returns.

        Where the save before is not done, this waits for it. manifest and probe as in `checkpoint.commit`.

        Raises:
            CheckpointError: on every rank, when the save before failed on any.
        """
        start, before = time.monotonic(), self._save
        self.drain()
        waited = time.monotonic() - start
        if before is not None and waited > _LONG_WAIT_S and self.rank == 0:
            logger.warning(
                "step %d: training waited %.1f s until the checkpoint of step %d was on the disk; "
                "raise checkpoint.every_steps, or write to a faster disk",
                step,
                waited,
                before.step,
            )
        self._save = save = _Save(step, self._memory.copies(pieces), manifest, probe)
        save.thread = threading.Thread(target=self._work, args=(save,), name=f"save-{step}", daemon=True)
        save.thread.start()
        return time.monotonic() - start

    def drain(self) -> None:
        """Collective: wait until the save in flight, if there is one, is committed.

        Raises:
            CheckpointError: on every rank, when it failed on any.
        """
        save = self._save
        if save is not None:
            save.written.wait()
        self.check()  # before waiting for the first rank, which waits for every rank's file
        if save is not None and save.thread is not None:
            save.thread.join()
        self.check()
        self._save = None

    def close(self, wait_s: float = _CLOSE_S) -> None:
        """Let the save in flight finish for `wait_s` seconds, then abandon it. Not collective: other ranks may be gone."""
        if self._save is not None and self._save.thread is not None:
            self._save.thread.join(wait_s)
            if not self._save.thread.is_alive():
                self._save = None
        self._abandoned.set()
        if self._save is None:  # otherwise the thread still reads it
            self._memory.release()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self.drain()
        finally:
            self.close()

    def _work(self, save: _Save) -> None:
        """What the thread does; leaves an error in self._error."""
        try:
            staging = checkpoint.staging_folder(self.run_dir, save.step, self.attempt)
            checkpoint.write_rank(staging, self.rank, save.pieces)
            save.written.set()
            if self.rank == 0 and self._all_wrote(staging):
                self._commit(save, staging)
        except Exception as problem:  # whatever it is: unseen, the run would go on without checkpoints
            if not isinstance(problem, CheckpointError):
                problem = CheckpointError(f"step {save.step} cannot be saved: {type(problem).__name__}: {problem}")
            self._error = problem
            logger.error("%s", problem)
        finally:
            save.written.set()

    def _all_wrote(self, staging: Path) -> bool:
        """Wait for every rank's listing; False when that is pointless because the run ends."""
        deadline, pause = time.monotonic() + self.timeout_s, 0.005
        while missing := checkpoint.missing_ranks(staging, self.world_size):
            if self.rank in missing:
                raise CheckpointError(f"{staging}: was removed by another process; does this run run twice?")
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{staging}: {len(missing)} of {self.world_size} ranks had not written their part "
                    f"{self.timeout_s:g} s after rank {self.rank}; first of them: rank {missing[0]}"
                )
            if self._abandoned.wait(pause):
                return False
            pause = min(1.0, 2 * pause)
        return True

    def _commit(self, save: _Save, staging: Path) -> None:
        final = checkpoint.step_folder(self.run_dir, save.step)
        if final.exists():
            logger.warning("%s: is there already, saved by another process of this run; it is kept", final)
            shutil.rmtree(staging, ignore_errors=True)
            return
        checkpoint.commit(staging, final, save.manifest, self.world_size, save.probe)
        logger.info("step %d: saved in %.1f s beside the steps", save.step, time.monotonic() - save.started)
        try:
            checkpoint.prune(self.run_dir, self.keep.keep_last, self.keep.keep_every)
        except OSError as problem:  # the new checkpoint is safe all the same
            logger.warning("%s: older checkpoints cannot be removed: %s", self.run_dir, problem)
