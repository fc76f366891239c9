"""The inference folder: one model's weights, shape and tokenizer, written whole or not at all.

model.safetensors, or several such files with an index, holds every parameter under its name in the network; config.json,
flat, the fields of ModelConfig, alpha_0, cross_document and facts about the training; hashes.json the size and sha256 of each
file. Beside them lie the tokenizer's files, and what other tools want (checkpoints_conversion/hub.py).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from esolm_megatron.checkpoint.tensorfile import (
    INDEX_SUFFIX,
    Entry,
    FileFacts,
    TensorFolder,
    TensorFolderError,
    sha256_of,
    sync_folder,
    write_json,
    write_tensors,
)
from esolm_megatron.config import ModelConfig
from esolm_megatron.model.layers import PlainLinears, boxes, split_of
from esolm_megatron.model.transformer import EsoLM, place_box

Progress = Callable[[str, int, int], None]
"""(tensor, its number from 1, number of tensors)."""

MODEL_TYPE, FORMAT_VERSION = "esolm", 1
WEIGHTS, CONFIG, HASHES = "model.safetensors", "config.json", "hashes.json"
SHARD_BYTES = 5_000_000_000
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
    tensors: Iterable[tuple[str, Tensor]] | Callable[[str], Tensor],
    *,
    dtype: torch.dtype | Mapping[str, torch.dtype] = torch.float32,
    cross_document: bool = True,
    facts: Mapping[str, Any] | None = None,
    tokenizer_folder: str | Path | None = None,
    extra: Mapping[str, str] | None = None,
    extra_config: Mapping[str, Any] | None = None,
    source: Any = None,
    shard_bytes: int = SHARD_BYTES,
    check: Callable[[Path], None] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write an inference folder; it appears under its name when whole, or not at all.

    tensors: every parameter as (name, whole tensor), or a function of the name, which is called for one at a time.
    dtype: stored type, or one for each name. tokenizer_folder: its tokenizer files are copied. extra: file name -> text of
    more files, which win over a tokenizer's own. extra_config: more fields for config.json. shard_bytes: size of a
    weight file. check: called with the finished folder before it gets its name; what it raises leaves nothing behind.
    source: JSON that tells where the tensors come from. With it, a process that is killed leaves `.NAME.partial`, and the
    next call that writes the same thing goes on after its last whole weight file.

    Raises:
        PretrainedError: the folder exists and is not empty, another process writes it, or the tensors are not exactly the
            network's.
    """
    out = Path(folder)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise PretrainedError(f"{out}: exists and is not empty; give a new folder, or remove it first")
    tokenizer, shapes = _tokenizer_files(tokenizer_folder), parameter_shapes(config)
    read = tensors if callable(tensors) else _by_name(tensors, shapes)
    dtypes = dtype if isinstance(dtype, Mapping) else dict.fromkeys(shapes, dtype)
    entries = [Entry(name, dtypes[name], shape) for name, shape in shapes.items()]
    entries.sort(key=lambda entry: -entry.dtype.itemsize)
    tree = {
        "model_type": MODEL_TYPE,
        "format_version": FORMAT_VERSION,
        **config.model_dump(mode="json"),
        "alpha_0": alpha_0,
        "cross_document": cross_document,
        "torch_dtype": str(entries[0].dtype).removeprefix("torch."),
        **dict(extra_config or {}),
        "facts": dict(facts or {}),
    }
    shards = _shards(entries, shard_bytes)
    try:
        with _partial(
            out, None if source is None else [tree, [[vars(e) for e in s] for s in shards], source]
        ) as partial:
            for path in tokenizer:
                shutil.copyfile(path, partial / path.name)
            for name, text in (extra or {}).items():
                (partial / name).write_text(text, encoding="utf-8")
            write_json(partial / CONFIG, tree)
            written = _write_shards(partial, shards, read, progress)
            others = [path for path in sorted(partial.iterdir()) if path.name not in written and path.name[0] != "."]
            files = written | {path.name: FileFacts(path.stat().st_size, sha256_of(path)) for path in others}
            write_json(partial / HASHES, {name: vars(found) for name, found in sorted(files.items())})
            sync_folder(partial)
            if check is not None:
                check(partial)
            for path in partial.glob(".*"):
                path.unlink()
            os.rename(partial, out)
            sync_folder(out.parent)
    except OSError as error:
        raise PretrainedError(f"{out}: cannot be written: {error}") from error


@contextmanager
def _partial(out: Path, plan: Any) -> Iterator[Path]:
    """The hidden folder that becomes `out`: what an earlier process left is kept where its plan was this one.

    An exception removes it; a kill, or Ctrl-C, does not.
    """
    partial, text = out.with_name(f".{out.name}.partial"), json.dumps(plan, sort_keys=True, default=str)
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PretrainedError(f"{out}: another process is writing it; wait for that one, or stop it") from error
        try:
            kept = partial / ".plan"
            if plan is None or not kept.is_file() or kept.read_text() != text:
                for path in partial.iterdir():
                    if path.name != ".lock":
                        path.unlink()
                kept.write_text(text)
            yield partial
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _by_name(tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]]) -> Callable[[str], Tensor]:
    listed = list(tensors)
    held = dict(listed)
    for name, _ in listed:
        if name not in shapes or len(held) < len(listed):
            raise PretrainedError(f"tensor {name} is not in the network, or came twice; remove it")

    def read(name: str) -> Tensor:
        if name not in held:
            raise PretrainedError(f"tensor {name} is missing; the network needs it in shape {shapes[name]}")
        return held[name].detach()

    return read


def _shards(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """The entries, in their order, in files of at most `limit` bytes; a larger tensor has a file of its own."""
    out: list[list[Entry]] = [[]]
    for entry in entries:
        if out[-1] and sum(e.bytes for e in out[-1]) + entry.bytes > limit:
            out.append([])
        out[-1].append(entry)
    return out


def _write_shards(
    folder: Path, shards: Sequence[Sequence[Entry]], read: Callable[[str], Tensor], progress: Progress | None
) -> dict[str, FileFacts]:
    """The weight files, and an index where there are several; those that are there and whole are kept."""
    total, done, files, places = sum(map(len, shards)), 0, dict[str, FileFacts](), dict[str, str]()
    for number, entries in enumerate(shards, 1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path, note = folder / name, folder / f".{name}.json"
        places |= dict.fromkeys((entry.name for entry in entries), name)
        if note.is_file() and path.is_file() and json.loads(note.read_bytes())["sha256"] == sha256_of(path):
            files[name] = FileFacts(**json.loads(note.read_bytes()))
        else:
            files[name] = write_tensors(path, entries, _checked(entries, read, progress, done, total))
            write_json(note, vars(files[name]))
        done += len(entries)
    if len(shards) > 1:
        size = sum(entry.bytes for entries in shards for entry in entries)
        write_json(folder / f"model{INDEX_SUFFIX}", {"metadata": {"total_size": size}, "weight_map": places})
    return files


def _checked(
    entries: Sequence[Entry], read: Callable[[str], Tensor], progress: Progress | None, done: int, total: int
) -> Iterator[Tensor]:
    for number, entry in enumerate(entries, done + 1):
        tensor = read(entry.name)
        _check_shape(entry.name, tuple(tensor.shape), {entry.name: entry.shape})
        narrow = tensor.to(entry.dtype)
        del tensor  # before the caller copies what it writes
        yield narrow
        del narrow
        if progress is not None:
            progress(entry.name, number, total)


def _tokenizer_files(folder: str | Path | None) -> list[Path]:
    if folder is None:
        return []
    found = [Path(folder) / name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()]
    if not found:
        raise PretrainedError(f"{folder}: holds no tokenizer; looked for {', '.join(TOKENIZER_FILES[:3])}")
    return found


def _check_shape(name: str, shape: tuple[int, ...], expected: Mapping[str, tuple[int, ...]]) -> None:
    if name not in expected:
        raise PretrainedError(f"tensor {name} is not in the network, or came twice; remove it")
    if shape != expected[name]:
        raise PretrainedError(f"tensor {name} has shape {shape}, the network needs {expected[name]}")


def check_hashes(folder: str | Path) -> list[str]:
    """The files of an inference folder, once each has the size and the sha256 that it was written with.

    Raises:
        PretrainedError: one is missing or has changed, or the folder lists none.
    """
    folder = Path(folder)
    path = folder / HASHES
    if not path.is_file():
        raise PretrainedError(_what_is_it(folder, HASHES))
    try:
        listed = {str(name): FileFacts(**facts) for name, facts in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise PretrainedError(f"{path}: cannot be read as a list of files: {error}") from error
    for name, facts in listed.items():
        file = folder / Path(name).name
        if not file.is_file():
            raise PretrainedError(f"{file}: missing; copy the folder again")
        if file.stat().st_size != facts.bytes or sha256_of(file) != facts.sha256:
            raise PretrainedError(f"{file}: is not what was written (size or sha256 differs); copy the folder again")
    return list(listed)


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
    alpha_0, dtype = tree.get("alpha_0"), tree.get("torch_dtype", tree.get("dtype"))  # transformers writes the second
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


def open_tensors(folder: str | Path) -> tuple[PretrainedInfo, TensorFolder]:
    """What config.json says, and the tensors, whose names and shapes are exactly those of the network it describes.

    Raises:
        PretrainedError: the folder is not whole, or its tensors are others.
    """
    folder = Path(folder)
    if folder.suffix in _PICKLES:
        raise PretrainedError(_what_is_it(folder.parent, WEIGHTS) if folder.is_file() else f"{folder}: no such folder")
    info = read_config(folder)
    if not (folder / WEIGHTS).is_file() and not (folder / f"model{INDEX_SUFFIX}").is_file():
        raise PretrainedError(_what_is_it(folder, WEIGHTS))
    try:
        found = TensorFolder(folder)
    except TensorFolderError as error:
        raise PretrainedError(str(error)) from error
    expected = parameter_shapes(info.model)
    try:
        for name, shape in found.shapes.items():
            _check_shape(name, shape, expected)
        for name, shape in expected.items():
            if name not in found.shapes:
                raise PretrainedError(f"tensor {name} is missing; the network needs it in shape {shape}")
    except PretrainedError as error:
        raise PretrainedError(f"{found.files[0]}: {error}") from None
    return info, found


def load_model(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    network: type[EsoLM] = EsoLM,
    linears: PlainLinears | None = None,
) -> EsoLM:
    """The network of an inference folder on one device, in evaluation mode; or a rank's part of it, as its `linears` cut it.

    Raises:
        PretrainedError: the folder is not whole, or its tensors are not exactly those of the network it describes.
    """
    info, tensors = open_tensors(folder)
    linears = PlainLinears(dtype, device) if linears is None else linears
    model = network(info.model, linears)
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                whole, split = tensors.read(name), split_of(parameter)
                for box in boxes(tuple(parameter.shape), split, linears.tensor_rank, linears.tensor_size):
                    place_box(parameter, box, whole)
    except TensorFolderError as error:
        raise PretrainedError(str(error)) from error
    return model.eval()
