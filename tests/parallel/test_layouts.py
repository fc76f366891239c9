"""Every legal layout trains the model that one process trains: losses, gradients, norms, weights after clipped steps.

The table is all of (tensor, sequence, context, pipeline, virtual, data, ZeRO) up to 4 processes; tied weights, dropout,
recomputation and bf16 rotate through it. The fast tier holds all layouts of 2 processes and a few of 4 in which each pair
of dimensions meets; tools/test.sh --all runs the rest.
"""

import itertools
from functools import cache

import pytest
import torch
from ranks import run_ranks
from split_run import NUM_STEPS, close, compare, first_momentum, saved, train, truth_of
from truth import MODERN, REFERENCE, make_config, plain_run

from esolm_megatron.config import ConfigError, world_problems

pytestmark = pytest.mark.gloo

MODEL = MODERN | {"num_layers": 5, "num_heads": 8, "num_kv_heads": 4}  # 5 layers divide over no stages


def name_of(world, p):
    data = world // (p["tensor_size"] * p["context_size"] * p["pipeline_size"])
    parts = [("tp", p["tensor_size"]), ("sp", 2 if p["sequence_parallel"] else 1), ("cp", p["context_size"]),
             ("pp", p["pipeline_size"]), ("vp", p["virtual_pipeline_size"]), ("dp", data)]  # fmt: skip
    return "_".join([f"{k}{n}" if k != "sp" else k for k, n in parts if n > 1] + [f"zero{p['zero_stage']}"])


def legal_layouts():
    """Name -> (processes, parallel section) of all that the configuration accepts, with how many it refused."""
    found, refused = {}, 0
    sizes = itertools.product([1, 2, 4], [False, True], [1, 2, 4], [1, 2, 4], [1, 2], [1, 2, 4], [0, 1, 2, 3])
    for tensor, sequence, context, stages, chunks, data, zero in sizes:
        world = tensor * context * stages * data
        if world > 4:
            continue
        parallel = {
            "tensor_size": tensor, "sequence_parallel": sequence, "context_size": context, "pipeline_size": stages,
            "virtual_pipeline_size": chunks, "zero_stage": zero,
        }  # fmt: skip
        try:
            config = make_config(model_for(parallel), parallel=parallel)
        except ConfigError:
            refused += 1
            continue
        assert not world_problems(config, world, "cpu")
        found[name_of(world, parallel)] = (world, parallel)
    return found, refused


def model_for(parallel):
    chunks = parallel["pipeline_size"] * parallel["virtual_pipeline_size"]
    return MODEL | ({"num_layers": 9} if chunks > 5 else {})


LAYOUTS, REFUSED = legal_layouts()
FAST_OF_FOUR = {
    "tp2_sp_pp2_zero1", "tp2_sp_cp2_zero1", "cp2_pp2_zero1", "tp2_sp_dp2_zero3", "cp2_dp2_zero2", "pp2_vp2_dp2_zero1",
    "tp2_pp2_vp2_zero0", "pp4_zero1",
}  # fmt: skip


def features(index):
    """Model, parallel and train settings that rotate with the row of the table."""
    # the sorted names end in ZeRO stages 0 to 3: what has a period of 2 or 4 meets only some of them
    tied = (index + index // 4) % 2 == 0
    model = {"tied_embeddings": tied, "dropout": 0.1 if index % 5 in (1, 3) else 0.0}
    return model, {"recompute": ("none", "full", "selective")[index % 3]}, "bf16" if index % 7 in (3, 4) else "fp32"


def is_fast(name):
    return LAYOUTS[name][0] <= 2 or name in FAST_OF_FOUR


def cases():
    for index, (name, (world, parallel)) in enumerate(sorted(LAYOUTS.items())):
        marks = () if is_fast(name) else pytest.mark.slow
        yield pytest.param(world, parallel, *features(index), id=name, marks=marks)


def test_the_table_has_what_it_should():
    assert set(LAYOUTS) >= FAST_OF_FOUR
    assert len(LAYOUTS) == 80
    assert not any(p["zero_stage"] >= 2 and p["pipeline_size"] > 1 for _, p in LAYOUTS.values())


def test_features_meet_each_other_in_fast_rows_of_several_processes():
    met = set()
    for index, (name, (world, parallel)) in enumerate(sorted(LAYOUTS.items())):
        model, more, precision = features(index)
        if world == 1 or not is_fast(name):
            continue
        tied = model["tied_embeddings"]
        met |= {(precision, tied), (precision, parallel["zero_stage"]), ("tied", tied, parallel["zero_stage"])}
        met |= {(precision, more["recompute"]), (precision, "dropout", model["dropout"] > 0)}
        met |= {(precision, tied, size) for size in ("tensor", "context", "pipeline") if parallel[f"{size}_size"] > 1}
    both = ("bf16", "fp32")
    assert met >= {(p, x) for p in both for x in (True, False, 0, 1, 2, 3, "none", "full", "selective")}
    assert met >= {("tied", tied, zero) for tied in (True, False) for zero in range(4)}
    assert met >= {(p, "dropout", x) for p in both for x in (True, False)}
    assert met >= {("bf16", tied, size) for tied in (True, False) for size in ("tensor", "context", "pipeline")}


@pytest.mark.parametrize(("world", "parallel", "model", "more", "precision"), cases())
def test_layout_equals_one_process(world, parallel, model, more, precision):
    config = make_config(model_for(parallel) | model, parallel=parallel | more, train={"precision": precision})
    results = run_ranks(train, world, config, NUM_STEPS)
    if precision == "fp32":
        compare(results, truth_of(config))
    else:
        compare_bf16(results, truth_of(config), config)


def compare_bf16(results, truth, config):
    """As near to the fp32 run as bf16 is (one process: losses 1e-2, updates 0.2 apart)."""
    for result in results:
        assert result["losses"] == pytest.approx(truth["losses"], rel=3e-2)
        assert result["norms"] == pytest.approx(truth["norms"], rel=8e-2)
    mine = saved(results)
    start = plain_start(config)
    for kind, label in (("weight", "weights"), ("ema", "ema")):
        assert mine[kind].keys() == truth[label].keys()
        moved = torch.cat([(truth[label][n] - start[n]).flatten() for n in start])
        apart = torch.cat([(mine[kind][n] - truth[label][n]).flatten() for n in start])
        assert apart.norm() < 0.35 * moved.norm(), (apart.norm() / moved.norm()).item()


def plain_start(config):
    from truth import plain_model

    return {n: p.detach() for n, p in plain_model(config).named_parameters()}


EIGHT = {
    "tp2_sp_cp2_pp2": {"tensor_size": 2, "sequence_parallel": True, "context_size": 2, "pipeline_size": 2},
    "tp2_cp2_dp2_zero3": {"tensor_size": 2, "context_size": 2, "zero_stage": 3},
    "tp2_sp_pp2_vp2_dp2": {
        "tensor_size": 2, "sequence_parallel": True, "pipeline_size": 2, "virtual_pipeline_size": 2
    },
    "cp2_pp2_dp2_zero0": {"context_size": 2, "pipeline_size": 2, "zero_stage": 0},
    "tp4_sp_dp2_zero2": {"tensor_size": 4, "sequence_parallel": True, "zero_stage": 2},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", EIGHT)
def test_eight_processes_equal_one(name):
    config = make_config(MODEL | {"tied_embeddings": True, "dropout": 0.1}, parallel=EIGHT[name])
    compare(run_ranks(train, 8, config, NUM_STEPS), truth_of(config))


@pytest.mark.parametrize(
    ("world", "parallel", "changes"),
    [
        (2, {"tensor_size": 2, "sequence_parallel": True}, {"model": REFERENCE}),
        (2, {"pipeline_size": 2}, {"model": REFERENCE}),
        (2, {"context_size": 2}, {"model": REFERENCE}),
        (2, {"tensor_size": 2, "zero_stage": 3}, {"model": REFERENCE}),
        (2, {"context_size": 2}, {"objective": {"alpha_0": 1.0}}),
        (4, {"tensor_size": 2, "pipeline_size": 2}, {"objective": {"alpha_0": 0.0}}),
        (2, {"context_size": 2}, {"objective": {"alpha_0": 0.5, "diffusion_loss": "any_order"}}),
        (2, {}, {"objective": {"alpha_0": 1.0, "diffusion_loss": "low_var"}}),
        (2, {"offload_optimizer": True, "pipeline_size": 2}, {}),
        (2, {"offload_optimizer": True, "tensor_size": 2, "zero_stage": 2}, {}),
        (2, {"offload_optimizer": True, "offload_parameters": True, "zero_stage": 3}, {}),
        (2, {"pipeline_size": 2, "layers_per_stage": [1, 4]}, {}),
        (2, {"tensor_size": 2, "sequence_parallel": True}, {"data": {"cross_document": False}}),
        (2, {"pipeline_size": 2, "virtual_pipeline_size": 2, "recompute": "full"}, {"data": {"cross_document": False}}),
        (2, {"context_size": 2, "recompute": "full", "offload_activations": True}, {"data": {"cross_document": False}}),
        (4, {"context_size": 2, "pipeline_size": 2}, {"data": {"cross_document": False}}),
        (2, {"pipeline_size": 2, "virtual_pipeline_size": 2, "layers_per_stage": [3, 2]}, {}),
    ],
)
def test_other_features_equal_one_process(world, parallel, changes):
    changes = dict(changes)
    config = make_config(changes.pop("model", MODEL), parallel=parallel, **changes)
    compare(run_ranks(train, world, config, NUM_STEPS), truth_of(config))


DOCUMENTS = {"data": {"cross_document": False}}
FEWER_KEYS = {
    "cp2_of_1": (2, 8, 1, {"context_size": 2}, {}),
    "cp2_of_1_zero0_full": (2, 8, 1, {"context_size": 2, "zero_stage": 0, "recompute": "full"}, DOCUMENTS),
    "cp2_of_1_zero2_selective": (2, 8, 1, {"context_size": 2, "zero_stage": 2, "recompute": "selective"}, {}),
    "cp2_of_1_zero3_full": (2, 4, 1, {"context_size": 2, "zero_stage": 3, "recompute": "full"}, DOCUMENTS),
    "cp4_of_2": (4, 4, 2, {"context_size": 4}, DOCUMENTS),
    "tp2_sp_cp2_of_2": (4, 8, 2, {"tensor_size": 2, "sequence_parallel": True, "context_size": 2}, {}),
    "cp4_of_1": (4, 4, 1, {"context_size": 4, "zero_stage": 2}, {"objective": {"alpha_0": 0.25}}),
    "cp4_of_2_zero3_full": (4, 4, 2, {"context_size": 4, "zero_stage": 3, "recompute": "full"}, {}),
    "cp4_of_1_any_order": (4, 4, 1, {"context_size": 4}, {"objective": {"diffusion_loss": "any_order"}}),
    "tp2_cp2_of_2_zero0": (4, 8, 2, {"tensor_size": 2, "context_size": 2, "zero_stage": 0}, DOCUMENTS),
    "tp2_sp_cp2_of_2_zero3": (
        4, 4, 2, {"tensor_size": 2, "sequence_parallel": True, "context_size": 2, "zero_stage": 3}, DOCUMENTS
    ),
    "cp2_of_1_pp2": (4, 8, 1, {"context_size": 2, "pipeline_size": 2}, DOCUMENTS),
    "cp2_of_1_pp2_vp2": (4, 8, 1, {"context_size": 2, "pipeline_size": 2, "virtual_pipeline_size": 2}, {}),
    "cp2_of_1_dp2_zero2": (4, 8, 1, {"context_size": 2, "zero_stage": 2}, {}),
    "tp2_sp_cp4_of_4": (8, 8, 4, {"tensor_size": 2, "sequence_parallel": True, "context_size": 4}, DOCUMENTS),
    "tp2_cp2_of_2_pp2": (8, 4, 2, {"tensor_size": 2, "context_size": 2, "pipeline_size": 2}, {}),
    "tp2_cp2_of_2_dp2_zero3": (8, 4, 2, {"tensor_size": 2, "context_size": 2, "zero_stage": 3}, DOCUMENTS),
    "cp4_of_1_dp2_zero2": (8, 8, 1, {"context_size": 4, "zero_stage": 2}, {}),
    "cp8_of_2": (8, 8, 2, {"context_size": 8}, {}),
}  # fmt: skip
"""More context ranks than a tensor rank has key-value heads: processes, query heads, key-value heads, sections."""
FAST_OF_FEWER_KEYS = [name for name, row in FEWER_KEYS.items() if row[0] == 2] + ["cp4_of_2", "tp2_sp_cp2_of_2"]


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in FAST_OF_FEWER_KEYS else pytest.mark.slow) for x in FEWER_KEYS]
)
def test_key_value_heads_that_several_context_ranks_share_equal_one_process(name):
    world, heads, kv_heads, parallel, changes = FEWER_KEYS[name]
    index = list(FEWER_KEYS).index(name)
    model = {"num_heads": heads, "num_kv_heads": kv_heads, "tied_embeddings": index % 2 == 0}
    config = make_config(MODEL | model | {"dropout": (0.0, 0.1, 0.0)[index % 3]}, parallel=parallel, **changes)
    assert parallel["context_size"] > kv_heads // parallel.get("tensor_size", 1)
    compare(run_ranks(train, world, config, NUM_STEPS), truth_of(config))


@pytest.mark.parametrize("kv_heads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_shared_key_value_heads_in_bf16(kv_heads):
    size = 2 * kv_heads
    config = make_config(
        MODEL | {"num_kv_heads": kv_heads}, parallel={"context_size": size}, train={"precision": "bf16"}
    )
    compare_bf16(run_ranks(train, size, config, NUM_STEPS), truth_of(config), config)


def test_dropout_drops():
    config = make_config(MODERN | {"dropout": 0.3})
    without, dropped = plain_run(make_config(), 1), plain_run(config, 1)
    assert abs(without["losses"][0] - dropped["losses"][0]) > 1e-3


BF16 = {
    "tp2": {"tensor_size": 2},
    "pp2": {"pipeline_size": 2},
    "dp2_zero0": {"zero_stage": 0},
    "dp2_zero1": {"zero_stage": 1},
    "dp2_zero2": {"zero_stage": 2},
    "dp2_zero3": {"zero_stage": 3},
    "pp2_offload": {"pipeline_size": 2, "offload_optimizer": True},
    "dp2_zero3_offload": {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
}


@pytest.mark.parametrize("name", BF16)
def test_bf16_accumulates_and_reduces_in_fp32(name):
    """In bf16 the split run stays with the whole one to far below bf16's rounding of a sum (4e-3)."""
    options = {"precision": "bf16", "global_batch_size": 16}
    split = make_config(train=options, parallel=BF16[name])
    in_products = split.parallel.zero_stage < 2 and not split.parallel.offload_optimizer  # parallel/main_grad.py
    one, many = _one_bf16(1 if in_products else 2), run_ranks(train, 2, split, NUM_STEPS)
    exact = name != "tp2"  # a tensor split rounds partial sums of activations to bf16
    gradients = saved(one, "first")["exp_avg"]
    close(saved(many, "first")["exp_avg"], gradients, 1e-5 if exact else 0.1)
    truth = first_momentum(truth_of(split))
    assert max((v - truth[k]).abs().max() / truth[k].abs().max() for k, v in gradients.items()) > 1e-3, (
        "bf16 is not fp32"
    )
    # later a rounding of the sum may flip one of the weights' last bits
    assert many[0]["losses"] == pytest.approx(one[0]["losses"], rel=2e-3 if exact else 2e-2)


@cache
def _one_bf16(zero_stage):
    """One process; up to ZeRO 1 a micro-batch's gradients of matrices are not rounded to bf16 before they are added up."""
    options = {"precision": "bf16", "global_batch_size": 16}
    return run_ranks(train, 1, make_config(train=options, parallel={"zero_stage": zero_stage}), NUM_STEPS)


def test_rounded_gradients_are_near_those_that_products_add_up():
    """One rounding to bf16 apart, and not equal: else products add up nothing."""
    added, rounded = (saved(_one_bf16(stage), "first")["exp_avg"] for stage in (1, 2))
    apart = {k: float((added[k] - rounded[k]).abs().max() / added[k].abs().max()) for k in added}
    matrices = {k for k in apart if ".attention.qkv" in k or ".attention.out" in k or ".mlp.fc" in k}
    assert all(1e-5 < apart[k] < 2**-8 for k in matrices if k.endswith("weight")), apart
    assert all(apart[k] < 1e-5 for k in apart if k not in matrices), "others differ by the clipping only"


@pytest.mark.parametrize(("world", "size"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)])
def test_number_of_replicas_and_micro_batch_size_change_nothing(world, size):
    config = make_config(train={"micro_batch_size": size}, objective={"alpha_0": 1.0})
    compare(run_ranks(train, world, config, NUM_STEPS), truth_of(config))
