"""Bad steps are refused on all ranks together and leave no trace; corrupted replicas are named."""

import dataclasses

import numpy as np
import pytest
import torch
from ranks import run_ranks
from truth import make_config, share_of_step

from esolm_megatron.checkpoint import folder as checkpoint
from esolm_megatron.config.sections import GuardConfig
from esolm_megatron.parallel.replicas import accusations, checksum, compared, verdict
from esolm_megatron.topology import Topology
from esolm_megatron.train.guard import Guard, Rollback, kept, spike
from esolm_megatron.train.run_folder import set_aside

GOOD = ["good", "good", "good", "good"]
WITH_BAD = ["good", "good", "nan", "spike", "good", "nan", "good"]


def poisoned(noised, factor):
    """The same micro-batches with the loss of one of them multiplied: what broken data or a broken sum looks like."""
    first, *rest = noised.micro_batches
    return dataclasses.replace(
        noised, micro_batches=[dataclasses.replace(first, weights=first.weights * factor), *rest]
    )


def train(config, kinds, poisoned_data_rank):
    """One rank: its state after the good steps, and what was refused. Bad batches hold other rows than good ones."""
    from esolm_megatron.parallel.engine import Engine

    engine = Engine(config)
    top = engine.topology
    norms, refused, good = [], [], 0

    def problem_of(loss, norm):
        found = None if np.isfinite(loss) and np.isfinite(norm) and norm < 1e4 else f"{loss} {norm}"
        return found

    for number, kind in enumerate(kinds):
        noised = share_of_step(config, good if kind == "good" else 100 + number, top.data_rank, top.data_size)
        if kind != "good" and top.data_rank == poisoned_data_rank:
            noised = poisoned(noised, float("nan") if kind == "nan" else 1e7)
        result, problem = engine.try_step(noised, config.optim.lr, problem_of)
        refused.append(problem is not None)
        if problem is None:
            good += 1
            norms.append(result.grad_norm)
    pieces = {(p.kind, p.name, p.offset): p.tensor.clone() for p in engine.pieces()}
    engine.settle()
    parameters = [o.parameter.detach().float() for o in engine.owned]
    return norms, refused, pieces, parameters, engine.state.num_steps


@pytest.mark.gloo
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, {}), (2, {}), (2, {"tensor_size": 2}), (2, {"pipeline_size": 2}), (2, {"context_size": 2}),
        (2, {"zero_stage": 0}), (2, {"zero_stage": 2}), (2, {"zero_stage": 3}),
        (4, {"tensor_size": 2, "sequence_parallel": True}),
    ],
    ids=["dp1", "dp2", "tp2", "pp2", "cp2", "zero0", "zero2", "zero3", "tp2_sp_dp2"],
)  # fmt: skip
def test_refused_steps_leave_no_trace(world_size, parallel, precision):
    config = make_config(parallel=parallel, train={"precision": precision})
    split = parallel.get("tensor_size", 1) * parallel.get("pipeline_size", 1) * parallel.get("context_size", 1)
    last = world_size // split - 1
    clean = run_ranks(train, world_size, config, GOOD, last)
    dirty = run_ranks(train, world_size, config, WITH_BAD, last)
    assert any(pieces for _, _, pieces, _, _ in clean)
    for (norms, refused, pieces, parameters, steps), (norms_2, refused_2, pieces_2, parameters_2, steps_2) in zip(
        clean, dirty, strict=True
    ):
        assert refused == [False] * 4
        assert refused_2 == [kind != "good" for kind in WITH_BAD]
        assert steps == steps_2 == 4
        assert norms == norms_2
        assert pieces.keys() == pieces_2.keys()
        everything = {"weight", "exp_avg", "exp_avg_sq", "ema"}
        assert {key[0] for key in pieces} in (everything, set()), "ZeRO-0's copies are saved by one rank"
        for key, value in pieces.items():
            assert torch.equal(value, pieces_2[key]), key
        assert all(torch.equal(a, b) for a, b in zip(parameters, parameters_2, strict=True))


def flip(config, victim, name, place, bit, master=False):
    from esolm_megatron.parallel.engine import Engine

    engine = Engine(config)
    engine.train_step(share_of_step(config, 0, engine.topology.data_rank, engine.topology.data_size), 1e-3)
    before = engine.disagreements()
    if engine.topology.rank == victim:
        (parameter,) = [o.parameter for o in engine.owned if o.name == name]
        if master:
            fragment = engine.state.partitions.fragment(parameter)
            parameter, place = engine.state.flats[fragment.flat], place + fragment.at
        elif not parameter.numel():  # ZeRO 3
            parameter = parameter.ds_tensor
        kind = torch.int32 if parameter.element_size() == 4 else torch.int16
        parameter.data.view(-1).view(kind)[place] ^= 1 << bit
    return before, engine.disagreements()


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("world_size", "parallel", "precision", "expected"),
    [
        (3, {}, "fp32", "rank 1 differs from ranks 0, 2"),
        (2, {}, "bf16", "ranks 0, 1 differ, and no majority says which is right"),
        (4, {"tensor_size": 2}, "fp32", "ranks 1, 3 differ, and no majority says which is right"),
    ],
)
def test_one_flipped_bit_is_named(world_size, parallel, precision, expected):
    config = make_config(parallel=parallel, train={"precision": precision, "global_batch_size": 12})
    for place, bit in ((0, 0), (77, 14)):
        results = run_ranks(flip, world_size, config, 1, "layers.2.mlp.fc1.weight", place, bit)
        for before, after in results:
            assert before == []
            assert f"layers.2.mlp.fc1.weight: {expected}" in after
            assert all("rank 1 holds a master weight" in x for x in after if expected not in x)


@pytest.mark.gloo
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("zero_stage", "offload", "master"),
    [(1, False, True), (1, True, True), (3, False, True), (3, False, False), (3, True, True)],
)
def test_a_flipped_bit_of_a_master_weight_is_named(precision, zero_stage, offload, master):
    """It is no difference between replicas until the next update makes it everyone's; nor is a weight of ZeRO 3 at all."""
    parallel = {
        "zero_stage": zero_stage,
        "offload_optimizer": offload,
        "offload_parameters": offload and zero_stage == 3,
    }
    config = make_config(parallel=parallel, train={"precision": precision, "global_batch_size": 8})
    bit = 20 if master or precision == "fp32" else 4
    for before, after in run_ranks(flip, 2, config, 1, "layers.2.mlp.fc1.weight", 3, bit, master):
        assert before == []
        assert after == ["layers.2.mlp.fc1.weight: rank 1 holds a master weight that is not its weight"]


def miscalculate(config, victim, flipped):
    """Evidence and loss of each rank and step, of which one rank spoils the second: a norm's weight, or what it puts out."""
    from esolm_megatron.model.layers import Norm
    from esolm_megatron.parallel.engine import Engine

    engine = Engine(config)
    top, found = engine.topology, []
    norm = next(m for m in engine.chunks[0].modules() if isinstance(m, Norm))
    for step in range(3):
        handle = None
        if step == 1 and top.rank == victim and flipped:
            weight = getattr(norm.weight, "ds_tensor", norm.weight)
            weight.data.view(-1).view(torch.int32)[1] ^= 1 << 19
        elif step == 1 and top.rank == victim:
            handle = norm.register_forward_hook(lambda module, args, out: out * 1.01)
        noised = share_of_step(config, step, top.data_rank, top.data_size)
        result, _ = engine.try_step(noised, 1e-3, lambda loss, norm: None)
        found.append((*engine.evidence, result.loss))
        if handle is not None:
            handle.remove()
    return top, found


SPOILED = {
    "tp2": (2, {"tensor_size": 2}),
    "tp2_sp": (2, {"tensor_size": 2, "sequence_parallel": True}),
    "tp2_dp2": (4, {"tensor_size": 2}),
    "tp2_zero3": (2, {"tensor_size": 2, "zero_stage": 3}),
    "tp2_pp2": (4, {"tensor_size": 2, "pipeline_size": 2}),
    "cp2_zero0": (2, {"context_size": 2, "zero_stage": 0}),
}


@pytest.mark.gloo
@pytest.mark.parametrize("layout", SPOILED)
def test_a_norm_that_is_wrong_on_one_rank_is_seen_though_all_report_one_loss(layout):
    world_size, parallel = SPOILED[layout]
    steps = accused(world_size, make_config(parallel=parallel), True)
    assert steps[0] == []
    where = "rank 1 differs from ranks 0, 2, 3" if layout == "tp2_dp2" else "ranks 0, 1 differ"
    assert any(line.startswith(f"norms and biases: {where}") for line in steps[1]), steps


@pytest.mark.gloo
def test_what_a_tensor_rank_computes_wrongly_shows_in_its_norms_after_the_update():
    steps = accused(2, make_config(parallel={"tensor_size": 2}), False)
    assert [bool(lines) for lines in steps] == [False, False, True]
    assert accused(4, make_config(parallel={"tensor_size": 2, "zero_stage": 3}), None) == [[], [], []], "all is well"


def accused(world_size, config, flipped):
    """What is said after each step; flipped: None for a run in which nothing is wrong."""
    results = run_ranks(miscalculate, world_size, config, -1 if flipped is None else 1, bool(flipped))
    table = np.array([found for _, found in results])  # rank, step, (loss, fingerprint, reported loss)
    assert (table[:, :, 2] == table[:1, :, 2]).all(), "the reported loss says nothing"
    stage = config.parallel.zero_stage
    return [accusations(table[:, i, 0], table[:, i, 1], results[0][0], zero_stage=stage) for i in range(3)]


def test_a_loss_of_a_tensor_rank_alone_is_named_and_its_rounding_is_not():
    top, same = Topology(rank=0, world_size=6, tensor_size=3), np.ones(6)
    nan, inf = float("nan"), float("inf")
    for losses, found in (
        ([2, 2, 2, 3, 3, 3], []),
        ([2, 2 + 1e-6, 2 - 1e-6, nan, nan, nan], []),
        ([2, 2, 2, inf, inf, inf], []),
        ([2, 2, 2.1, 3, 3, 3], ["loss: rank 2 differs from ranks 0, 1"]),
        ([2, 2, 2, 3, nan, 3], ["loss: rank 4 differs from ranks 3, 5"]),
    ):
        assert accusations(np.array(losses), same, top, zero_stage=1) == found


def test_what_is_compared_is_said():
    top = Topology(world_size=8, tensor_size=2, context_size=2)
    assert compared(top, 1, 50) == (
        "norms and biases of 8 ranks each step, the loss of tensor ranks each step, "
        "all weights of 4 replicas each 50 steps, weights with their master weights each 50 steps"
    )
    assert compared(top, 3, 50).startswith("norms and biases of 2 ranks each step, the loss")
    assert "all weights" not in compared(top, 3, 50)
    assert compared(Topology(), 3, 0) == "nothing"


def test_every_single_bit_changes_the_checksum():
    tensor = torch.randn(3, 5, 7)
    for kind, bits, ints in ((torch.float32, 32, torch.int32), (torch.bfloat16, 16, torch.int16)):
        cast = tensor.to(kind)
        seen = {int(checksum(cast))}
        for place in range(0, 105, 13):
            for bit in range(bits):
                other = cast.clone()
                other.view(-1).view(ints)[place] ^= -(1 << (bits - 1)) if bit == bits - 1 else 1 << bit
                seen.add(int(checksum(other)))
        assert len(seen) == 1 + 9 * bits
    assert int(checksum(tensor.flip(0))) != int(checksum(tensor)), "places count"


def test_the_minority_is_named():
    assert verdict("w", [4, 5, 6, 7], [1, 1, 2, 1]) == "w: rank 6 differs from ranks 4, 5, 7"
    assert verdict("w", [0, 1, 2, 3, 4], [1, 9, 1, 8, 1]) == "w: ranks 1, 3 differ from ranks 0, 2, 4"
    assert "no majority" in verdict("w", [0, 1, 2, 3], [1, 1, 2, 2])


def test_spikes_stand_out_from_what_came_before():
    config = GuardConfig(spike_factor=10, min_history=5, window=8)
    before = [2.0, 2.1, 1.9, 2.0, 2.1, 1.9]
    deviation = 1.4826 * 0.1
    assert spike(2 + 9.9 * deviation, before, config) is None
    assert spike(2 + 10.1 * deviation, before, config) == pytest.approx(2 + 10 * deviation)
    assert spike(99.0, before[:4], config) is None, "too little to judge by"
    assert spike(2.19, [2.0] * 6, config) is None, "no deviation at all: 1 % of the median is taken"
    assert spike(2.21, [2.0] * 6, config) is not None
    assert spike(1e9, before, GuardConfig(spike_factor=0, min_history=2)) is None


def guard(tmp_path, **fields):
    return Guard(GuardConfig(**fields), tmp_path, writes=True)


def test_batches_left_out_shift_only_the_steps_after_them(tmp_path):
    made = guard(tmp_path)
    assert [made.batch_of(s) for s in range(4)] == [0, 1, 2, 3]
    made.skipped = {0, 3, 4, 9}
    assert [made.batch_of(s) for s in range(8)] == [1, 2, 5, 6, 7, 8, 10, 11]
    assert "".join(b for _, b in kept(iter("abcdefghijkl"), 0, made)) == "bcfghikl"


def test_rollback_leaves_out_what_led_there(tmp_path):
    made = guard(tmp_path, rollback_after=2, rollback_skip_batches=3)
    for batch in (10, 11):
        assert not made.must_roll_back
        made.refuse(11, batch, 8, "loss is nan", float("nan"), 1.0)
    assert made.must_roll_back
    assert made.target(10, [4, 8, 10]) == 8
    made.roll_back(10, 8)
    assert made.skipped == {8, 9, 10, 11}, "not before the checkpoint's own next batch"
    assert made.batch_of(8) == 12
    assert not made.must_roll_back
    assert made.target(10, [4, 8]) == 4, "back at the same place: an older one"
    assert made.target(13, [4, 8, 12]) == 12, "it led further: the newest"
    assert made.target(3, [4]) == 4
    assert made.target(3, []) is None
    made.rollbacks *= 3
    assert made.target(13, [4, 8, 12]) is None, "max_rollbacks"


def test_another_process_leaves_out_the_same(tmp_path):
    first = guard(tmp_path, skip_batches=(2, 50))
    first.restore(0, None, None)
    assert first.skipped == {2, 50}
    first.accept(1.0, 2.0)
    state = first.state()
    first.refuse(5, 6, 8, "loss is nan", float("nan"), 1.0)
    first.rollbacks.append(Rollback(9, 4))
    first.refuse(5, 7, 8, "loss is nan", float("nan"), 1.0)
    second = guard(tmp_path, skip_batches=(1, 2, 50, 60))
    second.restore(4, state, second.read_record())
    assert second.skipped == {2, 50, 6, 7, 60}, "1 is already trained on"
    assert second.rollbacks == [Rollback(9, 4)]
    assert list(second.losses) == [1.0]
    alone = guard(tmp_path / "elsewhere")
    alone.restore(4, state, None)
    assert alone.skipped == {2, 50}


def test_only_the_checkpoints_of_the_last_rollback_areset_aside(tmp_path):
    """A run that rolls back often does not fill the disk."""
    for step in (4, 8, 12):
        checkpoint.step_folder(tmp_path, step).mkdir(parents=True)
    set_aside(tmp_path, [8, 12], 1)
    checkpoint.step_folder(tmp_path, 8).mkdir()
    set_aside(tmp_path, [8], 2)
    left = sorted(p.name for p in checkpoint.step_folder(tmp_path, 0).parent.iterdir())
    assert left == ["step_00000004", "step_00000008.rolled_back-2"]
