"""Compiled blocks: the same numbers, one graph before and one after attention, and none anew between steps."""

import pytest
import torch
from truth import MODERN, REFERENCE, make_config, plain_model, share_of_step

from esolm_megatron.config import ConfigError
from esolm_megatron.objective.esolm import mean_loss, part_sums


def loss_of(model, noised):
    """The loss as the trainer computes it, the last block at places with loss only."""
    (batch,) = noised.micro_batches
    losses = model(batch.tokens, batch.positions, batch.attend, targets=batch.targets, last=batch.last)
    return mean_loss(part_sums(losses, batch), noised.num_valid)


def graphs_of_steps(shape, backend):
    """Compares compiled with plain steps on batches with other numbers of masks; graphs that exist after each step."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    config = make_config(shape | {"num_layers": 4, "seq_length": 40})
    plain, compiled = plain_model(config), plain_model(config)
    for block in compiled.layers.values():
        block.compile(backend=backend)
    graphs, places = [], set()
    for step in range(4):
        noised = share_of_step(config, step, num_micro_batches=1)
        places.add(len(noised.micro_batches[0].last.fed))
        losses = [loss_of(model, noised) for model in (plain, compiled)]
        for loss in losses:
            loss.backward()
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=2e-6)
        graphs.append(counters["stats"]["unique_graphs"])
    for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-5 * a.grad.norm() + 1e-7, name
    assert len(places) > 1, "the last block had other shapes"
    assert not counters["graph_break"]
    return graphs


@pytest.mark.parametrize("shape", [MODERN, REFERENCE], ids=["modern", "reference"])
def test_two_graphs_for_all_blocks_and_one_for_the_last(shape):
    """Before and after attention, and the latter again for the last block, whose number of tokens varies."""
    assert graphs_of_steps(shape, "aot_eager") == [3, 3, 3, 3]


@pytest.mark.slow
def test_the_same_with_generated_code():
    assert graphs_of_steps(MODERN, "inductor") == [3, 3, 3, 3]


@pytest.mark.parametrize(
    "other",
    [{"parallel": {"zero_stage": 3}}, {"parallel": {"recompute": "selective"}}, {"parallel": {"tensor_size": 2}},
     {"model": MODERN | {"dropout": 0.1}}],
    ids=str,
)  # fmt: skip
def test_what_does_not_go_with_it_is_refused(other):
    with pytest.raises(ConfigError, match="train.compile = true"):
        make_config(**{"train": {"compile": True}, **other})
    make_config(**{"train": {"compile": False}, **other})
