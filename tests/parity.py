"""Helpers for comparing with numbers that the reference implementation computed."""

import os
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from checkpoints_conversion.reference import fold, model_config
from esolm_megatron.config import ModelConfig
from esolm_megatron.model.layers import PlainLinears
from esolm_megatron.model.transformer import EsoLM, initialise
from esolm_megatron.objective.esolm import OrderedRows

FULL = Path(os.environ.get("ESOLM_REFERENCE_FIXTURES", Path(__file__).parents[2] / "shared" / "fixtures" / "official"))
OURS = Path(__file__).parent / "fixtures" / "official"
NUM_HEADS, LENGTH, MASK = 4, 32, 100


def fixture_path(name):
    """The reference's file: all cases where ../shared is there, else the copy of a few that travels with the tests."""
    for folder in (FULL, OURS):
        if (folder / f"{name}.safetensors").exists():
            return folder / f"{name}.safetensors"
    return None


def load_case(name):
    return load_file(fixture_path(name))


def metadata(name):
    with safe_open(fixture_path(name), "pt") as file:
        return file.metadata()


class Reference:
    """The reference's network in ours, with gradients that flow back to the reference's own weights."""

    def __init__(self, dtype=torch.float64):
        raw = load_case("weights")
        self.weights = {k: v.to(dtype).requires_grad_(k != "rotary_emb.inv_freq") for k, v in raw.items()}
        self.model = EsoLM(model_config(raw, NUM_HEADS, LENGTH), PlainLinears(dtype))
        folded = fold(self.weights, NUM_HEADS)
        missing = {n for n, _ in self.model.named_parameters()} ^ folded.keys()
        assert not missing, missing
        self.folded = folded

    def __call__(self, *args, **kwargs):
        return torch.func.functional_call(self.model, self.folded, args, kwargs)

    def loaded(self):
        """A plain model that owns the folded weights."""
        self.model.load_state_dict({k: v.detach() for k, v in self.folded.items()})
        return self.model

    def gradients(self, loss):
        names = [k for k, v in self.weights.items() if v.requires_grad]
        grads = torch.autograd.grad(loss, [self.weights[k] for k in names], allow_unused=True, retain_graph=True)
        return {k: torch.zeros_like(self.weights[k]) if g is None else g for k, g in zip(names, grads, strict=True)}


MODERN = {
    "norm": "rmsnorm", "activation": "swiglu", "mlp_bias": False, "output_bias": False, "tied_embeddings": True,
    "qk_norm": True, "num_heads": 6, "num_kv_heads": 3,
}  # fmt: skip
"""The shape of today's models, for `random_model`."""


@torch.no_grad()
def random_model(dtype=torch.float64, seed=0, spread=1.0, **shape):
    """A small model with large random weights in every tensor, so that its predictions are far from uniform."""
    defaults = {"num_layers": 2, "hidden_size": 36, "num_heads": 3, "vocab_size": 23, "seq_length": 13}
    model = EsoLM(ModelConfig(**{**defaults, **shape}), PlainLinears(dtype))
    initialise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_(noise.to(dtype), alpha=spread / parameter.shape[-1] ** 0.5)
    return model


def rows_of(case, part, valid):
    """The reference's own draw as OrderedRows, with weights of one on masked valid tokens."""
    x0, order = case[f"{part}.x0"].long().numpy(), case[f"{part}.sort_idx"].long().numpy()
    noisy = case[f"{part}.xt" if part == "diff" else "seq.z0"].long().numpy()
    masked = noisy == MASK
    return OrderedRows(x0, order, masked, (masked & valid).astype(np.float64), np.arange(len(x0)))
