"""From an inference folder to a run that `esolm train` starts from, on any layout."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from checkpoints_conversion.probe import BOUNDS, difference, folder_logits, probe_row, require, streamed_logits
from esolm_megatron.checkpoint import Checkpoint, Piece, step_folder
from esolm_megatron.checkpoint.folder import commit, staging_folder, write_rank
from esolm_megatron.model.pretrained import PretrainedError, Progress, open_tensors
from esolm_megatron.version import __version__

MODEL_FILE = "model.yaml"


@dataclass(frozen=True)
class StartReport:
    """A run that passed its probe. base: the file that a configuration of it names as `base:`."""

    folder: Path
    base: Path
    num_tensors: int
    max_difference: float
    tolerance: float


def start_run(model_folder: str | Path, run_dir: str | Path, *, progress: Progress | None = None) -> StartReport:
    """Make `run_dir`, whose checkpoint of step 0 holds the folder's weights in fp32.

    Training starts there with fresh moments, its schedule, data and moving average at their beginnings. Tensors are read and
    written a few at a time, together no larger than the largest. What a killed call left is replaced by the next.

    Raises:
        PretrainedError: the folder cannot be read, `run_dir` exists, or the probe fails; nothing is left then.
    """
    info, tensors = open_tensors(model_folder)
    run = Path(run_dir)
    if run.exists() and not (run.is_dir() and not any(run.iterdir())):
        raise PretrainedError(f"{run}: exists and is not empty; give a new folder, or remove it first")
    partial, config = run.with_name(f".{run.name}.partial"), info.model
    shutil.rmtree(partial, ignore_errors=True)
    model: dict[str, Any] = {"model": config.model_dump(mode="json"), "objective": {"alpha_0": info.alpha_0}}
    model["data"] = {"cross_document": info.cross_document}
    tokens, positions = probe_row(config)
    try:
        staging, groups = staging_folder(partial, 0), list(_groups(tensors.shapes))
        done = 0
        for rank, names in enumerate(groups):
            zeros = {name: (0,) * len(tensors.shapes[name]) for name in names}
            pieces = [Piece("weight", n, tensors.shapes[n], zeros[n], tensors.read(n).float()) for n in names]
            write_rank(staging, rank, pieces)
            done += len(names)
            if progress is not None:
                progress(names[-1], done, len(tensors.shapes))
            del pieces
        theirs = folder_logits(model_folder, tokens, positions)
        manifest = {
            "step": 0,
            "config": {"name": run.name, **model, "train": {"precision": "fp32"}},
            "data_fingerprint": None,
            "versions": {"esolm_megatron": __version__, "torch": torch.__version__},
            "numbers": {},
            "converted_from": {"folder": Path(model_folder).name, "facts": info.facts},
        }
        probe = {"tokens": tokens, "positions": positions, "logits_weight": theirs}
        commit(staging, step_folder(partial, 0), manifest, len(groups), probe)
        written = Checkpoint.open(step_folder(partial, 0), verify=True)

        def read(name: str) -> torch.Tensor:
            written.close_files()
            return written.read("weight", name)

        found, tolerance = difference(streamed_logits(config, read, tokens, positions), theirs, BOUNDS[torch.float32])
        require(
            found, tolerance, f"its checkpoint does not answer the probe as {model_folder} does", run, PretrainedError
        )
        (partial / MODEL_FILE).write_text(yaml.safe_dump(model, sort_keys=False))
        os.rename(partial, run)
    except OSError as error:
        raise PretrainedError(f"{run}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return StartReport(run, run / MODEL_FILE, len(tensors.shapes), found, tolerance)


def _groups(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names of tensors that together are no larger than the largest one."""
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    group: list[str] = []
    for name, size in sizes.items():
        if group and sum(sizes[n] for n in group) + size > max(sizes.values()):
            yield group
            group = []
        group.append(name)
    yield group
