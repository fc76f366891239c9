"""Import of checkpoints written by the Eso-LM reference implementation: the network without adaLN, exactly.

The reference wraps each block in adaLN whose time input is always zero, so shifts, scales and gates are constants. Folding
them into norms, the attention output and the second MLP matrix changes logits by rounding only (arXiv 2506.01928).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoints_conversion import hub
from checkpoints_conversion.probe import BOUNDS, difference, folder_logits, probe_row, require
from checkpoints_conversion.torch_zip import TorchZip, TorchZipError, child
from esolm_megatron.checkpoint.tensorfile import INDEX_SUFFIX, TensorFolder, TensorFolderError
from esolm_megatron.config import ModelConfig
from esolm_megatron.model.attention import causal_attention
from esolm_megatron.model.pretrained import Progress, open_tensors, save_model
from esolm_megatron.model.rotary import rotary_tables, rotate

PREFIX = "backbone."
BUFFERS = ("rotary_emb.inv_freq",)


class ForeignCheckpoint(ValueError):
    """A checkpoint that is not the reference's, or not one that this import knows."""


@dataclass(frozen=True)
class Source:
    """What was read from a reference checkpoint; what it does not tell is None.

    state: its own names without prefix, buffers left out. weights: "ema" or "last". algo: how it was trained.
    """

    state: dict[str, Tensor]
    weights: str
    num_heads: int | None = None
    length: int | None = None
    alpha_0: float | None = None
    step: int | None = None
    algo: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Imported:
    """An inference folder made from a reference checkpoint.

    alpha_0_known: False where neither the checkpoint nor the caller told it, and 1 (0 for AR checkpoints) was written.
    max_difference: the largest one between a logit of the folder and of the reference's network, which keeps its adaLN.
    """

    folder: Path
    model: ModelConfig
    alpha_0: float
    alpha_0_known: bool
    weights: str
    step: int | None
    max_difference: float
    tolerance: float


def import_reference(
    source: str | Path,
    out: str | Path,
    *,
    num_heads: int | None = None,
    length: int | None = None,
    alpha_0: float | None = None,
    use_ema: bool = True,
    dtype: torch.dtype | None = None,
    tokenizer_folder: str | Path | None = None,
    progress: Progress | None = None,
) -> Imported:
    """Write the inference folder `out` from a reference `.ckpt`, or from a folder with model.safetensors and config.json.

    num_heads, length, alpha_0: needed where the checkpoint does not tell them; they win over what it tells. use_ema: take
    the moving average where there is one. dtype: stored type; None stores each tensor in the source's own type where that
    is exact, and the folded ones in fp64, so that nothing is rounded. A `.ckpt` is read without executing its pickles.
    Before the folder gets its name, it must give back what was folded, and the logits of the reference's own network.

    Raises:
        ForeignCheckpoint: it is damaged, not the reference's, of a kind whose attention is not causal over an order, or
            fails its probe.
        PretrainedError: `out` exists.
    """
    path = Path(source)
    read = _read_folder(path) if path.is_dir() else _read_ckpt(path, use_ema)
    heads = _needed(num_heads, read.num_heads, "num_heads", path)
    seq_length = _needed(length, read.length, "length", path)
    _check_state(read.state, heads, path)
    told = read.alpha_0 if alpha_0 is None else alpha_0
    alpha = told if told is not None else (1.0 if _has_adaln(read.state) else 0.0)
    if not 0 <= alpha <= 1:
        raise ForeignCheckpoint(f"alpha_0 = {alpha}: must be between 0 and 1")
    _check_algorithm(read.algo, alpha, path)
    folded = fold({name: tensor.double() for name, tensor in read.state.items()}, heads)
    for name, tensor in folded.items():
        if not tensor.isfinite().all():
            raise ForeignCheckpoint(f"{path}: {name} has values that are not finite")
    narrow = read.state["vocab_embed.embedding"].dtype
    dtypes = {name: dtype or _exact_dtype(tensor, narrow) for name, tensor in folded.items()}
    facts = {
        "imported_from": path.name,
        "weights": read.weights,
        "step": read.step,
        "alpha_0_assumed": told is None or None,
        "read_out": None if _has_adaln(read.state) else "next token",
    }
    facts = {name: value for name, value in facts.items() if value is not None}
    model = model_config(read.state, heads, seq_length)
    found: list[tuple[float, float]] = []

    def check(folder: Path) -> None:
        found.append(_proof(folder, read.state, folded, dtypes, heads))
        what = f"{path}: the imported network does not answer as the reference's does"
        require(*found[0], what, out, ForeignCheckpoint)

    save_model(
        out,
        model,
        alpha,
        folded.__getitem__,
        dtype=dtypes,
        facts=facts,
        tokenizer_folder=tokenizer_folder,
        extra=hub.files(model, alpha, facts, tokenizer_folder),
        extra_config=hub.config_fields(model),
        check=check,
        progress=progress,
    )
    return Imported(Path(out), model, alpha, told is not None, read.weights, read.step, *found[0])


def _needed(given: int | None, found: int | None, name: str, path: Path) -> int:
    value = found if given is None else given
    if value is None:
        raise ForeignCheckpoint(f"{path}: does not tell {name}; give it as {name}=")
    if value < 1:
        raise ForeignCheckpoint(f"{path}: {name} = {value}: must be 1 or more; give it as {name}=")
    return value


def _exact_dtype(tensor: Tensor, narrow: torch.dtype) -> torch.dtype:
    """`narrow` where it holds the fp64 tensor exactly, else fp64."""
    return narrow if torch.equal(tensor.to(narrow).double(), tensor) else torch.float64


@torch.no_grad()
def _proof(
    folder: Path,
    state: Mapping[str, Tensor],
    folded: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    num_heads: int,
) -> tuple[float, float]:
    """(largest difference of a logit, bound); raises unless the folder gives back every tensor bit by bit."""
    info, tensors = open_tensors(folder)
    for name, tensor in folded.items():
        if not torch.equal(tensors.read(name), tensor.to(dtypes[name])):
            raise ForeignCheckpoint(f"{name}: the folder does not give back what was written")
    tokens, positions = probe_row(info.model)
    mine = folder_logits(folder, tokens, positions, torch.float64)[:, : info.model.mask_id]
    theirs = reference_logits(state, num_heads, tokens, positions)[:, : info.model.mask_id]
    return difference(mine, theirs, max(BOUNDS[dtype] for dtype in dtypes.values()))


def reference_logits(state: Mapping[str, Tensor], num_heads: int, tokens: Tensor, positions: Tensor) -> Tensor:
    """Logits (L, V) of one causal row, in fp64, from the reference's network as it is, adaLN and all."""
    wide = {name: tensor.double() for name, tensor in state.items()}
    condition = adaln_constants(wide) if _has_adaln(state) else None
    x = wide["vocab_embed.embedding"][tokens]
    width = x.shape[-1]
    rope = rotary_tables(positions, width // num_heads, 10000.0, x.dtype)

    def normed(name: str, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, (width,)) * wide[f"{name}.weight"] * (1 + scale) + shift

    for layer in range(num_layers(state)):
        block = f"blocks.{layer}."
        like = wide[f"{block}norm1.weight"]
        shift1, scale1, gate1, shift2, scale2, gate2 = _modulation(wide, f"{block}adaLN_modulation", condition, 6, like)
        qkv = normed(f"{block}norm1", shift1, scale1) @ wide[f"{block}attn_qkv.weight"].t()
        q, k, v = qkv.view(len(tokens), 3, num_heads, -1).unbind(1)
        rows = [y.transpose(0, 1)[None] for y in (rotate(q, rope), rotate(k, rope), v)]
        mixed = causal_attention(*rows)[0].transpose(0, 1).reshape(len(tokens), width)
        x = x + gate1 * (mixed @ wide[f"{block}attn_out.weight"].t())
        inner = normed(f"{block}norm2", shift2, scale2) @ wide[f"{block}mlp.0.weight"].t() + wide[f"{block}mlp.0.bias"]
        inner = F.gelu(inner, approximate="tanh") @ wide[f"{block}mlp.2.weight"].t() + wide[f"{block}mlp.2.bias"]
        x = x + gate2 * inner
    like = wide["output_layer.norm_final.weight"]
    y = normed("output_layer.norm_final", *_modulation(wide, "output_layer.adaLN_modulation", condition, 2, like))
    return y @ wide["output_layer.linear.weight"].t() + wide["output_layer.linear.bias"]


def _read_folder(folder: Path) -> Source:
    """What a folder with model.safetensors and config.json holds."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    if not weights.is_file() and not weights.with_name(f"model{INDEX_SUFFIX}").is_file():
        raise ForeignCheckpoint(f"{folder}: has no model.safetensors; give such a folder, or a .ckpt file")
    if not config.is_file():
        raise ForeignCheckpoint(f"{config}: missing; write one that gives at least n_heads and length")
    try:
        tree = json.loads(config.read_bytes())
    except (ValueError, OSError) as error:
        raise ForeignCheckpoint(f"{config}: cannot be read as JSON: {error}") from error
    try:
        tensors = TensorFolder(folder)
        state = {name: tensors.read(name).clone() for name in tensors.shapes}
    except TensorFolderError as error:
        raise ForeignCheckpoint(str(error)) from error
    return Source(_without_prefix(state, weights), "last", **_told(tree))


def _read_ckpt(path: Path, use_ema: bool) -> Source:
    """What a Lightning checkpoint holds."""
    if not path.is_file():
        raise ForeignCheckpoint(f"{path}: no such file or folder")
    try:
        archive = TorchZip(path)
        nodes = child(archive.tree, "state_dict")
        if not isinstance(nodes, dict):
            raise ForeignCheckpoint(f"{path}: has no state_dict; give a checkpoint that the reference's training wrote")
        nodes = _without_prefix(nodes, path)
        state = {name: archive.tensor(node, name) for name, node in nodes.items()}
        shadow = child(archive.tree, "ema", "shadow_params") if use_ema else None
        if shadow is not None:
            state = _averaged(archive, state, shadow)
        step = child(archive.tree, "global_step")
        told = _told(child(archive.tree, "hyper_parameters"))
    except TorchZipError as error:
        raise ForeignCheckpoint(str(error)) from error
    return Source(state, "last" if shadow is None else "ema", step=step if isinstance(step, int) else None, **told)


def _averaged(archive: TorchZip, state: Mapping[str, Tensor], shadow: Any) -> dict[str, Tensor]:
    """The moving average of `state`: a list in the order of the network's parameters, which is that of `state`."""
    what = f"{archive.path}: ema.shadow_params"
    if not isinstance(shadow, list) or len(shadow) != len(state):
        found = len(shadow) if isinstance(shadow, list) else type(shadow).__name__
        raise ForeignCheckpoint(
            f"{what} has {found} tensors for {len(state)} parameters; use_ema=False imports without it"
        )
    out = {name: archive.tensor(node, f"ema of {name}") for name, node in zip(state, shadow, strict=True)}
    for name, tensor in out.items():
        if tensor.shape != state[name].shape:
            raise ForeignCheckpoint(
                f"{what} has {tuple(tensor.shape)} where {name} is {tuple(state[name].shape)}; use_ema=False imports without it"
            )
    return out


def _without_prefix(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The network's entries under the reference's names, buffers left out, in their order."""
    prefixed = any(str(name).startswith(PREFIX) for name in state)
    own = {str(name): value for name, value in state.items() if not prefixed or str(name).startswith(PREFIX)}
    out = {name.removeprefix(PREFIX): value for name, value in own.items()}
    for name in BUFFERS:
        out.pop(name, None)
    if "vocab_embed.embedding" not in out:
        found = sorted(out)[:3]
        raise ForeignCheckpoint(
            f"{path}: no tensor vocab_embed.embedding: not an Eso-LM reference checkpoint; found {found}"
        )
    return out


def _told(tree: Any) -> dict[str, Any]:
    """Heads, length, alpha_0 and algo as far as a configuration gives them: nested as in training, or flat as on the hub."""

    def first(kind: type | tuple[type, ...], places: tuple[tuple[str, ...], ...], *names: str) -> Any:
        for path in ((*place, name) for place in places for name in names):
            value = child(tree, *path)
            if isinstance(value, kind) and not isinstance(value, bool):
                return value
        return None

    model, algo = (("config", "model"), ("model",), ()), (("config", "algo"), ("algo",), ())
    alpha_0 = first((int, float), algo, "alpha_0")
    names = ("diffusion_attn_mode", "sequential_attn_mode")
    trained = {name: first(str, algo, name) for name in names} | {"name": first(str, algo[:2], "name")}
    timed = any(child(tree, *place, "time_conditioning") is True for place in algo)
    return {
        "num_heads": first(int, model, "n_heads", "num_heads"),
        "length": first(int, model, "length", "model_length", "seq_length"),
        "alpha_0": None if alpha_0 is None else float(alpha_0),
        "algo": {name: value for name, value in trained.items() if value is not None} | {"time_conditioning": timed},
    }


def _check_algorithm(algo: Mapping[str, Any], alpha_0: float, path: Path) -> None:
    """Raise where the checkpoint says that it was trained as a function that the folded network does not compute."""
    name = algo.get("name", "esolm")
    if name not in ("esolm", "ar"):
        raise ForeignCheckpoint(
            f"{path}: algo.name = {name}: only esolm and ar attend causally; this one's attention sees both ways and cannot "
            "be imported"
        )
    if algo.get("time_conditioning"):
        raise ForeignCheckpoint(f"{path}: time_conditioning = true: its adaLN is no constant and cannot be folded")
    for mode, used in (("diffusion_attn_mode", alpha_0 > 0), ("sequential_attn_mode", alpha_0 < 1)):
        if name == "esolm" and used and algo.get(mode, "causal") != "causal":
            raise ForeignCheckpoint(f"{path}: {mode} = {algo[mode]}: only causal attention can be imported")


def _has_adaln(state: Mapping[str, Tensor]) -> bool:
    return "sigma_map.mlp.0.weight" in state


def _check_state(state: Mapping[str, Tensor], num_heads: int, path: Path) -> None:
    """Raise unless names and shapes are exactly those of the reference's network."""
    vocab, width = _matrix(state, "vocab_embed.embedding", path)
    if width % (2 * num_heads):
        raise ForeignCheckpoint(
            f"{path}: num_heads = {num_heads}: must divide half the width {width}; give it as num_heads="
        )
    expected: dict[str, tuple[int, ...]] = {
        "vocab_embed.embedding": (vocab, width),
        "output_layer.norm_final.weight": (width,),
        "output_layer.linear.weight": (vocab, width),
        "output_layer.linear.bias": (vocab,),
    }
    blocks = [f"blocks.{layer}" for layer in range(num_layers(state))]
    ffn = _matrix(state, "blocks.0.mlp.0.weight", path)[0]
    for block in blocks:
        expected |= {f"{block}.{name}": shape for name, shape in _block_shapes(width, ffn).items()}
    if _has_adaln(state):
        condition, frequencies = _matrix(state, "sigma_map.mlp.0.weight", path)
        expected |= {"sigma_map.mlp.0.weight": (condition, frequencies), "sigma_map.mlp.0.bias": (condition,)}
        expected |= {"sigma_map.mlp.2.weight": (condition, condition), "sigma_map.mlp.2.bias": (condition,)}
        for owner, count in [(block, 6) for block in blocks] + [("output_layer", 2)]:
            expected[f"{owner}.adaLN_modulation.weight"] = (count * width, condition)
            expected[f"{owner}.adaLN_modulation.bias"] = (count * width,)
    for name, shape in expected.items():
        if name not in state:
            raise ForeignCheckpoint(f"{path}: tensor {name} is missing: not the reference's network, or not all of it")
        found = tuple(state[name].shape)
        if found != shape or not state[name].is_floating_point():
            raise ForeignCheckpoint(
                f"{path}: {name} is {state[name].dtype} {found}, the reference's network needs {shape}"
            )
    extra = [name for name in state if name not in expected]
    if extra:
        raise ForeignCheckpoint(
            f"{path}: {extra[0]} is no tensor of the reference's network; this kind cannot be imported"
        )


def _matrix(state: Mapping[str, Tensor], name: str, path: Path) -> tuple[int, int]:
    if name not in state or state[name].dim() != 2:
        found = f"has shape {tuple(state[name].shape)}" if name in state else "is missing"
        raise ForeignCheckpoint(f"{path}: the matrix {name} {found}: not the reference's network, or not all of it")
    return state[name].shape[0], state[name].shape[1]


def _block_shapes(width: int, ffn: int) -> dict[str, tuple[int, ...]]:
    return {
        "norm1.weight": (width,),
        "attn_qkv.weight": (3 * width, width),
        "attn_out.weight": (width, width),
        "norm2.weight": (width,),
        "mlp.0.weight": (ffn, width),
        "mlp.0.bias": (ffn,),
        "mlp.2.weight": (width, ffn),
        "mlp.2.bias": (width,),
    }


def adaln_constants(state: Mapping[str, Tensor]) -> Tensor:
    """The conditioning vector at time zero: silu of the time embedding's MLP, (conditioning width,)."""
    weight = state["sigma_map.mlp.0.weight"]
    half = weight.shape[1] // 2
    time = torch.cat([weight.new_ones(half), weight.new_zeros(half)])  # cos(0), sin(0)
    hidden = F.silu(weight @ time + state["sigma_map.mlp.0.bias"])
    return F.silu(state["sigma_map.mlp.2.weight"] @ hidden + state["sigma_map.mlp.2.bias"])


def fold(state: Mapping[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """Our state dict from the reference's (no `backbone.` prefix); differentiable, in the dtype of `state`.

    Raises:
        ForeignCheckpoint: names are missing, or belong to another network.
    """
    expected = "vocab_embed.embedding"
    if expected not in state:
        raise ForeignCheckpoint(f"no tensor {expected}: not an Eso-LM reference checkpoint; found {sorted(state)[:3]}")
    condition = adaln_constants(state) if "sigma_map.mlp.0.weight" in state else None
    out = {"embedding.weight": state[expected]}
    for layer in range(num_layers(state)):
        out |= _folded_block(state, layer, num_heads, condition)
    weight = state["output_layer.norm_final.weight"]
    shift, scale = _modulation(state, "output_layer.adaLN_modulation", condition, 2, weight)
    out["final_norm.weight"] = weight * (1 + scale)
    out["final_norm.bias"] = shift
    out["head.weight"] = state["output_layer.linear.weight"]
    out["head.bias"] = state["output_layer.linear.bias"]
    return out


def num_layers(state: Mapping[str, Tensor]) -> int:
    """Blocks in a reference state dict."""
    numbers = (name.split(".")[1] for name in state if name.startswith("blocks."))
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=0)


def _modulation(
    state: Mapping[str, Tensor], name: str, condition: Tensor | None, count: int, like: Tensor
) -> tuple[Tensor, ...]:
    """Shift, scale (and gate) of one norm, or of two; the identity for autoregressive checkpoints, which have none."""
    if condition is None:
        zero, one = torch.zeros_like(like), torch.ones_like(like)
        return (zero, zero, one)[: min(count, 3)] * (count // min(count, 3))
    return (state[f"{name}.weight"] @ condition + state[f"{name}.bias"]).chunk(count)


def _folded_block(
    state: Mapping[str, Tensor], layer: int, num_heads: int, condition: Tensor | None
) -> dict[str, Tensor]:
    theirs, ours = f"blocks.{layer}.", f"layers.{layer}."
    norm1, norm2 = state[theirs + "norm1.weight"], state[theirs + "norm2.weight"]
    shift1, scale1, gate1, shift2, scale2, gate2 = _modulation(state, theirs + "adaLN_modulation", condition, 6, norm1)
    qkv = state[theirs + "attn_qkv.weight"]
    width = qkv.shape[1]
    by_head = qkv.view(3, num_heads, width // num_heads, width).transpose(0, 1)
    return {
        ours + "norm1.weight": norm1 * (1 + scale1),
        ours + "norm1.bias": shift1,
        ours + "attention.qkv.weight": by_head.reshape(3 * width, width),
        ours + "attention.out.weight": gate1[:, None] * state[theirs + "attn_out.weight"],
        ours + "norm2.weight": norm2 * (1 + scale2),
        ours + "norm2.bias": shift2,
        ours + "mlp.fc1.weight": state[theirs + "mlp.0.weight"],
        ours + "mlp.fc1.bias": state[theirs + "mlp.0.bias"],
        ours + "mlp.fc2.weight": gate2[:, None] * state[theirs + "mlp.2.weight"],
        ours + "mlp.fc2.bias": gate2 * state[theirs + "mlp.2.bias"],
    }


def model_config(state: Mapping[str, Tensor], num_heads: int, seq_length: int) -> ModelConfig:
    """The shape of a reference checkpoint's network."""
    vocab, width = state["vocab_embed.embedding"].shape
    return ModelConfig(
        num_layers=num_layers(state),
        hidden_size=width,
        num_heads=num_heads,
        ffn_hidden_size=state["blocks.0.mlp.0.weight"].shape[0],
        vocab_size=vocab,
        seq_length=seq_length,
    )
