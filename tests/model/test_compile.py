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


def graphs_of_steps(shape, **options):
    """Compares compiled with plain steps on batches with other numbers of masks; graphs that exist after each step."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    config = make_config(shape | {"num_layers": 4, "seq_length": 40})
    plain, compiled = plain_model(config), plain_model(config)
    compiled.compile_blocks(backend="eager")  # compiling again starts from the block itself
    compiled.compile_blocks(**options)
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
    assert graphs_of_steps(shape, backend="aot_eager") == [3, 3, 3, 3]


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_the_same_with_generated_code(cuda_graphs):
    """On a CPU nothing is recorded, but the last block, which is compiled without, needs its graphs twice."""
    assert graphs_of_steps(MODERN, cuda_graphs=cuda_graphs) == ([4, 4, 4, 4] if cuda_graphs else [3, 3, 3, 3])


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


@pytest.mark.parametrize(
    ("other", "named"),
    [({"train": {"compile": False}}, "train.compile"), ({"train": {"compile": True, "device": "cpu"}}, "train.device"),
     ({"train": {"precision": "fp32"}}, "train.precision"), ({"parallel": {"pipeline_size": 2}}, "parallel.pipeline_size"),
     ({"parallel": {"recompute": "full"}}, "recompute")],
    ids=str,
)  # fmt: skip
def test_what_does_not_go_with_cuda_graphs_is_refused(other, named):
    train = {"compile": True, "device": "cuda", "precision": "bf16"}
    with pytest.raises(ConfigError, match=f"train.cuda_graphs = true: .*{named}"):
        make_config(**{**other, "train": {**train, **other.get("train", {}), "cuda_graphs": True}})
    make_config(train={**train, "cuda_graphs": True})
