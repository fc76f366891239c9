"""Import of checkpoints written by the Eso-LM reference implementation: the network without adaLN, exactly.

The reference wraps each block in adaLN whose time input is always zero, so shifts, scales and gates are constants. Folding
them into norms, the attention output and the second MLP matrix changes logits by rounding only (arXiv 2506.01928).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from esolm_megatron.config import ModelConfig


class ForeignCheckpoint(ValueError):
    """A checkpoint that is not the reference's, or not one that this import knows."""


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
    return 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))


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
    shift1, scale1, gate1, shift2, scale2, gate2 = _modulation(
        state, theirs + "adaLN_modulation", condition, 6, norm1
    )
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
