"""Compiled blocks: the same numbers, one graph before and one after attention, and none anew between steps."""

import pytest
import torch
from cuda_rules import cuda_operators
from truth import MODERN, REFERENCE, make_config, plain_model, share_of_step

from esolm_megatron.config import ConfigError
from esolm_megatron.model import between
from esolm_megatron.model.rotary import rotary_tables
from esolm_megatron.model.transformer import NO_DROPOUT
from esolm_megatron.objective.esolm import mean_loss, part_sums, token_counts


def loss_of(model, noised):
    """The loss as the trainer computes it: dropout, the last block at places with loss only."""
    (batch,) = noised.micro_batches
    counts = token_counts(batch, noised.num_valid)
    losses = model(
        batch.tokens, batch.positions, batch.attend, targets=batch.targets, counts=counts, dropout_ids=batch.dropout_ids,
        last=batch.last,
    )  # fmt: skip
    return mean_loss(part_sums(losses, batch), noised.num_valid)


def graphs_of_steps(shape, *, recompute="none", **options):
    """Compares compiled with plain steps on batches with other numbers of masks; graphs that exist after each step."""
    torch._dynamo.reset()
    between._compiled.cache_clear()
    counters = torch._dynamo.utils.counters
    counters.clear()
    config = make_config(shape | {"num_layers": 4, "seq_length": 40})
    plain, compiled = plain_model(config), plain_model(config)
    for block in compiled.layers.values():
        block.recompute_mlp = recompute == "selective"
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


DROPPED = REFERENCE | {"dropout": 0.1}


@pytest.mark.parametrize(
    ("shape", "options", "graphs"),
    [
        (MODERN, {}, 3),  # before and after attention, and the latter again for the last block, whose tokens vary
        (REFERENCE, {}, 3),
        (DROPPED, {}, 4),  # and the embedding's
        (MODERN, {"recompute": "selective"}, 3),
        (MODERN, {"apart": True}, 7),  # norm, activation and residual for all tokens and for some; heads
        (DROPPED, {"apart": True}, 8),
        (DROPPED, {"apart": True, "recompute": "selective"}, 8),
    ],
    ids=str,
)
def test_few_graphs_for_all_blocks_and_none_anew(shape, options, graphs):
    assert graphs_of_steps(shape, backend="aot_eager", **options) == [graphs] * 4


@pytest.mark.parametrize(
    ("shape", "options", "graphs"),
    [
        (MODERN, {}, 3),
        (DROPPED, {"apart": True}, 8),
        pytest.param(DROPPED, {}, 4, marks=pytest.mark.slow),
        pytest.param(MODERN, {"cuda_graphs": True}, 4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_same_with_generated_code(shape, options, graphs):
    """On a CPU nothing is recorded, but the last block, which is compiled without, needs its graphs twice."""
    assert graphs_of_steps(shape, **options) == [graphs] * 4


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


@pytest.mark.parametrize("apart", [False, True])
def test_a_gpus_kernels_of_passes_stay_out_of_compiled_blocks(apart):
    """Traced through a GPU's branches, with gradients and without: a compiler fuses torch's operators, not calls of Triton."""
    torch._dynamo.reset()
    between._compiled.cache_clear()
    model = plain_model(make_config(MODERN)).float()
    x, rope = torch.randn(5, 1, 48), rotary_tables(torch.arange(5), 8, 10000.0, torch.float32)
    mixed = torch.randn(5, 6, 8)

    def results():
        block = model.layers["0"]
        return [*block._before(x, rope), block._after(x, mixed, NO_DROPOUT)]

    plain = results()
    with cuda_operators():
        model.compile_blocks(backend="eager", apart=apart)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                for ours, theirs in zip(results(), plain, strict=True):
                    torch.testing.assert_close(ours, theirs)
