"""Inputs of blocks that wait for backward in host memory: what goes there, and that nothing else changes."""

import pytest
import torch
from truth import MODERN, make_config, plain_loss, share_of_step

from esolm_megatron.config import ConfigError
from esolm_megatron.model import transformer
from esolm_megatron.model.layers import PlainLinears
from esolm_megatron.model.transformer import EsoLM, initialise


def gradients(offload, monkeypatch):
    """Gradients of a step, and shapes that were copied away and back."""
    copies, original = [], transformer.waiting_in_host_memory

    def seen(x):
        hooks = original(x)

        def away(saved):
            device, kept = hooks.pack_hook(saved)
            if kept is not saved:
                copies.append((saved.device, kept.data_ptr() != saved.data_ptr(), tuple(kept.shape)))
            return device, kept

        return torch.autograd.graph.saved_tensors_hooks(away, hooks.unpack_hook)

    config = make_config(MODERN | {"dropout": 0.1})
    model = EsoLM(config.model, PlainLinears(), recompute="full", offload=offload)
    initialise(model, 0)
    batch = share_of_step(config, 0, num_micro_batches=1)
    with monkeypatch.context() as patch:
        patch.setattr(transformer, "waiting_in_host_memory", seen)
        plain_loss(model, batch).backward()
    return {n: p.grad for n, p in model.named_parameters()}, copies, len(batch.micro_batches[0].tokens)


def test_each_block_s_input_goes_once_and_gradients_are_the_same(monkeypatch):
    there, none, _ = gradients(False, monkeypatch)
    away, copies, tokens = gradients(True, monkeypatch)
    assert none == []
    assert copies == [(torch.device("cpu"), True, (tokens, 1, MODERN["hidden_size"]))] * MODERN["num_layers"]
    for name, gradient in there.items():
        assert torch.equal(gradient, away[name]), name


def test_without_full_recomputation_it_is_refused():
    with pytest.raises(ConfigError, match="offload_activations = true: recompute = selective keeps more"):
        make_config(parallel={"offload_activations": True, "recompute": "selective"})
    make_config(parallel={"offload_activations": True, "recompute": "full"})
