"""Muon on cut matrices: what torch's Muon does on one process, on every layout; its state; rates that hold across widths."""

import pytest
import torch
from ranks import run_ranks
from split_run import NUM_STEPS, close, saved, train
from test_states import assert_unchanged, load, start
from torch.optim import _muon
from truth import MODERN, REFERENCE, make_config, plain_loss, plain_model, share_of_step

from esolm_megatron.config import ConfigError
from esolm_megatron.parallel import muon

MODEL = MODERN | {"num_layers": 3, "init_std": 0.1}
KINDS = ("weight", "exp_avg", "exp_avg_sq", "momentum_buffer", "ema")


def config_of(model=MODEL, optim=None, **sections):
    return make_config(model, optim={"name": "muon", "lr": 0.01, **(optim or {})}, **sections)


@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (40, 24)])
def test_matrices_are_made_orthogonal_as_torch_does(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.bfloat16)
    theirs = _muon._zeropower_via_newtonschulz(matrix.clone(), muon.COEFFICIENTS, muon.STEPS, muon.EPS)
    assert torch.equal(muon.orthogonal(matrix), theirs)
    values = torch.linalg.svdvals(muon.orthogonal(torch.randn(shape, dtype=torch.float64)))
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_the_rows_of_each_matrix():
    """Heads of queries, keys and values lie side by side for each key-value head; the gate before what it gates."""
    config = make_config(MODEL).model
    assert (config.kv_heads, config.num_heads, config.head_dim) == (2, 6, 8)
    q, k, v = muon.parts(config, "layers.0.attention.qkv.weight", 80)
    assert q.tolist() == [*range(24), *range(40, 64)]
    assert k.tolist() == [*range(24, 32), *range(64, 72)]
    assert v.tolist() == [*range(32, 40), *range(72, 80)]
    assert [x.tolist() for x in muon.parts(config, "layers.0.mlp.fc1.weight", 6)] == [[0, 1, 2], [3, 4, 5]]
    plain = make_config(REFERENCE).model
    for name in ("mlp.fc1.weight", "mlp.fc2.weight", "attention.out.weight"):
        assert len(muon.parts(plain, f"layers.0.{name}", 6)) == 1


def plain_muon(config, monkeypatch):
    """Losses and weights of one process with torch's own Muon and AdamW, each matrix a parameter of its own."""
    monkeypatch.setattr(
        _muon, "_zeropower_via_newtonschulz", lambda x, *_: muon.orthogonal(x)
    )  # torch's rounds to bf16
    model, o, losses = plain_model(config), config.optim, []
    named = dict(model.named_parameters())
    blocks = {n: p for n, p in named.items() if n.startswith("layers.") and p.dim() > 1}
    rows = {n: muon.parts(config.model, n, len(p)) for n, p in blocks.items()}
    cut = {n: [torch.nn.Parameter(p[r].detach().clone()) for r in rows[n]] for n, p in blocks.items()}
    own = torch.optim.Muon(
        [x for xs in cut.values() for x in xs], lr=o.lr, weight_decay=o.weight_decay, momentum=o.momentum,
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    rest = [p for n, p in named.items() if n not in blocks]
    others = [[p for p in rest if p.dim() > 1], [p for p in rest if p.dim() <= 1]]
    groups = [{"params": x, "weight_decay": d} for x, d in zip(others, (o.weight_decay, 0.0), strict=True)]
    adam = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps)
    for step in range(NUM_STEPS):
        model.zero_grad()
        loss = plain_loss(model, share_of_step(config, step, num_micro_batches=1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), o.clip_grad)
        for name, pieces in cut.items():
            for piece, r in zip(pieces, rows[name], strict=True):
                piece.grad = blocks[name].grad[r]
        own.step()
        adam.step()
        with torch.no_grad():
            for name, pieces in cut.items():
                for piece, r in zip(pieces, rows[name], strict=True):
                    blocks[name][r] = piece
        losses.append(loss.item())
    return losses, {n: p.detach() for n, p in named.items()}


LAYOUTS = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2_sp_dp2": (4, {"tensor_size": 2, "sequence_parallel": True}),
    "pp2_dp2": (4, {"pipeline_size": 2}),
    "cp2_zero2": (2, {"context_size": 2, "zero_stage": 2}),
    "tp2_dp2_zero0": (4, {"tensor_size": 2, "zero_stage": 0}),
}


@pytest.mark.gloo
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_does_what_torchs_muon_does_on_one_process(layout, monkeypatch):
    world, parallel = LAYOUTS[layout]
    config = config_of(parallel=parallel)
    losses, weights = plain_muon(config, monkeypatch)
    results = run_ranks(train, world, config, NUM_STEPS)
    for result in results:
        assert result["losses"] == pytest.approx(losses, rel=1e-4)
    close(saved(results)["weight"], weights, 1e-3)


def counted(config):
    """One rank: shapes that were made orthogonal in each of two bf16 steps, the losses, and what is saved."""
    from esolm_megatron.parallel.engine import Engine

    engine, shapes, made = Engine(config), [], muon.orthogonal
    muon.orthogonal = lambda matrix: (shapes.append((matrix.dtype, *matrix.shape)), made(matrix))[1]
    top, losses = engine.topology, []
    for step in range(2):
        losses.append(engine.train_step(share_of_step(config, step, top.data_rank, top.data_size), 3e-3).loss)
    return shapes, losses


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("world", "parallel"), [(1, {}), (2, {}), (4, {"tensor_size": 2, "reduce_bucket_elements": 1})]
)
def test_each_matrix_is_worked_on_once_by_one_of_the_ranks(world, parallel):
    config = config_of(parallel=parallel, train={"precision": "bf16"})
    results = run_ranks(counted, world, config)
    each = [(48, 48), (16, 48), (16, 48), (48, 48), (44, 48), (44, 48), (48, 44)]
    wanted = [(torch.bfloat16, *shape) for shape in each * MODEL["num_layers"] * 2]
    assert sorted((x for shapes, _ in results for x in shapes), key=str) == sorted(wanted, key=str)
    counts = [len(shapes) for shapes, _ in results]
    assert max(counts) <= sum(counts) / world + 8, "shared evenly"


@pytest.mark.gloo
def test_its_momentum_moves_between_layouts():
    state = saved(run_ranks(start, 2, config_of()))
    state = {kind: {n: t.numpy() for n, t in tensors.items()} for kind, tensors in state.items()}
    inside = {n for n in state["weight"] if n.startswith("layers.") and state["weight"][n].ndim > 1}
    assert {*state["momentum_buffer"]} == inside
    assert {*state["exp_avg"]} == {*state["weight"]} - inside
    (alone,) = run_ranks(load, 1, config_of(), state)
    for parallel in ({"tensor_size": 2}, {"pipeline_size": 2}):
        results = run_ranks(load, 2, config_of(parallel=parallel), state)
        assert_unchanged(results, state, KINDS)
        close(saved(results, "after")["weight"], saved([alone], "after")["weight"], 1e-3)


@pytest.mark.gloo
def test_another_optimizer_begins_with_moments_of_zero():
    state = saved(run_ranks(start, 1, make_config(MODEL)))
    state = {kind: {n: t.numpy() for n, t in tensors.items()} for kind, tensors in state.items()}
    (result,) = run_ranks(load, 1, config_of(), state)
    found = saved([result])
    assert not any(t.any() for t in found["momentum_buffer"].values())
    assert torch.equal(found["exp_avg"]["embedding.weight"], torch.from_numpy(state["exp_avg"]["embedding.weight"]))


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"parallel": {"zero_stage": 3}}, "optim.name = muon: parallel.zero_stage = 3 updates pieces"),
        ({"parallel": {"offload_optimizer": True}}, "set parallel.offload_optimizer=false"),
        (
            {"model": MODEL | {"tied_embeddings": True}, "optim": {"base_width": 8}},
            "optim.base_width = 8: a head scales",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(sections, said):
    with pytest.raises(ConfigError, match=said):
        config_of(**sections)


WIDTHS = (32, 64, 128, 256)


def grown(config):
    """Root mean squares of what 4 steps added to hidden states before the head, and to logits."""
    from esolm_megatron.parallel.engine import Engine

    engine, seen = Engine(config), []
    engine.chunks[0].head.register_forward_pre_hook(lambda head, inputs: seen.append(inputs[0].detach().clone()))
    before = engine.probe()["logits_weight"][:, :-1]
    for step in range(4):
        engine.train_step(share_of_step(config, step, skewed=True), config.optim.lr)
    after = engine.probe()["logits_weight"][:, :-1]
    return float((seen[-1] - seen[0]).square().mean().sqrt()), float((after - before).square().mean().sqrt())


@pytest.mark.gloo
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_rates_found_for_one_width_hold_for_others(name):
    """What training adds to activations stays as large at 8 times the width with a base width, and grows without."""

    def ratios(base):
        found = []
        for width in WIDTHS:
            model = MODEL | {
                "hidden_size": width,
                "num_heads": width // 8,
                "num_kv_heads": None,
                "ffn_hidden_size": 2 * width,
            }
            config = make_config(
                model, optim={"name": name, "lr": 3e-3, "base_width": base, "ema_decay": 0, "clip_grad": 0}
            )
            found += run_ranks(grown, 1, config)
        return [x / y for each in found for x, y in zip(each, found[0], strict=True)]

    assert all(0.6 < ratio < 1.25 for ratio in ratios(WIDTHS[0]))
    assert ratios(None)[-1] > 3
