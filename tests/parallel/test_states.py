"""What a layout saves, any other loads to the last bit; validation, probe and averaged weights are those of one process."""

import numpy as np
import pytest
import torch
from ranks import run_ranks
from split_run import saved, saved_pieces
from truth import MODERN, make_config, plain_model, share_of_step

from esolm_megatron.model.attention import PackedAttention, PackedLayout
from esolm_megatron.objective.esolm import draw_validation, part_sums

pytestmark = pytest.mark.gloo

MODEL = MODERN | {"num_layers": 5, "tied_embeddings": True}
CHAIN = {
    "pp2": (2, {"pipeline_size": 2}),
    "tp2_sp_zero3": (2, {"tensor_size": 2, "sequence_parallel": True, "zero_stage": 3}),
    "cp2_zero2": (2, {"context_size": 2, "zero_stage": 2}),
    "dp2_zero3_offload": (2, {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}),
    "tp2_zero0": (2, {"tensor_size": 2, "zero_stage": 0}),
    "pp2_vp2_offload": (2, {"pipeline_size": 2, "virtual_pipeline_size": 2, "offload_optimizer": True}),
    "dp2_zero0": (2, {"zero_stage": 0}),
    "dp4_zero3": (4, {"zero_stage": 3}),
    "tp2_dp2_zero2_offload": (4, {"tensor_size": 2, "zero_stage": 2, "offload_optimizer": True}),
    "one": (1, {}),
}


def start(config):
    """Two steps from the seed: what a rank saves."""
    from esolm_megatron.parallel.engine import Engine

    engine = Engine(config)
    for step in range(2):
        engine.train_step(share_of_step(config, step, engine.topology.data_rank, engine.topology.data_size), 3e-3)
    return {"pieces": saved_pieces(engine)}


def load(config, state):
    """Restore: what a rank then saves, its probe, and the next step's loss and norm."""
    from esolm_megatron.parallel.engine import Engine

    def read_box(kind, name, offset, shape):
        where = tuple(slice(a, a + n) for a, n in zip(offset, shape, strict=True))
        return torch.from_numpy(state[kind][name][where].copy())

    engine = Engine(config)
    engine.state.restore(read_box, state, 2)
    out = {"pieces": saved_pieces(engine), "probe": {k: v.numpy() for k, v in engine.probe().items()}}
    with engine.state.averaged_weights():
        pass
    out["again"] = saved_pieces(engine)
    share = share_of_step(config, 2, engine.topology.data_rank, engine.topology.data_size)
    result = engine.train_step(share, 3e-3)
    return out | {"next": (result.loss, result.grad_norm), "after": saved_pieces(engine)}


@pytest.fixture(scope="module")
def state():
    """After two steps on another layout: {kind: {name: whole array}}."""
    results = run_ranks(start, 2, make_config(MODEL))
    return {kind: {n: t.numpy() for n, t in tensors.items()} for kind, tensors in saved(results).items()}


@pytest.fixture(scope="module")
def third_step(state):
    """Loss, norm and state of the third step on one process."""
    (result,) = run_ranks(load, 1, make_config(MODEL), state)
    return result["next"], saved([result], "after")


@pytest.mark.parametrize("layout", CHAIN)
def test_a_state_loads_into_every_layout_and_comes_out_the_same(layout, state, third_step):
    world_size, parallel = CHAIN[layout]
    results = run_ranks(load, world_size, make_config(MODEL, parallel=parallel), state)
    assert_unchanged(results, state)
    for kind in ("weight", "ema"):
        assert_probe(results, kind, state[kind])
    for result in results:
        assert result["next"] == pytest.approx(third_step[0], rel=1e-4)
    after = saved(results, "after")
    for kind, tensors in third_step[1].items():  # the moments count in the step after
        for name, tensor in tensors.items():
            torch.testing.assert_close(after[kind][name], tensor, rtol=1e-3, atol=2e-5)


def assert_unchanged(results, state, kinds=("weight", "exp_avg", "exp_avg_sq", "ema")):
    """What all ranks would save is what they were given, to the last bit."""
    assert set(state) == {*kinds}
    for key in ("pieces", "again"):
        found = saved(results, key)
        assert found.keys() == state.keys()
        for kind, tensors in found.items():
            assert tensors.keys() == state[kind].keys()
            for name, tensor in tensors.items():
                assert np.array_equal(tensor.numpy(), state[kind][name]), f"{key}: {kind} {name}"


def bf16(tied, **parallel):
    return make_config(MODEL | {"tied_embeddings": tied}, parallel=parallel, train={"precision": "bf16"})


@pytest.fixture(scope="module")
def rounded():
    """tied -> what two bf16 steps on two data ranks leave, and the third step's loss and norm on one process."""
    out = {}
    for tied in (True, False):
        results = run_ranks(start, 2, bf16(tied))
        state = {kind: {n: t.numpy() for n, t in tensors.items()} for kind, tensors in saved(results).items()}
        out[tied] = state, run_ranks(load, 1, bf16(tied), state)[0]["next"]
    return out


@pytest.mark.parametrize("layout", CHAIN)
def test_a_state_of_bf16_keeps_its_master_weights_in_every_layout(layout, rounded):
    """Tied in every second one, each dimension in both: what is rounded is the network's copy, never what is saved."""
    world_size, parallel = CHAIN[layout]
    tied = list(CHAIN).index(layout) // 2 % 2 == 0
    state, third = rounded[tied]
    assert ("head.weight" in state["weight"]) != tied
    weights = np.concatenate([w.ravel() for w in state["weight"].values()])
    assert (torch.from_numpy(weights).bfloat16().float().numpy() != weights).mean() > 0.5, "they are not bf16 numbers"
    results = run_ranks(load, world_size, bf16(tied, **parallel), state)
    assert_unchanged(results, state)
    for result in results:
        assert result["next"] == pytest.approx(third, rel=3e-2)


def assert_probe(results, kind, weights):
    """Every rank's probe holds the logits of a plain model with these weights."""
    model = plain_model(make_config(MODEL))
    model.load_state_dict({n: torch.from_numpy(w) for n, w in weights.items()}, strict=False)
    for result in results:
        probe = {k: torch.from_numpy(v) for k, v in result["probe"].items()}
        layout = PackedLayout(len(probe["tokens"]), 1)
        with torch.no_grad():
            logits = model(probe["tokens"], probe["positions"], PackedAttention(layout))
        torch.testing.assert_close(probe[f"logits_{kind}"], logits, rtol=1e-4, atol=1e-4)


LAYOUTS = {
    "dp2": (2, {}),
    "dp2_zero3": (2, {"zero_stage": 3}),
    "cp2": (2, {"context_size": 2}),
    "tp2_sp": (2, {"tensor_size": 2, "sequence_parallel": True}),
    "pp2_vp2": (2, {"pipeline_size": 2, "virtual_pipeline_size": 2}),
    "cp2_pp2": (4, {"context_size": 2, "pipeline_size": 2}),
}


def validate(config):
    """What validation gives on a rank, before and after a step's gradients are there."""
    from esolm_megatron.parallel.engine import Engine

    engine = Engine(config)
    top = engine.topology
    shares = []
    for part in range(top.pipeline_size):
        rows = np.arange(4) * top.data_size * top.pipeline_size + part * top.data_size + top.data_rank
        rows = rows[rows < 8] if top.pipeline_size * top.data_size > 1 else np.arange(8)
        shares.append(validation_share(config, rows))
    noised = type(shares[0])([s.micro_batches[0] for s in shares], sum(s.num_valid for s in shares))
    sums, counts = engine.evaluate(noised)
    engine.train_step(share_of_step(config, 0, top.data_rank, top.data_size), 1e-9)
    again, _ = engine.evaluate(noised)
    return {"sums": sums.tolist(), "counts": counts.tolist(), "again": again.tolist()}


def validation_share(config, rows):
    m = config.model
    tokens = np.random.default_rng(9).integers(0, m.mask_id, (8, m.seq_length))[rows]
    valid = np.ones_like(tokens, bool)
    valid[rows == 3, 5:] = False
    return draw_validation(tokens, valid, rows, 8, config.objective, mask_id=m.mask_id, key=(config.seed, "validation"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_validation_equals_one_process(layout):
    world_size, parallel = LAYOUTS[layout]
    config = make_config(MODEL, parallel=parallel)
    model = plain_model(config)
    share = validation_share(config, np.arange(8))
    (batch,) = share.micro_batches
    with torch.no_grad():
        losses = model(batch.tokens, batch.positions, batch.attend, places=batch.places, targets=batch.targets)
    sums = part_sums(losses, batch).tolist()
    for result in run_ranks(validate, world_size, config):
        assert result["sums"] == pytest.approx(sums, rel=1e-5)
        assert result["again"] == pytest.approx(sums, rel=1e-5)
        assert result["counts"] == share.num_valid.tolist()
