"""Every layout trains the model that one process trains: losses, gradients, weights after clipped steps."""

import numpy as np
import pytest
import torch
from ranks import run_ranks
from truth import MODERN, REFERENCE, make_config, plain_model, plain_run, share_of_step

from esolm_megatron.model.attention import PackedAttention, PackedLayout
from esolm_megatron.objective.esolm import part_sums

pytestmark = pytest.mark.gloo

LAYOUTS = {
    "dp1": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tensor_size": 2}),
    "tp2_sp": (2, {"tensor_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_size": 2}),
    "pp2_vp2": (2, {"pipeline_size": 2, "virtual_pipeline_size": 2}),
    "tp2_pp2": (4, {"tensor_size": 2, "pipeline_size": 2}),
    "tp2_sp_pp2": (4, {"tensor_size": 2, "sequence_parallel": True, "pipeline_size": 2}),
    "tp2_dp2": (4, {"tensor_size": 2}),
}
NUM_STEPS = 5


def train(config, num_steps):
    """One rank: losses, norms, and its pieces of gradients, weights and moving average."""
    from esolm_megatron.model.layers import boxes, split_of, whole_shape
    from esolm_megatron.parallel.engine import Engine

    engine = Engine(config)
    top = engine.topology
    out = {"losses": [], "norms": [], "grads": [], "pieces": []}
    for step in range(num_steps):
        noised = share_of_step(config, step, top.data_rank, top.data_size)
        loss = engine.forward_backward(noised)[0].item()
        if step == 0 and config.parallel.zero_stage < 2:
            for owned in engine.owned:
                grad = engine.state.gradients()[owned.parameter].clone()
                torch.distributed.all_reduce(grad, group=_data_group())
                shape = tuple(grad.shape)
                whole = whole_shape(shape, split_of(owned.parameter), top.tensor_size)
                for box in boxes(shape, split_of(owned.parameter), top.tensor_rank, top.tensor_size):
                    piece = grad[_slices(box.local, box.shape)] / torch.distributed.get_world_size(_data_group())
                    out["grads"].append((owned.name, whole, box.whole, piece.numpy()))
        norm = engine.state.step(config.optim.lr)
        out["losses"].append(loss)
        out["norms"].append(norm)
    for piece in engine.pieces():
        if piece.kind in ("weight", "ema"):
            key = f"{piece.kind}|{piece.name}"
            out["pieces"].append((key, piece.whole_shape, piece.offset, piece.tensor.clone().numpy()))
    return out


def _data_group():
    import megatron.core.parallel_state as ps

    return ps.get_data_parallel_group(with_context_parallel=True)


def _slices(start, shape):
    return tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))


def assemble(pieces):
    """Whole tensors from boxes; copies must agree and nothing may be left uncovered."""
    whole = {}
    for name, shape, offset, values in pieces:
        tensor = whole.setdefault(name, torch.full(shape, float("nan")))
        where = _slices(offset, values.shape)
        old, new = tensor[where], torch.from_numpy(values)
        seen = ~old.isnan()
        assert torch.allclose(old[seen], new[seen], rtol=1e-5, atol=1e-7), f"{name}: copies differ"
        tensor[where] = new
    for name, tensor in whole.items():
        assert not tensor.isnan().any(), f"{name}: parts are missing"
    return whole


def compare(results, truth, tolerance):
    for result in results:
        assert result["losses"] == pytest.approx(truth["losses"], rel=tolerance)
        assert result["norms"] == pytest.approx(truth["norms"], rel=10 * tolerance)
    assert min(truth["norms"]) > 0.5, "clipping must be active"
    if results[0]["grads"]:
        close(assemble([p for r in results for p in r["grads"]]), truth["grads"], 10 * tolerance)
    saved = [p for r in results for p in r["pieces"]]
    for kind, label in (("weight", "weights"), ("ema", "ema")):
        mine = assemble([(k.split("|")[1], *rest) for k, *rest in saved if k.startswith(kind)])
        close(mine, truth[label], 100 * tolerance)


def close(mine, theirs, tolerance):
    theirs = {k: v for k, v in theirs.items() if not (k == "head.weight" and k not in mine)}
    assert mine.keys() == theirs.keys()
    for name in mine:
        error = (mine[name] - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1e-6)
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["modern", "reference", "tied"])
def test_layout_equals_one_process(layout, shape):
    model = {"modern": MODERN, "reference": REFERENCE, "tied": MODERN | {"tied_embeddings": True}}[shape]
    world_size, parallel = LAYOUTS[layout]
    config = make_config(model, parallel=parallel)
    compare(run_ranks(train, world_size, config, NUM_STEPS), plain_run(config, NUM_STEPS), 1e-5)


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("tp2_sp_pp2", {"model": {"dropout": 0.1}}),
        ("dp2", {"model": {"dropout": 0.1}, "train": {"micro_batch_size": 4}}),
        ("tp2_sp", {"parallel": {"recompute": "full"}}),
        ("pp2_vp2", {"parallel": {"recompute": "full"}}),
        ("tp2", {"parallel": {"recompute": "selective"}, "model": {"dropout": 0.1}}),
        ("tp2_pp2", {"objective": {"alpha_0": 1.0}}),
        ("tp2_pp2", {"objective": {"alpha_0": 0.0}}),
        ("tp2_dp2", {"objective": {"alpha_0": 0.5, "diffusion_loss": "any_order"}}),
        ("dp2", {"objective": {"alpha_0": 1.0, "diffusion_loss": "low_var"}}),
    ],
)
def test_features_under_layouts(layout, changes):
    world_size, parallel = LAYOUTS[layout]
    changes = dict(changes)
    model = MODERN | changes.pop("model", {})
    config = make_config(model, parallel={**parallel, **changes.pop("parallel", {})}, **changes)
    compare(run_ranks(train, world_size, config, NUM_STEPS), plain_run(config, NUM_STEPS), 1e-5)


def test_dropout_drops():
    config = make_config(MODERN | {"dropout": 0.3})
    without, dropped = plain_run(make_config(), 1), plain_run(config, 1)
    assert abs(without["losses"][0] - dropped["losses"][0]) > 1e-3


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_bf16_accumulates_and_reduces_in_fp32(layout):
    """In bf16 the split run stays with the whole one to far below bf16's rounding of a sum (4e-3)."""
    world_size, parallel = LAYOUTS[layout]
    options = {"precision": "bf16", "global_batch_size": 16}
    whole = make_config(train=options)
    split = make_config(train=options, parallel=parallel)
    one, many = run_ranks(train, 1, whole, NUM_STEPS), run_ranks(train, world_size, split, NUM_STEPS)
    exact = layout != "tp2"  # a tensor split rounds partial sums of activations to bf16
    assert many[0]["losses"] == pytest.approx(one[0]["losses"], rel=1e-5 if exact else 2e-2)
    truth = plain_run(make_config(train=options | {"precision": "fp32"}), NUM_STEPS)
    assert one[0]["losses"] == pytest.approx(truth["losses"], rel=3e-2)
    mine = assemble([p for r in many for p in r["pieces"] if p[0].startswith("weight")])
    theirs = assemble([p for r in one for p in r["pieces"] if p[0].startswith("weight")])
    moved = {k: (v - truth["weights"][k.split("|")[1]]).abs().max().item() for k, v in theirs.items()}
    assert max(moved.values()) > 1e-5, "bf16 is not fp32"
    close(mine, theirs, 1e-4 if exact else 0.3)


def outputs(config):
    """What validation and probe give on a rank."""
    from esolm_megatron.objective.esolm import draw_validation
    from esolm_megatron.parallel.engine import Engine

    engine = Engine(config)
    top = engine.topology
    shares = []
    for part in range(top.pipeline_size):
        rows = np.arange(4) * top.data_size * top.pipeline_size + part * top.data_size + top.data_rank
        rows = rows[rows < 8] if top.pipeline_size * top.data_size > 1 else np.arange(8)
        shares.append(_validation_share(draw_validation, config, rows))
    noised = type(shares[0])([s.micro_batches[0] for s in shares], sum(s.num_valid for s in shares))
    sums, counts = engine.evaluate(noised)
    probe = engine.probe()
    return {"sums": sums.tolist(), "counts": counts.tolist(), "probe": {k: v.numpy() for k, v in probe.items()}}


def _validation_share(draw, config, rows):
    m = config.model
    tokens = np.random.default_rng(9).integers(0, m.mask_id, (8, m.seq_length))[rows]
    valid = np.ones_like(tokens, bool)
    valid[rows == 3, 5:] = False
    return draw(tokens, valid, rows, 8, config.objective, mask_id=m.mask_id, key=(config.seed, "validation"))


@pytest.mark.parametrize("layout", ["dp2", "tp2_sp", "pp2_vp2", "tp2_pp2"])
def test_validation_and_probe_equal_one_process(layout):
    from esolm_megatron.objective.esolm import draw_validation

    world_size, parallel = LAYOUTS[layout]
    config = make_config(parallel=parallel)
    model = plain_model(config)
    share = _validation_share(draw_validation, config, np.arange(8))
    (batch,) = share.micro_batches
    attend = PackedAttention(batch.layout)
    with torch.no_grad():
        losses = model(batch.tokens, batch.positions, attend, places=batch.places, targets=batch.targets)
    sums = part_sums(losses, batch).tolist()
    for result in run_ranks(outputs, world_size, config):
        assert result["sums"] == pytest.approx(sums, rel=1e-5)
        assert result["counts"] == share.num_valid.tolist()
        probe = {k: torch.from_numpy(v) for k, v in result["probe"].items()}
        with torch.no_grad():
            logits = model(probe["tokens"], probe["positions"], PackedAttention(PackedLayout(16, 1)))
        torch.testing.assert_close(probe["logits_weight"], logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(probe["logits_ema"], logits, rtol=1e-5, atol=1e-5)
