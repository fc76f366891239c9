"""From a training checkpoint of any layout to the inference folder, proved by the probe that the training model answered."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from checkpoints_conversion import hub
from checkpoints_conversion.probe import BOUNDS, difference, folder_logits, require
from esolm_megatron.checkpoint import Checkpoint, complete_steps, newest, step_folder
from esolm_megatron.config import ModelConfig
from esolm_megatron.model.pretrained import Progress, parameter_shapes, save_model

KIND_OF = {"last": "weight", "ema": "ema"}

_RUN_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ExportError(ValueError):
    """A checkpoint that cannot be exported, or whose export does not answer as the training model did."""


@dataclass(frozen=True)
class ExportReport:
    """An export that passed its probe.

    max_difference: the largest one between a logit of the exported model and the training model's; tolerance: its bound.
    """

    folder: Path
    step: int
    weights: str
    num_tensors: int
    max_difference: float
    tolerance: float


def export_run(
    run_or_step_folder: str | Path,
    out: str | Path,
    *,
    weights: str = "ema",
    dtype: torch.dtype = torch.float32,
    step: int | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the inference folder `out` from a run (its newest whole step, or `step`) or from one step's folder.

    weights: "ema", the moving average, or "last". Tensors are read and written one at a time. The run's `tokenizer` folder
    is copied where there is one. The result answers the checkpoint's probe in fp32, block by block; see `probe_difference`.
    A process that is killed is continued by the next call.

    Raises:
        ExportError: there is nothing to export, or the probe fails; `out` is then not made.
        CheckpointError: the checkpoint is damaged.
    """
    checkpoint = _open(Path(run_or_step_folder), step)
    if weights not in KIND_OF:
        raise ExportError(f"weights = {weights!r}: must be ema or last")
    kind, config = KIND_OF[weights], _model_config(checkpoint)
    shapes = parameter_shapes(config)
    held = set(checkpoint.names(kind))
    if weights == "ema" and not held:
        raise ExportError(
            f"{checkpoint.folder}: was saved without a moving average (optim.ema_decay = 0); export weights=last"
        )
    for name, shape in shapes.items():
        if name not in held or checkpoint.shape(name) != shape:
            found = checkpoint.shape(name) if name in held else "nothing"
            raise ExportError(f"{checkpoint.folder}: {kind} {name}: found {found}, the network needs {shape}")
    reports: list[ExportReport] = []

    def check(folder: Path) -> None:
        difference, tolerance = probe_difference(checkpoint, folder, weights, dtype)
        what = f"{checkpoint.folder}: the exported model does not answer the probe as the training model did"
        require(difference, tolerance, what, out, ExportError)
        reports.append(ExportReport(Path(out), checkpoint.step, weights, len(shapes), difference, tolerance))

    tokenizer = checkpoint.folder.parent.parent / "tokenizer"
    alpha_0, facts = checkpoint.config_tree["objective"]["alpha_0"], _facts(checkpoint, weights)
    folder = tokenizer if tokenizer.is_dir() else None
    save_model(
        out,
        config,
        alpha_0,
        _reader(checkpoint, kind),
        dtype=dtype,
        cross_document=checkpoint.config_tree.get("data", {}).get("cross_document", True),
        facts=facts,
        tokenizer_folder=folder,
        extra=hub.files(config, alpha_0, facts, folder),
        extra_config=hub.config_fields(config),
        source=checkpoint.manifest["files"],
        check=check,
        progress=progress,
    )
    return reports[0]


def _open(folder: Path, step: int | None) -> Checkpoint:
    """The checkpoint meant by a run folder and a step, or by a step's folder; every file's hash is verified."""
    if re.fullmatch(r"step_\d+", folder.name):
        return Checkpoint.open(folder, verify=True)
    steps = complete_steps(folder)
    if not steps:
        raise ExportError(
            f"{folder}: holds no checkpoint; give a run's folder, or one of its checkpoints/step_XXXXXXXX"
        )
    if step is not None:
        if step not in steps:
            raise ExportError(f"step = {step}: {folder} has no such checkpoint; it has {', '.join(map(str, steps))}")
        return Checkpoint.open(step_folder(folder, step), verify=True)
    checkpoint = newest(folder)
    assert checkpoint is not None
    return checkpoint


def _model_config(checkpoint: Checkpoint) -> ModelConfig:
    try:
        config = ModelConfig.model_validate(checkpoint.config_tree["model"])
    except (KeyError, ValidationError) as error:
        raise ExportError(f"{checkpoint.folder}: its configuration has no valid model section: {error}") from error
    if config.vocab_size is None:
        config = config.model_copy(update={"vocab_size": checkpoint.shape("embedding.weight")[0]})
    return config


def _facts(checkpoint: Checkpoint, weights: str) -> dict[str, Any]:
    """The manifest's `numbers`, such as the validation loss, and where the weights come from."""
    manifest, tree = checkpoint.manifest, checkpoint.config_tree
    batch, top = tree.get("train", {}).get("global_batch_size"), manifest.get("topology")
    facts = {"step": checkpoint.step, "weights": weights, "run": tree.get("name")}
    facts["tokens"] = checkpoint.step * batch * tree["model"]["seq_length"] if batch and checkpoint.step else None
    facts["data_fingerprint"] = manifest.get("data_fingerprint")
    if top is not None:
        sizes = {name: top.get(f"{name}_size", 1) for name in ("tensor", "pipeline", "context")}
        facts["layout"] = ", ".join([f"{top.get('world_size')} processes", *(f"{k} {n}" for k, n in sizes.items())])
    facts |= manifest.get("numbers", {}) | {"trained_with": manifest.get("versions")}
    return {name: value for name, value in facts.items() if value is not None and name != "guard"}


def _reader(checkpoint: Checkpoint, kind: str) -> Callable[[str], Tensor]:
    def read(name: str) -> Tensor:
        tensor = checkpoint.read(kind, name)
        checkpoint.close_files()
        return tensor

    return read


def probe_difference(checkpoint: Checkpoint, folder: Path, weights: str, dtype: torch.dtype) -> tuple[float, float]:
    """(largest difference of a logit, bound) between the model in `folder`, run in fp32, and the training model.

    The checkpoint's probe is one plain causal row of L tokens: `tokens` (L,) and `positions` (L,) int64, and the logits
    (L, V) that the training model gave for its weights (`logits_weight`) and, where it has them, for their moving average
    (`logits_ema`). Logits that are minus infinity on both sides agree. The bound is that of the narrowest of the training
    precision and `dtype`.

    Raises:
        ExportError: the checkpoint has no such probe.
    """
    probe, wanted = checkpoint.probe(), f"logits_{KIND_OF[weights]}"
    for name in ("tokens", "positions", wanted):
        if name not in probe:
            raise ExportError(
                f"{checkpoint.folder}: its probe has no {name}, so the export cannot be checked; save another step"
            )
    run_dtype = _RUN_DTYPE.get(checkpoint.config_tree.get("train", {}).get("precision", ""), torch.bfloat16)
    bound = max(BOUNDS[run_dtype], BOUNDS[dtype])
    try:
        return difference(folder_logits(folder, probe["tokens"], probe["positions"]), probe[wanted], bound)
    except ValueError as error:
        raise ExportError(f"{checkpoint.folder}: probe {wanted}: {error}") from error
