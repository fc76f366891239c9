"""The inference folder: one model's weights, shape and tokenizer, written whole or not at all.

model.safetensors holds every parameter under its name in the network; config.json, flat, the fields of ModelConfig, alpha_0,
cross_document and facts about the training; beside them lie the tokenizer's files.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from esolm_megatron.config import ModelConfig
from esolm_megatron.model.layers import PlainLinears
from esolm_megatron.model.transformer import EsoLM
from esolm_megatron.tensorfile import Entry, sync_folder, write_json, write_tensors

MODEL_TYPE, FORMAT_VERSION = "esolm", 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FLOATS = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class PretrainedError(ValueError):
    """An inference folder that cannot be written or loaded."""


@dataclass(frozen=True)
class PretrainedInfo:
    """What config.json says.

    alpha_0: the expected fraction of tokens that the model was trained to make by diffusion. dtype: the widest one stored.
    cross_document: whether attention crossed the boundaries of documents in training.
    """

    model: ModelConfig
    alpha_0: float
    facts: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    cross_document: bool = True


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of each parameter of the whole network; a tied head has none of its own."""
    model = EsoLM(config, PlainLinears(device="meta"))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def save_model(
    folder: str | Path,
    config: ModelConfig,
    alpha_0: float,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | Mapping[str, torch.dtype] = torch.float32,
    cross_document: bool = True,
    facts: Mapping[str, Any] | None = None,
    tokenizer_folder: str | Path | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write an inference folder; it appears under its name when whole, or not at all.

    tensors: (name, whole tensor) of each parameter. In the order of `parameter_shapes` only one is in memory at a time.
    dtype: stored type, or one for each name. tokenizer_folder: its tokenizer files are copied.
    check: called with the finished folder before it gets its name; what it raises leaves nothing behind.

    Raises:
        PretrainedError: the folder exists and is not empty, or the tensors are not exactly the network's.
    """
    out = Path(folder)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise PretrainedError(f"{out}: exists and is not empty; give a new folder, or remove it first")
    tokenizer = _tokenizer_files(tokenizer_folder)
    dtypes = dtype if isinstance(dtype, Mapping) else dict.fromkeys(parameter_shapes(config), dtype)
    entries = [Entry(name, dtypes[name], shape) for name, shape in parameter_shapes(config).items()]
    entries.sort(key=lambda entry: -entry.dtype.itemsize)
    partial = out.with_name(f".{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        write_tensors(partial / WEIGHTS, entries, _in_order(entries, tensors))
        tree = {
            "model_type": MODEL_TYPE,
            "format_version": FORMAT_VERSION,
            **config.model_dump(mode="json"),
            "alpha_0": alpha_0,
            "cross_document": cross_document,
            "torch_dtype": str(entries[0].dtype).removeprefix("torch."),
            "facts": dict(facts or {}),
        }
        write_json(partial / CONFIG, tree)
        for path in tokenizer:
            shutil.copyfile(path, partial / path.name)
        sync_folder(partial)
        if check is not None:
            check(partial)
        os.rename(partial, out)
        sync_folder(out.parent)
    except OSError as error:
        raise PretrainedError(f"{out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _tokenizer_files(folder: str | Path | None) -> list[Path]:
    if folder is None:
        return []
    found = [Path(folder) / name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()]
    if not found:
        raise PretrainedError(f"{folder}: holds no tokenizer; looked for {', '.join(TOKENIZER_FILES[:3])}")
    return found


def _in_order(entries: list[Entry], tensors: Iterable[tuple[str, Tensor]]) -> Iterator[Tensor]:
    """The tensors in the order and dtypes of `entries`; those that come early wait in memory."""
    source, waiting = iter(tensors), dict[str, Tensor]()
    wanted = {entry.name: entry for entry in entries}
    for entry in entries:
        while entry.name not in waiting:
            name, tensor = next(source, ("", None))
            if tensor is None:
                raise PretrainedError(f"tensor {entry.name} is missing; the network needs it in shape {entry.shape}")
            _check_tensor(name, tuple(tensor.shape), {n: e.shape for n, e in wanted.items()})
            waiting[name] = tensor
        yield waiting.pop(entry.name).to(entry.dtype)
        del wanted[entry.name]
    extra = next(source, None)
    if extra is not None:
        raise PretrainedError(f"tensor {extra[0]} is not in the network, or came twice; remove it")


def _check_tensor(name: str, shape: tuple[int, ...], expected: Mapping[str, tuple[int, ...]]) -> None:
    if name not in expected:
        raise PretrainedError(f"tensor {name} is not in the network, or came twice; remove it")
    if shape != expected[name]:
        raise PretrainedError(f"tensor {name} has shape {shape}, the network needs {expected[name]}")


def read_config(folder: str | Path) -> PretrainedInfo:
    """What an inference folder holds, from its config.json alone; fields that this package does not know are left out.

    Raises:
        PretrainedError: it is no inference folder of this package, or of a newer version of it.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if not path.is_file():
        raise PretrainedError(_what_is_it(folder, CONFIG))
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PretrainedError(f"{path}: cannot be read as JSON: {error}") from error
    kind = tree.get("model_type") if isinstance(tree, dict) else None
    if kind != MODEL_TYPE:
        raise PretrainedError(
            f"{path}: model_type = {kind!r}, expected {MODEL_TYPE!r}; import other models with `esolm convert --from`"
        )
    version = tree.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise PretrainedError(
            f"{path}: format_version = {version!r}, this package reads up to {FORMAT_VERSION}; update esolm-megatron"
        )
    try:
        model = ModelConfig.model_validate({name: tree[name] for name in ModelConfig.model_fields if name in tree})
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise PretrainedError(f"{path}: {problems}") from error
    alpha_0, dtype = tree.get("alpha_0"), tree.get("torch_dtype")
    if not isinstance(alpha_0, int | float) or not 0 <= alpha_0 <= 1:
        raise PretrainedError(f"{path}: alpha_0 = {alpha_0!r}: must be a number between 0 and 1")
    if dtype not in _FLOATS:
        raise PretrainedError(f"{path}: torch_dtype = {dtype!r}: must be one of {', '.join(_FLOATS)}")
    crosses = tree.get("cross_document", True)
    if not isinstance(crosses, bool):
        raise PretrainedError(f"{path}: cross_document = {crosses!r}: must be true or false")
    return PretrainedInfo(model, float(alpha_0), dict(tree.get("facts") or {}), _FLOATS[dtype], crosses)


def _what_is_it(folder: Path, missing: str) -> str:
    """Why `folder` cannot be loaded, and what would help."""
    if not folder.is_dir():
        return f"{folder}: no such folder; give one made by `esolm convert`"
    if (folder / "checkpoints").is_dir() or (folder / "manifest.json").is_file():
        return f"{folder}: is a training run or its checkpoint, without {missing}; make an inference folder with `esolm convert`"
    pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in _PICKLES]
    if pickles:
        return (
            f"{folder}: has no {missing} but {pickles[0]}, a pickle, which may run any code when loaded and is never opened "
            "here; a reference checkpoint is imported safely by `esolm convert --from reference`"
        )
    return f"{folder}: has no {missing}; give a folder made by `esolm convert`"


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> EsoLM:
    """The network of an inference folder on one device, in evaluation mode.

    Raises:
        PretrainedError: the folder is not whole, or its tensors are not exactly those of the network it describes.
    """
    folder = Path(folder)
    if folder.suffix in _PICKLES:
        raise PretrainedError(_what_is_it(folder.parent, WEIGHTS) if folder.is_file() else f"{folder}: no such folder")
    info = read_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise PretrainedError(_what_is_it(folder, WEIGHTS))
    expected = parameter_shapes(info.model)
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            for name in names:
                _check_tensor(name, tuple(file.get_slice(name).get_shape()), expected)
            missing = [name for name in expected if name not in set(names)]
            if missing:
                raise PretrainedError(
                    f"tensor {missing[0]} is missing; the network needs it in shape {expected[missing[0]]}"
                )
            model = EsoLM(info.model, PlainLinears(dtype, device))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(file.get_tensor(name))
    except PretrainedError as error:
        raise PretrainedError(f"{path}: {error}") from None
    except (OSError, SafetensorError) as error:
        raise PretrainedError(f"{path}: is no whole safetensors file: {error}; copy or convert it again") from error
    return model.eval()
