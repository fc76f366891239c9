"""Every layout trains the model that one process trains: losses, gradients, weights after clipped steps."""

import pytest
import torch
from ranks import run_ranks
from truth import MODERN, REFERENCE, make_config, plain_run, share_of_step

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
        if step == 0:
            for owned in engine.owned:
                grad = engine.state.gradients()[owned.parameter].clone()
                torch.distributed.all_reduce(grad, group=_data_group())
                shape = tuple(grad.shape)
                whole = whole_shape(shape, split_of(owned.parameter), top.tensor_size)
                for box in boxes(shape, split_of(owned.parameter), top.tensor_rank, top.tensor_size):
                    piece = grad[_slices(box.local, box.shape)] / top.data_size
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

    return ps.get_data_parallel_group()


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
