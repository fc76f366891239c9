"""What megatron-core and DeepSpeed do wrong in silence (each trap was met), and that here the right thing happens.

Layouts whose result would be wrong are refused: see tests/config/test_tree.py, SILENT_TRAPS.
"""

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from split_run import saved, saved_pieces, train, truth_of
from truth import MODERN, make_config, plain_loss, plain_model, share_of_step

from esolm_megatron.model.loss import predicted_losses

pytestmark = pytest.mark.gloo

TIED = MODERN | {"num_layers": 5, "tied_embeddings": True}
WIDE = MODERN | {"num_heads": 8, "num_kv_heads": 4}


def linears_of(config):
    from esolm_megatron.parallel import groups
    from esolm_megatron.parallel.megatron_layers import MegatronLinears, megatron_config

    topology, device = groups.start(config)
    return MegatronLinears(megatron_config(config, device), topology, device), topology.tensor_rank


def row_of_a_view(config):
    linears, rank = linears_of(config)
    layer = linears.row(10, 3, bias=False)
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(10, 7, generator=generator), torch.randn(3, 10, generator=generator)
    with torch.no_grad():
        layer.weight.copy_(weight[:, rank * 5 : rank * 5 + 5])
        view = x[rank * 5 : rank * 5 + 5].t()[:, None]
        assert not view.is_contiguous()
        return (layer(view).squeeze(1) - x.t() @ weight.t()).abs().max().item()


def test_row_linear_sums_over_ranks_whatever_the_memory_layout_of_its_input():
    assert max(run_ranks(row_of_a_view, 2, make_config(parallel={"tensor_size": 2}))) < 1e-5


def memory_of_own_tokens(config):
    linears, _ = linears_of(config)
    x = torch.arange(8.0)[:, None].requires_grad_()
    own = linears.scatter_tokens(x)
    own.sum().backward()
    return own[:, 0].tolist(), own.untyped_storage().nbytes(), x.grad[:, 0].tolist()


def test_a_ranks_own_tokens_do_not_keep_those_of_all():
    """megatron-core gives a view, and what autograd saves of it holds all that it is a part of."""
    config = make_config(parallel={"tensor_size": 2, "sequence_parallel": True})
    for rank, (own, held, grad) in enumerate(run_ranks(memory_of_own_tokens, 2, config)):
        assert (own, held, grad) == ([4.0 * rank + i for i in range(4)], 16, [1.0] * 8)


def split_losses(config):
    """Losses over a vocabulary of 51 and the mask, padded to 60 and cut over ranks: the last slices are padding only."""
    linears, rank = linears_of(config)
    size = 60 // linears.tensor_size
    generator = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(n, 7, generator=generator, dtype=torch.float64) for n in (11, 60))
    bias, targets = torch.randn(60, generator=generator, dtype=torch.float64), torch.randint(0, 51, (11,))
    dist.broadcast(targets, 0)
    whole = [t.clone().requires_grad_() for t in (x, weight, bias)]
    shares = [x, *(t.chunk(linears.tensor_size)[rank] for t in (weight, bias))]
    mine = [t.clone().requires_grad_() for t in shares]
    logits = F.linear(*whole).index_fill(1, torch.arange(51, 60), float("-inf"))
    expected, errors = F.cross_entropy(logits, targets, reduction="none"), []
    weights = torch.arange(11.0, dtype=torch.float64)
    theirs = list(torch.autograd.grad((expected * weights).sum(), whole))
    theirs[1:] = [t.chunk(linears.tensor_size)[rank] for t in theirs[1:]]
    options = {"first_id": rank * size, "num_ids": max(51 - rank * size, 0), "over_ranks": linears.over_ranks}
    for chunk, counts in ((10**6, None), (10**6, weights), (3 * size, None), (3 * size, weights)):
        losses = predicted_losses(linears.copy_to_ranks(mine[0]), *mine[1:], targets, counts, chunk=chunk, **options)
        found = torch.autograd.grad((losses * weights).sum(), mine)
        errors += [(losses - expected).abs().max().item()]
        errors += [(a - b).abs().max().item() for a, b in zip(found, theirs, strict=True)]
    none = predicted_losses(mine[0][:0], *mine[1:], targets[:0], **options)
    empty = torch.autograd.grad(none.sum(), mine)
    return max(errors), tuple(none.shape), [bool(g.any()) for g in empty]


@pytest.mark.parametrize("size", [2, 4])
def test_split_vocabulary_loss_ignores_mask_and_padding_and_takes_no_tokens_at_all(size):
    config = make_config(WIDE, parallel={"tensor_size": size})
    for error, none, empty in run_ranks(split_losses, size, config):
        assert error < 1e-12
        assert none == (0,)
        assert empty == [False, False, False]


def weights_at_the_start(config):
    from esolm_megatron.parallel.engine import Engine

    engine = Engine(config)
    groups = [len(engine.state.flats), len({g["weight_decay"] for g in engine.deepspeed.optimizer.param_groups})]
    return {"pieces": saved_pieces(engine), "groups": groups}


@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor_size": 2},
        {"pipeline_size": 2, "layers_per_stage": [1, 4]},
        {"pipeline_size": 2, "virtual_pipeline_size": 2},
        {"context_size": 2, "zero_stage": 3},
    ],
    ids=str,
)
def test_the_same_seed_gives_the_same_weights_and_every_stage_as_many_parameter_groups(parallel):
    """megatron-core's own seeds differ over stages; DeepSpeed hangs where stages differ in groups."""
    config = make_config(TIED, parallel=parallel)
    results = run_ranks(weights_at_the_start, 2, config)
    assert all(r["groups"] == [2, 2] for r in results)
    weights, model = saved(results)["weight"], plain_model(config)
    assert weights.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(weights[name], parameter), name


@pytest.mark.parametrize(
    "parallel",
    [
        {"pipeline_size": 2},
        {"pipeline_size": 2, "zero_stage": 0},
        {"pipeline_size": 2, "offload_optimizer": True},
        {"tensor_size": 2, "sequence_parallel": True, "zero_stage": 2},
        {"tensor_size": 2, "zero_stage": 3},
    ],
    ids=str,
)
def test_the_norm_counts_every_parameter_once(parallel):
    """The tied head's copy, norms that all tensor ranks hold, and QK-norms that see some heads each."""
    config = make_config(TIED, parallel=parallel)
    results = run_ranks(train, 2, config, 1)
    for result in results:
        assert result["norms"] == pytest.approx(truth_of(config)["norms"][:1], rel=1e-5)


def step_without_backward(config):
    from esolm_megatron.parallel.engine import Engine

    with pytest.raises(RuntimeError, match=r"no gradient for .*layers\.0\.norm1\.weight"):
        Engine(config).state.gradients()
    return True


@pytest.mark.parametrize("parallel", [{}, {"offload_optimizer": True}], ids=str)
def test_a_parameter_without_gradient_is_an_error(parallel):
    """megatron-core's finalize_model_grads skips it without a word."""
    assert all(run_ranks(step_without_backward, 2, make_config(parallel=parallel)))


def unfinished(config):
    from esolm_megatron.parallel import zero
    from esolm_megatron.parallel.engine import Engine

    zero._summed_over_tensor_ranks = lambda gradient: gradient
    engine = Engine(config)
    return engine.train_step(share_of_step(config, 0), 1e-3).grad_norm


def test_zero_2_needs_the_sum_over_tensor_ranks_that_it_gets_here():
    """Without the hook the norm is another: so the table above would see it missing."""
    config = make_config(TIED, parallel={"tensor_size": 2, "sequence_parallel": True, "zero_stage": 2})
    expected = truth_of(config)["norms"][0]
    assert all(abs(norm / expected - 1) > 1e-4 for norm in run_ranks(unfinished, 2, config))


def one_place(config):
    from esolm_megatron.objective.esolm import Noised
    from esolm_megatron.parallel.engine import Engine

    engine = Engine(config)
    result = engine.train_step(Noised([with_one_place(config)], torch.tensor([16.0, 16.0]).double()), 1e-3)
    return result.loss, result.grad_norm


def with_one_place(config):
    (batch,) = share_of_step(config, 0, num_micro_batches=1).micro_batches
    cut = {k: getattr(batch, k)[:1] for k in ("places", "targets", "weights", "parts", "sources")}
    return dataclasses.replace(batch, **cut)


@pytest.mark.parametrize("parallel", [{"context_size": 2}, {"context_size": 2, "zero_stage": 3}], ids=str)
def test_a_context_rank_without_any_loss_takes_part(parallel):
    from esolm_megatron.objective.esolm import Noised

    config = make_config(WIDE, parallel=parallel)
    model = plain_model(config)
    loss = plain_loss(model, Noised([with_one_place(config)], torch.tensor([16.0, 16.0]).double()))
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()
    for found in run_ranks(one_place, 2, config):
        assert found == pytest.approx((loss.item(), norm), rel=1e-5)


def attend_split(config):
    import megatron.core.parallel_state as ps

    from esolm_megatron.parallel import groups
    from esolm_megatron.parallel.context import ContextAttention, own_share

    topology, _ = groups.start(config)
    rank, size = topology.context_rank, topology.context_size
    (batch,) = share_of_step(config, 0, num_micro_batches=1).micro_batches
    share, tokens, shared = own_share(batch, rank, size), batch.layout.num_tokens, config.model.kv_heads
    assert torch.equal(batch.tokens[batch.places[batch.places % size == rank]], share.tokens[share.places])
    generator = torch.Generator().manual_seed(3)
    q, k, v, g = (torch.randn(tokens, n, 6, generator=generator, dtype=torch.float64) for n in (8, shared, shared, 8))
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    mine = [x[rank::size].clone().requires_grad_() for x in (q, k, v)]
    expected = batch.attend(0, *whole)
    found, again = (ContextAttention(batch.attend, ps.get_context_parallel_group())(0, *mine) for _ in range(2))
    expected.backward(g)
    gradients, repeated = (torch.autograd.grad(x, mine, g[rank::size]) for x in (found, again))
    assert all(map(torch.equal, (found, *gradients), (again, *repeated))), "other bits the second time"
    pairs = [(found, expected), *((m, w.grad) for m, w in zip(gradients, whole, strict=True))]
    return [(a - b[rank::size]).abs().max().item() for a, b in pairs]


@pytest.mark.parametrize("cross_document", [True, False])
@pytest.mark.parametrize(("size", "kv_heads"), [(2, 4), (4, 4), (2, 1), (4, 2), (4, 1)])
def test_attention_over_context_ranks_is_that_of_one(size, kv_heads, cross_document):
    config = make_config(
        WIDE | {"num_kv_heads": kv_heads},
        parallel={"context_size": size},
        data={"cross_document": cross_document},
    )
    assert np.max(run_ranks(attend_split, size, config)) < 1e-12


def test_tokens_that_do_not_divide_are_refused():
    from esolm_megatron.parallel.context import own_share

    (batch,) = share_of_step(make_config(), 0, num_micro_batches=1).micro_batches
    with pytest.raises(ValueError, match="packed tokens do not divide over 7 context ranks"):
        own_share(batch, 0, 7)


def test_no_kernels_are_compiled_on_a_cpu():
    """DeepSpeed would spend 20 s on shared-memory collectives, and a minute on each of its Adams."""
    import deepspeed

    from esolm_megatron.parallel import groups
    from esolm_megatron.parallel.zero import deepspeed_config

    assert groups
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
    settings = deepspeed_config(make_config(parallel={"offload_optimizer": True}, train={"precision": "bf16"}))
    assert settings["zero_force_ds_cpu_optimizer"] is False
    assert settings["managed_gradient_accumulation"] is False, "else DeepSpeed counts micro-batches of its own"
    assert settings["communication_data_type"] == "fp32"
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}, "either one alone lets weights drift by 1e-2"
    assert settings["zero_optimization"]["round_robin_gradients"] is False, "fragments would be elsewhere"


def step_with_bad_weights(config):
    from esolm_megatron.parallel.engine import Engine

    engine = Engine(config)
    with torch.no_grad():
        engine.state.flats[0].fill_(float("nan"))
    engine.state.partitions.publish()
    return engine.train_step(share_of_step(config, 0), 1e-3).grad_norm


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_norm_that_is_not_finite_is_nan(zero, precision):
    """DeepSpeed gives -1 under some stages, and infinity under others."""
    (norm,) = run_ranks(
        step_with_bad_weights, 1, make_config(parallel={"zero_stage": zero}, train={"precision": precision})
    )
    assert np.isnan(norm)
