"""What a run leaves on disk: checkpoints that say what they hold, load into any layout, and appear only when whole.

    RUN/checkpoints/step_00000100/
        rank_00003.safetensors   the boxes of whole tensors that this rank owned
        rank_00003.json          where each box lies in its tensor; size and hash of the file
        probe.safetensors        one input, and what the training model answered
        manifest.json            step, configuration, layout, versions, data, every tensor, every file's size and hash

Each rank calls `write_rank` into the staging folder, where its rank_XXXXX.json appears last; when all are there, one calls
`commit`, which renames the folder. Nothing here is a pickle, and nothing needs a process group. train/saver.py does this
beside the steps.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from esolm_megatron.checkpoint.boxes import (
    KINDS,
    Box,
    CheckpointError,
    DamagedCheckpoint,
    Indexed,
    Piece,
    add_boxes,
    bounds,
    check_cover,
    check_piece,
    slices,
)
from esolm_megatron.checkpoint.tensorfile import Entry, FileFacts, sha256_of, sync_folder, write_json, write_tensors
from esolm_megatron.version import __version__

FORMAT, VERSION = "esolm-checkpoint", 2
READS = (1, 2)
"""Format versions that this package loads as they are. Version 2 says which package wrote it; 1 did not."""
MIGRATED_BY: dict[int, str] = {}
"""For each older version that it no longer loads: what to run to turn such a checkpoint into one it does."""
MANIFEST, PROBE = "manifest.json", "probe.safetensors"

_STEP = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(r"step_\d{8,}\.(tmp|deleted)-.+")
_OPEN_FILES = 64
_HASHED_AT_ONCE = 8

logger = logging.getLogger(__name__)


def step_folder(run_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of `step` is, once it is whole."""
    return Path(run_dir) / "checkpoints" / f"step_{step:08d}"


def staging_folder(run_dir: str | Path, step: int, attempt: str | int = 0) -> Path:
    """Where ranks write before `commit`.

    All ranks of a save pass the same `attempt`, and no other process does: it keeps a dead job's last rank, still
    running, out of its successor's folder.
    """
    final = step_folder(run_dir, step)
    return final.with_name(f"{final.name}.tmp-{attempt}")


def write_rank(folder_tmp: str | Path, rank: int, pieces: Iterable[Piece]) -> None:
    """Write one rank's boxes; they are on the disk when this returns.

    Memory grows by one box at a time where the pieces are views. Empty boxes are left out. What a dead save left under
    the same names is replaced.

    Raises:
        CheckpointError: a piece does not fit its tensor, or the disk refuses.
    """
    folder, stem = Path(folder_tmp), _stem(rank)
    listed = sorted((p for p in pieces if p.tensor.numel()), key=lambda p: -p.tensor.element_size())
    for piece in listed:
        check_piece(piece)
    keys = [f"{p.kind}/{p.name}/{','.join(map(str, p.offset))}" for p in listed]
    entries = [Entry(key, p.tensor.dtype, tuple(p.tensor.shape)) for key, p in zip(keys, listed, strict=True)]
    boxes = [
        {
            "kind": p.kind,
            "name": p.name,
            "whole_shape": list(p.whole_shape),
            "offset": list(p.offset),
            "shape": list(p.tensor.shape),
            "key": key,
        }
        for key, p in zip(keys, listed, strict=True)
    ]
    path = folder / f"{stem}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{stem}.json").unlink(missing_ok=True)
        facts = write_tensors(path, entries, (p.tensor for p in listed))
        write_json(folder / f"{stem}.json", {"file": path.name, **asdict(facts), "boxes": boxes})
    except (OSError, ValueError) as error:
        raise CheckpointError(f"rank {rank} cannot write {path}: {error}") from error


def missing_ranks(folder_tmp: str | Path, world_size: int) -> list[int]:
    """The ranks whose `write_rank` into this folder has not finished yet."""
    folder = Path(folder_tmp)
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return [rank for rank in range(world_size) if f"{_stem(rank)}.json" not in there]


def _stem(rank: int) -> str:
    return f"rank_{rank:05d}"


def commit(
    folder_tmp: str | Path,
    final: str | Path,
    manifest: Mapping[str, Any],
    world_size: int,
    probe: Mapping[str, Tensor] | None = None,
) -> None:
    """Turn a staging folder that every rank has written into the checkpoint `final`, in one rename.

    manifest: `step`, `config` (the resolved tree), and whatever else JSON can hold. probe: what
    checkpoints_conversion/export.py runs again. Files that a dead save of more ranks left here are removed.

    Raises:
        CheckpointError: `final` exists, a rank's files are missing, or the boxes leave a gap or overlap.
    """
    folder, final = Path(folder_tmp), Path(final)
    for name in ("step", "config"):
        if name not in manifest:
            raise CheckpointError(f"{final}: its manifest has no {name}; it has {', '.join(manifest)}")
    if final.exists():
        raise CheckpointError(
            f"{final}: exists, and a checkpoint is never overwritten; save another step, or move it away"
        )
    files, index = _written(folder, world_size)
    for name, tensor in index.items():
        for boxes in tensor.kinds.values():
            check_cover(name, tensor.shape, boxes)
    try:
        for path in folder.iterdir():
            if path.name not in files:
                path.unlink()
        if probe:
            listed = sorted(probe.items(), key=lambda item: -item[1].element_size())
            entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in listed]
            files[PROBE] = write_tensors(folder / PROBE, entries, (tensor for _, tensor in listed))
        tree = {
            **manifest,
            "format": FORMAT,
            "version": VERSION,
            "written_by": __version__,
            "world_size": world_size,
            "files": {name: asdict(facts) for name, facts in files.items()},
            "tensors": {name: {"shape": tensor.shape, "kinds": sorted(tensor.kinds)} for name, tensor in index.items()},
        }
        write_json(folder / MANIFEST, tree | {"sha256": _tree_hash(json.loads(json.dumps(tree)))})
        sync_folder(folder)
        folder.rename(final)
        sync_folder(final.parent)
    except OSError as error:
        raise CheckpointError(f"{final}: cannot be committed: {error}") from error


def _written(folder: Path, world_size: int) -> tuple[dict[str, FileFacts], dict[str, Indexed]]:
    """Facts of every rank's files, and the index of their boxes."""
    files: dict[str, FileFacts] = {}
    index: dict[str, Indexed] = {}
    for rank in range(world_size):
        listing = folder / f"{_stem(rank)}.json"
        if not listing.exists():
            raise CheckpointError(
                f"{folder.name}: rank {rank} of {world_size} has not finished writing; call write_rank on each first"
            )
        tree = _read_json(listing)
        files[tree["file"]] = FileFacts(tree["bytes"], tree["sha256"])
        files[listing.name] = FileFacts(listing.stat().st_size, sha256_of(listing))
        found = (folder / tree["file"]).stat().st_size if (folder / tree["file"]).exists() else "no file"
        if found != tree["bytes"]:
            raise CheckpointError(
                f"{folder.name}/{tree['file']}: {found} where rank {rank} wrote {tree['bytes']} bytes"
            )
        add_boxes(index, tree)
    return files, index


class Checkpoint:
    """A committed checkpoint, read on one process without any group; `Checkpoint.open` makes it.

    folder; step; manifest: the whole manifest; config_tree: the resolved configuration.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], index: dict[str, Indexed]):
        self.folder, self.manifest, self._index = folder, manifest, index
        self.step: int = manifest["step"]
        self.config_tree: dict[str, Any] = manifest["config"]
        self._covered: set[tuple[str, str]] = set()
        self._files: dict[str, Any] = {}

    @classmethod
    def open(cls, folder: str | Path, verify: bool = False) -> Checkpoint:
        """The checkpoint in `folder`; `verify` hashes every file, otherwise only their sizes are compared.

        Raises:
            DamagedCheckpoint: a file is missing, cut short or changed.
            CheckpointError: there is no such folder, or a newer version of this package wrote it.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such checkpoint; give a folder step_XXXXXXXX")
        manifest = _read_manifest(folder)
        listed = {folder / name: facts for name, facts in manifest["files"].items()}
        for path, facts in listed.items():
            if not path.is_file():
                raise DamagedCheckpoint(f"{path}: missing; restore it, or use an earlier step")
            if path.stat().st_size != facts["bytes"]:
                raise DamagedCheckpoint(f"{path}: has {path.stat().st_size} bytes where {facts['bytes']} were written")
        _check_hashes({path: facts["sha256"] for path, facts in listed.items() if verify or path.suffix == ".json"})
        index: dict[str, Indexed] = {}
        for path in listed:
            if path.suffix == ".json":
                add_boxes(index, _read_json(path))
        return cls(folder, manifest, index)

    def kinds(self) -> list[str]:
        """The kinds that it holds, of KINDS."""
        found = {kind for tensor in self._index.values() for kind in tensor.kinds}
        return [kind for kind in KINDS if kind in found]

    def names(self, kind: str) -> list[str]:
        """The tensors that have this kind."""
        return [name for name, tensor in self._index.items() if kind in tensor.kinds]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        if name not in self._index:
            raise CheckpointError(
                f"{self.folder}: holds no tensor {name}; it has {', '.join(list(self._index)[:4])}, ..."
            )
        return self._index[name].shape

    def read(self, kind: str, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A whole tensor, on the CPU.

        Raises:
            CheckpointError: it is not there, or the boxes leave a gap or overlap.
        """
        shape = self.shape(name)
        return self.read_box(kind, name, (0,) * len(shape), shape, dtype)

    def read_box(
        self,
        kind: str,
        name: str,
        offset: Sequence[int],
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Any box of a whole tensor, whatever boxes it was saved in; only what the box needs is read.

        Raises:
            CheckpointError: it is not there, reaches out of the tensor, or the saved boxes leave a gap or overlap.
        """
        whole = self.shape(name)
        boxes = self._index[name].kinds.get(kind)
        if boxes is None:
            raise CheckpointError(
                f"{self.folder}: {name} has no {kind}; it has {', '.join(sorted(self._index[name].kinds))}"
            )
        low = np.array(offset, np.int64)
        high = low + np.array(shape, np.int64)
        if low.shape != (len(whole),) or high.shape != low.shape or (low < 0).any() or (high > np.array(whole)).any():
            raise CheckpointError(f"{name}: a box of {tuple(shape)} at {tuple(offset)} is not inside the whole {whole}")
        if (kind, name) not in self._covered:
            check_cover(name, whole, boxes)
            self._covered.add((kind, name))
        out = torch.empty(tuple(shape), dtype=dtype)
        starts, ends = bounds(boxes)
        for i in np.flatnonzero(((starts < high) & (ends > low)).all(-1)):
            first, last = np.maximum(starts[i], low), np.minimum(ends[i], high)
            out[slices(first - low, last - low)] = self._load(boxes[i], slices(first - starts[i], last - starts[i])).to(
                dtype
            )
        return out

    def _load(self, box: Box, part: tuple[slice, ...]) -> Tensor:
        path = self.folder / box.file
        try:
            if box.file not in self._files:
                if len(self._files) >= _OPEN_FILES:
                    self._files.clear()
                self._files[box.file] = safe_open(path, "pt")
            file = self._files[box.file]
            return file.get_slice(box.key)[part] if part else file.get_tensor(box.key)
        except (OSError, SafetensorError) as error:
            raise DamagedCheckpoint(f"{path}: {box.key} cannot be read: {error}") from error

    def close_files(self) -> None:
        """Forget the files opened so far: what was read of them counts as this process's memory while they are open."""
        self._files.clear()

    def probe(self) -> dict[str, Tensor]:
        """The probe's tensors; empty where none was saved."""
        if PROBE not in self.manifest["files"]:
            return {}
        try:
            return load_file(self.folder / PROBE)
        except (OSError, SafetensorError) as error:
            raise DamagedCheckpoint(f"{self.folder / PROBE}: cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(tree, dict):
        raise DamagedCheckpoint(f"{path}: must be a JSON object, found {type(tree).__name__}")
    return tree


def _check_hashes(expected: Mapping[Path, str]) -> None:
    """Compare files with their hashes, several at a time: neither hashing nor reading holds Python's lock."""
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        for path, found in zip(expected, pool.map(sha256_of, expected), strict=True):
            if found != expected[path]:
                pool.shutdown(cancel_futures=True)  # one is enough: the rest need not be read
                raise DamagedCheckpoint(f"{path}: its content has changed since it was written (sha256 differs)")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise DamagedCheckpoint(f"{path}: missing; restore it, or use an earlier step")
    tree = _read_json(path)
    version = tree.get("version")
    if tree.get("format") == FORMAT and isinstance(version, int) and version not in READS:
        _refuse_version(path, version, tree.get("written_by", "a newer version"))
    stamp = tree.pop("sha256", None)
    if tree.get("format") != FORMAT or version not in READS or stamp != _tree_hash(tree):
        raise DamagedCheckpoint(f"{path}: its content has changed since it was written")
    return tree


def _refuse_version(path: Path, version: int, written_by: str) -> None:
    if version > VERSION:
        raise CheckpointError(
            f"{path}: has format version {version}, and esolm-megatron {__version__} reads up to {VERSION}; "
            f"esolm-megatron {written_by} wrote it: install that or a newer one"
        )
    if version in MIGRATED_BY:
        raise CheckpointError(
            f"{path}: has format version {version}, and esolm-megatron {__version__} reads {min(READS)} to {VERSION}; "
            f"migrate it: {MIGRATED_BY[version]}"
        )


def _tree_hash(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def complete_steps(run_dir: str | Path) -> list[int]:
    """The steps whose save finished, oldest first."""
    folder = step_folder(run_dir, 0).parent
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name)) and path.is_dir())


def newest(run_dir: str | Path, verify: bool = True, *, move_damaged: bool = False) -> Checkpoint | None:
    """The newest checkpoint that is whole; None where the run has saved none.

    A damaged one is skipped with a warning that names file and reason. With `move_damaged` (on one process only) its
    folder is renamed as well, so that the run can save that step again.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged, or a newer version of this package wrote the newest.
    """
    steps, reasons = complete_steps(run_dir), []
    for step in reversed(steps):
        folder = step_folder(run_dir, step)
        try:
            return Checkpoint.open(folder, verify)
        except CheckpointError as error:
            if folder.is_dir() and not isinstance(error, DamagedCheckpoint):
                raise
            logger.warning("step %d is damaged, falling back to the step before: %s", step, error)
            reasons.append(str(error))
            if move_damaged and folder.is_dir():
                _renamed(folder, "damaged")
    if reasons:
        raise CheckpointError(f"all {len(steps)} checkpoints of {run_dir} are damaged:\n" + "\n".join(reasons))
    return None


def _renamed(folder: Path, word: str) -> Path:
    """`folder` under a free name that is no step's."""
    number = 0
    while (target := folder.with_name(f"{folder.name}.{word}-{number}")).exists():
        number += 1
    os.rename(folder, target)
    sync_folder(folder.parent)
    return target


def prune(run_dir: str | Path, keep_last: int, keep_every: int = 0, *, remove_unfinished: bool = False) -> list[int]:
    """The steps removed: all but the newest `keep_last` that open (a damaged one newer than those stays, and is not counted).

    keep_every: multiples of it stay for ever; 0 means none.

    remove_unfinished: also remove the staging folders of saves that died; only while no save is running.

    Raises:
        CheckpointError: keep_last is below 1.
    """
    if keep_last < 1:
        raise CheckpointError(f"keep_last = {keep_last}: the newest checkpoint is always kept; use 1 or more")
    kept, removed = 0, []
    for step in reversed(complete_steps(run_dir)):
        folder = step_folder(run_dir, step)
        if kept < keep_last:
            kept += _opens(folder)
        elif not (keep_every and step % keep_every == 0):
            _renamed(folder, "deleted")  # first, so that a kill leaves no step half removed
            removed.append(step)
    parent = step_folder(run_dir, 0).parent
    for path in parent.iterdir() if parent.is_dir() else ():
        match = _LEFTOVER.fullmatch(path.name)
        if match and (match[1] == "deleted" or remove_unfinished):
            shutil.rmtree(path, ignore_errors=True)
    return removed


def _opens(folder: Path) -> bool:
    try:
        Checkpoint.open(folder)
    except CheckpointError as error:
        logger.warning("not counted among the checkpoints to keep: %s", error)
        return False
    return True
