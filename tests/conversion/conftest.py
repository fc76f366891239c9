import pytest
import torch
from conversion.reference_files import Opaque, omega, write_folder
from parity import LENGTH, NUM_HEADS, load_case


@pytest.fixture(scope="session")
def theirs():
    """The reference's weights in the order in which its module tree lists them, buffer included."""
    raw = load_case("weights")
    block = ("norm1.", "attn_qkv.", "attn_out.", "norm2.", "mlp.0.", "mlp.2.", "adaLN_modulation.")
    heads = ["vocab_embed.", "sigma_map.mlp.0.", "sigma_map.mlp.2.", "rotary_emb."]
    heads += [f"blocks.{i}.{part}" for i in range(2) for part in block]
    heads += ["output_layer.norm_final.", "output_layer.linear.", "output_layer.adaLN_modulation."]
    ends = ("embedding", "inv_freq", "weight", "bias")
    names = [head + end for head in heads for end in ends if head + end in raw]
    assert sorted(names) == sorted(raw)
    return {name: raw[name] for name in names}


@pytest.fixture
def hub_folder(tmp_path, theirs):
    return write_folder(tmp_path / "hub", theirs)


@pytest.fixture
def lightning(theirs):
    """A tree as Lightning saves it: last weights 1 off, the fixture's weights as moving average, objects of lost classes."""
    algo = {"name": "esolm", "alpha_0": 0.25, "diffusion_attn_mode": "causal", "sequential_attn_mode": "causal"}
    return {
        "epoch": 3,
        "global_step": 77,
        "state_dict": {f"backbone.{name}": tensor + 1 for name, tensor in theirs.items()} | {"metric": torch.ones(1)},
        "ema": {"decay": 0.9999, "shadow_params": [t for n, t in theirs.items() if n != "rotary_emb.inv_freq"]},
        "hyper_parameters": {
            "config": omega({"model": {"n_heads": NUM_HEADS, "length": LENGTH}, "algo": algo}),
            "tokenizer": Opaque(vocab={"a": 1}),
        },
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
    }
