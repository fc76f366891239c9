"""Export to the reference implementation's names: its network with adaLN as constants, the identity but for biases."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_conversion.probe import BOUNDS, difference, folder_logits, probe_row, require
from checkpoints_conversion.reference import fold, reference_logits
from esolm_megatron.checkpoint.tensorfile import Entry, TensorFolder, sync_folder, write_json, write_tensors
from esolm_megatron.config import ModelConfig
from esolm_megatron.model.pretrained import CONFIG, WEIGHTS, PretrainedError, open_tensors

CONDITION, FREQUENCIES = 128, 256
"""Widths of the reference's time embedding and of its Fourier features."""
_NEEDED: dict[str, Any] = {
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "activation": "gelu",
    "mlp_bias": True,
    "qkv_bias": False,
    "output_bias": True,
    "tied_embeddings": False,
    "qk_norm": False,
    "rope_base": 10000.0,
}


@dataclass(frozen=True)
class ReferenceExport:
    """A folder with model.safetensors and config.json under the reference's names; it passed its probe."""

    folder: Path
    num_tensors: int
    max_difference: float
    tolerance: float


@torch.no_grad()
def export_reference(model_folder: str | Path, out: str | Path) -> ReferenceExport:
    """Write `out` from an inference folder. Importing it again gives the same tensors, bit by bit.

    The weights are in memory as a whole: the reference's sizes fit.

    Raises:
        PretrainedError: the folder cannot be read, has a network that the reference has not, or `out` exists.
    """
    info, tensors = open_tensors(model_folder)
    target, config = Path(out), info.model
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise PretrainedError(f"{target}: exists and is not empty; give a new folder, or remove it first")
    _check_shape(config, model_folder)
    state = unfold({name: tensors.read(name) for name in tensors.shapes}, config)
    entries = sorted((Entry(n, t.dtype, tuple(t.shape)) for n, t in state.items()), key=lambda e: -e.dtype.itemsize)
    tree = {
        "model_type": "esolm-reference",
        "n_heads": config.num_heads,
        "hidden_dim": config.hidden_size,
        "n_blocks": config.num_layers,
        "vocab_size": config.vocab,
        "cond_dim": CONDITION,
        "length": config.seq_length,
        "dropout": config.dropout,
        "adaLN": True,
        "alpha_0": info.alpha_0,
    }
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_tensors(partial / WEIGHTS, entries, (state[entry.name] for entry in entries))
        write_json(partial / CONFIG, tree)
        sync_folder(partial)
        found, tolerance = _proof(model_folder, partial, config)
        what = f"{model_folder}: under the reference's names it answers differently"
        require(found, tolerance, what, target, PretrainedError)
        os.rename(partial, target)
    except OSError as error:
        raise PretrainedError(f"{target}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ReferenceExport(target, len(state), found, tolerance)


def _check_shape(config: ModelConfig, folder: str | Path) -> None:
    wrong = [(name, getattr(config, name), value) for name, value in _NEEDED.items() if getattr(config, name) != value]
    if config.kv_heads != config.num_heads:
        wrong.append(("num_kv_heads", config.kv_heads, config.num_heads))
    if config.head_dim * config.num_heads != config.hidden_size:
        wrong.append(("head_size", config.head_dim, config.hidden_size // config.num_heads))
    if wrong:
        name, found, value = wrong[0]
        raise PretrainedError(f"{folder}: {name} = {found!r}: the reference's network has {value!r} and nothing else")


def _proof(model_folder: str | Path, folder: Path, config: ModelConfig) -> tuple[float, float]:
    """(largest difference of a logit, bound); raises unless every tensor comes back from an import bit by bit."""
    _, ours = open_tensors(model_folder)
    written = TensorFolder(folder)
    state = {name: written.read(name) for name in written.shapes if name != "rotary_emb.inv_freq"}
    for name, tensor in fold(state, config.num_heads).items():
        if not torch.equal(tensor.double(), ours.read(name).double()):
            raise PretrainedError(f"{name}: importing the reference's names again does not give it back")
    tokens, positions = probe_row(config)
    theirs = folder_logits(model_folder, tokens, positions, torch.float64)[:, : config.mask_id]
    mine = reference_logits(state, config.num_heads, tokens, positions)[:, : config.mask_id]
    return difference(mine, theirs, BOUNDS[torch.float64])


def unfold(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The reference's state dict (no `backbone.` prefix) that `reference.fold` turns into `tensors` exactly.

    Modulation matrices are zero, so the time embedding, zero as well, has no effect; their biases hold our norms' biases as
    shifts, zero as scales and one as gates.
    """
    width, heads = config.hidden_size, config.num_heads
    rates = 1.0 / 10000.0 ** (torch.arange(0, width // heads, 2, dtype=torch.float32) / (width // heads))
    like = tensors["embedding.weight"]
    zero, one = like.new_zeros(width), like.new_ones(width)
    out = {
        "vocab_embed.embedding": like,
        "sigma_map.mlp.0.weight": like.new_zeros(CONDITION, FREQUENCIES),
        "sigma_map.mlp.0.bias": like.new_zeros(CONDITION),
        "sigma_map.mlp.2.weight": like.new_zeros(CONDITION, CONDITION),
        "sigma_map.mlp.2.bias": like.new_zeros(CONDITION),
        "rotary_emb.inv_freq": rates,
    }
    for layer in range(config.num_layers):
        theirs, ours = f"blocks.{layer}.", f"layers.{layer}."
        qkv = tensors[f"{ours}attention.qkv.weight"].view(heads, 3, width // heads, width)
        shifts = tensors[f"{ours}norm1.bias"], tensors[f"{ours}norm2.bias"]
        out |= {
            f"{theirs}norm1.weight": tensors[f"{ours}norm1.weight"],
            f"{theirs}attn_qkv.weight": qkv.transpose(0, 1).reshape(3 * width, width),
            f"{theirs}attn_out.weight": tensors[f"{ours}attention.out.weight"],
            f"{theirs}norm2.weight": tensors[f"{ours}norm2.weight"],
            f"{theirs}mlp.0.weight": tensors[f"{ours}mlp.fc1.weight"],
            f"{theirs}mlp.0.bias": tensors[f"{ours}mlp.fc1.bias"],
            f"{theirs}mlp.2.weight": tensors[f"{ours}mlp.fc2.weight"],
            f"{theirs}mlp.2.bias": tensors[f"{ours}mlp.fc2.bias"],
            f"{theirs}adaLN_modulation.weight": like.new_zeros(6 * width, CONDITION),
            f"{theirs}adaLN_modulation.bias": torch.cat([shifts[0], zero, one, shifts[1], zero, one]),
        }
    return out | {
        "output_layer.norm_final.weight": tensors["final_norm.weight"],
        "output_layer.linear.weight": tensors["head.weight"],
        "output_layer.linear.bias": tensors["head.bias"],
        "output_layer.adaLN_modulation.weight": like.new_zeros(2 * width, CONDITION),
        "output_layer.adaLN_modulation.bias": torch.cat([tensors["final_norm.bias"], zero]),
    }
