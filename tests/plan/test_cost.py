"""The plan against hand-made sums, and every configuration that is shipped."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from esolm_megatron.config import ConfigError, load, world_problems
from esolm_megatron.model.size import flops_per_step, num_parameters
from esolm_megatron.plan import DEVICES, GIB, channels_per_token, micro_batches_in_flight, packed_tokens, plan
from esolm_megatron.plan.memory import layers_in_flight

ROOT = Path(__file__).parents[2]

CONFIGS = ROOT / "configs"
RUNS = sorted(p for p in CONFIGS.rglob("*.yaml") if p.parent.name != "data" and not p.stem.endswith("_base"))
TINY = CONFIGS / "debug/tiny.yaml"
SPLIT = CONFIGS / "debug/tiny_tp2_pp2.yaml"
BASELINE = CONFIGS / "paper/124m_alpha0p5.yaml"


def test_every_folder_of_experiments_is_there():
    names = {str(p.relative_to(CONFIGS)) for p in RUNS}
    scale = {f"scale/{n}.yaml" for n in ("1p7b", "7b", "13b", "70b", "100b")}
    paper = {f"paper/124m_alpha{n}.yaml" for n in ("1", "0p5", "0p25", "0p125", "0")}
    assert names >= {"quickstart.yaml", "debug/tiny.yaml", "debug/tiny_tp2_pp2.yaml"} | scale | paper


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_a_shipped_configuration_loads_and_fits_the_machine_that_it_names(path):
    named = re.search(r"^# For (\d+) (?:x|processes of|process of) (?:a )?(\w+)", path.read_text(), re.M)
    assert named, "its comment must say `# For N x DEVICE` or `# For N processes of a CPU`"
    world, device = int(named[1]), named[2]
    config = load(path)
    assert world_problems(config, world, "cpu" if device == "CPU" else "cuda") == []
    cost = plan(config, world, device="H100" if device == "CPU" else device)
    assert not [note for note in cost.notes if "will not fit" in note]
    if split := re.search(r"TP (\d+) x PP (\d+) x DP (\d+)", path.read_text()):
        grid = cost.topology
        assert (grid.tensor_size, grid.pipeline_size, grid.data_size) == tuple(map(int, split.groups()))


@pytest.mark.parametrize("path", [p for p in RUNS if re.search(r"\d+(p\d+)?[bm](_|$)", p.stem)], ids=lambda p: p.stem)
def test_a_model_has_the_size_in_its_name(path):
    number, unit = re.match(r"(\d+(?:p\d+)?)([bm])", path.stem).groups()
    expected = float(number.replace("p", ".")) * {"b": 1e9, "m": 1e6}[unit]
    model = load(path).model
    if model.vocab_size is None:
        model = model.model_copy(update={"vocab_size": 50258})
    count = num_parameters(model)
    if path.parent.name == "paper":  # the paper's 124M leave out the head
        count -= model.vocab * (model.hidden_size + 1)
    assert count == pytest.approx(expected, rel=0.1)


def test_tiny_has_about_a_million_parameters():
    assert num_parameters(load(TINY, ["model.vocab_size=1024"]).model) == pytest.approx(1e6, rel=0.1)


def test_memory_is_the_sum_of_its_parts():
    cost = plan(load(BASELINE), 8, device="H200")
    (stage,) = cost.stages
    n = cost.parameters + 46 * (2 * 768 + 1)  # 50258 rows of the vocabulary are padded to 50304
    assert (stage.parameters, stage.weights, stage.gradients) == (n, 2 * n, 4 * n)
    assert stage.optimizer == -(-n // 8) * 16
    assert stage.buckets == 0, "gradients are reduced where they are"
    # 16 diffusion rows of 1024; 16 sequential ones of 1024 and 640 masks (512 + 6 x 16 = 608, a multiple of 16)
    assert cost.packed_tokens == 32 * 1024 + 16 * 608
    # x, its norm, the product of 3 H, queries and keys; x again, its norm, what attention gives, 12 sums in fp32, the MLP, a mask
    before, after = (2 + 3 + 2) * 768, (2 + 1 + 8 + 0.5) * 768 + 2 * 12
    # after the last attention there are 640 masks and 3/4 + 2 sigma of a diffusion row, with copies of 2 (N + G) heads
    masked = 0.75 + 2 * 0.5 / (12 * 16) ** 0.5
    places = 16 * 608 + round(16 * 1024 * masked)
    kept = (12 * before + 11 * after) * cost.packed_tokens + places * (after + 4 * 768)
    assert stage.activations == round(2 * kept)
    # so many places x 50304 logits are several chunks: one is there in fp32 and, as its gradient, in bf16; the gradients of what
    # the head is fed and of its matrix, which is added up in fp32
    assert stage.working == 6 * 2**27 + 2 * places * 768 + 6 * 50304 * 768
    few = plan(load(BASELINE, ["model.vocab_size=1000", "train.micro_batch_size=2", "train.global_batch_size=16"]), 8)
    assert few.stages[0].working == round(2 * (2 * 3072 + 2 * 768) * few.packed_tokens), "a block's backward takes more"
    parts = (stage.weights, stage.gradients, stage.optimizer, stage.buckets, stage.activations, stage.working)
    assert stage.total == sum(parts) == cost.memory_per_rank


def test_fp32_and_no_average_change_weights_and_optimizer():
    (stage,) = plan(load(BASELINE, ["train.precision=fp32", "optim.ema_decay=0"]), 1).stages
    assert stage.weights == 4 * stage.parameters
    assert stage.optimizer == 12 * stage.parameters
    assert stage.buckets == 0


def test_stages_of_a_pipeline_and_tensor_ranks_share_the_model():
    cost = plan(load(SPLIT, ["model.vocab_size=1023", "train.global_batch_size=32"]), 8)
    assert [stage.layers for stage in cost.stages] == [((0, 2),), ((2, 4),)]
    assert (cost.topology.data_size, cost.num_micro_batches) == (2, 8)
    assert [stage.micro_batches_in_flight for stage in cost.stages] == [2, 1]
    assert cost.stages[1].working > cost.stages[0].working > 0
    split = 2 * sum(stage.parameters for stage in cost.stages)
    # tensor ranks repeat norms (2 x 128 a layer, q and k norms of 32, the last norm) and hold a row of padding;
    # the last stage copies the tied embedding
    repeated = 4 * (2 * 128 + 2 * 32) + 128
    assert split == cost.parameters + repeated + 1 * 128 + 1024 * 128
    assert cost.stages[0].optimizer == -(-cost.stages[0].parameters // 2) * 16


def test_chunks_of_an_interleaved_stage_are_listed():
    config = load(SPLIT, ["parallel.virtual_pipeline_size=2"])
    assert [stage.layers for stage in plan(config).stages] == [((0, 1), (2, 3)), ((1, 2), (3, 4))]


def test_uneven_stages_are_those_of_the_engine_and_a_heavy_head_gets_fewer_layers():
    config = load(SPLIT, ["model.vocab_size=1023", "parallel.layers_per_stage=[3, 1]"])
    assert [stage.layers for stage in plan(config).stages] == [((0, 3),), ((3, 4),)]
    config = load(SPLIT, ["model.vocab_size=50258"])
    assert [stage.layers for stage in plan(config).stages] == [((0, 3),), ((3, 4),)]


def test_context_ranks_share_activations_and_zero_stages_share_states():
    whole = plan(load(BASELINE), 2).stages[0]
    cost = plan(load(BASELINE, ["parallel.context_size=2"]), 2)
    (split,) = cost.stages
    assert (cost.topology.data_size, cost.topology.context_size, cost.packed_tokens) == (
        1,
        2,
        plan(load(BASELINE), 2).packed_tokens,
    )
    # each of two has half. What is exchanged is a copy, so the product is not kept (5 N D become 3), and the output is twice there
    tokens, places = cost.packed_tokens, 16 * 608 + round(16 * 1024 * (0.75 + 1 / (12 * 16) ** 0.5))
    fewer = 768 * (12 * 2 * tokens - (11 * tokens + places))
    assert split.activations == (whole.activations - 2 * fewer) / 2
    assert split.working < whole.working
    assert split.optimizer == whole.optimizer == whole.parameters // 2 * 16
    for zero, parts in ((0, (1, 1, 1)), (1, (1, 1, 2)), (2, (1, 2, 2)), (3, (2, 2, 2))):
        (stage,) = plan(load(BASELINE, [f"parallel.zero_stage={zero}"]), 2).stages
        n = stage.parameters
        assert (stage.weights, stage.gradients, stage.optimizer) == (
            n * 2 // parts[0],
            n * 4 // parts[1],
            n * 16 // parts[2],
        )
    overrides = [f"parallel.{f}" for f in ("zero_stage=3", "offload_optimizer=true", "offload_parameters=true")]
    (stage,) = plan(load(BASELINE, overrides), 2).stages
    assert (stage.weights, stage.optimizer) == (0, 0)


def test_context_ranks_may_outnumber_the_key_value_heads_of_a_tensor_rank():
    """8 of them at tensor size 8: one each, which 2 or 8 context ranks share."""
    two, eight = (
        plan(load(CONFIGS / "scale/70b.yaml", ["model.vocab_size=128000", f"parallel.context_size={size}"]), 256)
        for size in (2, 8)
    )
    assert two.topology.data_size == 4 * eight.topology.data_size
    halves, eighths = (x.stages[0].activations * x.topology.context_size for x in (two, eight))
    # of 8 tensor ranks, each has one of the 8: two ranks are sent a half of its queries and all of its keys and values
    assert load(CONFIGS / "scale/70b.yaml").model.kv_heads == 8
    assert 1 < eighths / halves < 1.3, "keys and values are repeated, nothing else"


def simulated_in_flight(stage, stages, chunks, micro_batches):
    """Most chunks alive at once when the schedule's warm-up forwards run before the first backward."""
    total = micro_batches * chunks
    warm_up = stages - stage - 1 if chunks == 1 else 2 * (stages - stage - 1) + (chunks - 1) * stages
    warm_up = min(warm_up, total)
    alive = most = warm_up
    for _ in range(total - warm_up):
        alive += 1
        most = max(most, alive)
        alive -= 1
    return most / chunks


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("micro_batches", [1, 2, 5, 20])
def test_micro_batches_in_flight_are_those_of_the_schedule(chunks, micro_batches):
    for stage in range(5):
        found = micro_batches_in_flight(stage, 5, chunks, micro_batches)
        assert found == simulated_in_flight(stage, 5, chunks, micro_batches)


def test_blocks_in_flight_of_uneven_chunks_are_those_of_the_schedule():
    """13B on two stages in eight chunks: 50 block passes were alive on the first simulated rank, where even ones would be 42.5."""
    assert layers_in_flight((3, 3, 3, 3, 2, 2, 2, 2), 0, 2, 4) == 50
    assert layers_in_flight((3, 3, 3, 3, 2, 2, 2, 2), 0, 2, 64) == 50
    assert layers_in_flight((2,) * 8, 0, 2, 4) == 2 * 17
    assert layers_in_flight((5,), 1, 4, 64) == 15


def test_recomputation_and_splits_lower_what_a_block_keeps():
    def kept(recompute, tensor_size, sequence_parallel, compiled="true"):
        words = [f"parallel.tensor_size={tensor_size}", f"parallel.sequence_parallel={sequence_parallel}"]
        return sum(
            channels_per_token(load(CONFIGS / "scale/7b.yaml", [*words, f"train.compile={compiled}"]), recompute)
        )

    # 32 heads of queries, 8 of keys; the product, q and k, what is given; sums and norms of heads in fp32
    heads = (48 + 40 + 32) * 128 + 2 * 32 + 2 * 40
    assert [kept(x, 1, "false") for x in ("none", "selective", "full")] == [
        4 * 4096 + heads + 3 * 12288,
        3 * 4096 + heads,
        4096,
    ]
    assert kept("none", 1, "false", "false") == kept("none", 1, "false") + 12288
    assert kept("none", 2, "true") == kept("none", 1, "false") / 2
    assert kept("none", 2, "false") == kept("none", 1, "false") / 2 + 2 * 4096


MEASURED = {
    ("paper/124m_alpha0p25.yaml", 1, 32, "false"): 13.2,
    ("paper/124m_alpha0p25.yaml", 0.25, 32, "false"): 17.7,
    ("scale/1p7b.yaml", 1, 8, "false"): 62.6,
    ("scale/1p7b.yaml", 1, 8, "true"): 57.4,
}
"""docs/benchmarks.md: GiB at most of steps on an H200, in code without DeepSpeed: bf16 weights, fp32 masters, two moments."""


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_activations_are_those_of_a_gpu_within_a_fiftieth(case):
    path, alpha_0, rows, compiled = case
    words = [
        "model.vocab_size=50258", "model.dropout=0", "objective.diffusion_fraction=null", f"objective.alpha_0={alpha_0}",
        f"train.micro_batch_size={rows}", f"train.global_batch_size={rows}", f"train.compile={compiled}", "parallel.recompute=none",
    ]  # fmt: skip
    (stage,) = plan(load(CONFIGS / path, words), 1).stages
    took = 14 * stage.parameters + stage.activations + stage.working
    assert took / GIB == pytest.approx(MEASURED[case], rel=0.02)


MODERN = {"norm": "rmsnorm", "activation": "swiglu", "qk_norm": True, "mlp_bias": False, "kv_heads": 2, "ffn": 384}
KEPT = [(shape, compiled) for shape in ({}, {"dropout": 0.1}) for compiled in ("eager", "apart", "whole")]
KEPT += [(MODERN, "apart"), (MODERN, "whole")]  # eager RMSNorm is several operators on a CPU, and one on a GPU


@pytest.mark.parametrize(("shape", "compiled"), KEPT, ids=lambda x: x if isinstance(x, str) else "-".join(x) or "gpt2")
def test_a_block_keeps_what_autograd_and_a_compiler_keep(shape, compiled):
    """Bytes of what two blocks more save for backward. The compiler splits forward and backward as it does for a GPU."""
    import torch

    from esolm_megatron.model.attention import PackedAttention, PackedLayout
    from esolm_megatron.model.transformer import EsoLM, initialise
    from esolm_megatron.parallel.main_grad import AccumulatingLinears

    names = {"kv_heads": "num_kv_heads", "ffn": "ffn_hidden_size"}
    words = [f"model.{names.get(name, name)}={value}" for name, value in shape.items()]
    words += [
        "model.hidden_size=128",
        "model.num_layers=3",
        "model.num_heads=8",
        "model.seq_length=64",
        "model.vocab_size=97",
    ]
    base = ["model.norm=layernorm", "model.activation=gelu", "model.qk_norm=false", "model.dropout=0", "model.mlp_bias=true",
            "model.num_kv_heads=null", f"train.compile={str(compiled != 'eager').lower()}", "train.precision=bf16"]  # fmt: skip
    config = load(TINY, [*base, *words])
    model = EsoLM(config.model, AccumulatingLinears(torch.bfloat16, torch.device("cpu"), pad_vocab=True))
    initialise(model, 0)
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros(parameter.shape)
    if compiled != "eager":
        torch._dynamo.reset()
        model.compile_blocks(apart=compiled == "apart", backend="aot_eager_decomp_partition")
    own = {x.untyped_storage().data_ptr() for p in model.parameters() for x in (p, p.main_grad)}
    attend, blocks, found = PackedAttention(PackedLayout(64, 1, ())), model.layers, []
    for count in (1, 3):
        model.layers, saved = torch.nn.ModuleDict(dict(list(blocks.items())[:count])), {}

        def pack(x, saved=saved):
            storage = x.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(
                torch.zeros(64, dtype=torch.int64),
                torch.arange(64),
                attend,
                dropout_ids=torch.arange(64, dtype=torch.int32),
                head=False,
            )
        found.append(sum(x.nbytes() for x in saved.values()))
    planned = 2 * 64 * sum(channels_per_token(config, "none"))
    masks = 0.5 * 128 * 2 * 64 if compiled == "apart" and "dropout" in shape else 0  # alone, a mask is made again
    assert (found[1] - found[0]) / 2 == pytest.approx(planned - masks, rel=0.005)


@pytest.mark.parametrize("alpha_0", [0, 0.5, 1])
def test_packed_tokens_are_those_of_the_layout(alpha_0):
    from esolm_megatron.model.attention import PackedLayout
    from esolm_megatron.model.size import mask_capacity

    config = load(TINY, [f"objective.alpha_0={alpha_0}"])
    diffusion = round(8 * config.objective.fraction)
    groups = ((8 - diffusion, mask_capacity(128, alpha_0)),) if diffusion < 8 else ()
    assert packed_tokens(config) == PackedLayout(128, diffusion, groups).num_tokens


def test_packed_tokens_of_the_any_order_loss_have_whole_mask_streams():
    config = load(TINY, ["objective.diffusion_loss=any_order"])
    assert packed_tokens(config) == 8 * 128 + 4 * 128 + 4 * 112  # mean + 6 sigma is 97.9, in 16s


def test_time_follows_from_flops_devices_and_mfu():
    config = load(BASELINE)
    cost = plan(config, 16, device="A100", mfu=0.5)
    assert cost.peak_tflops == DEVICES["A100"].peak_tflops == 312
    assert cost.seconds_per_step == pytest.approx(flops_per_step(config) / (16 * 312e12 * 0.5))
    assert cost.days == pytest.approx(250000 * cost.seconds_per_step / 86400)
    assert cost.tokens_per_second == pytest.approx(512 * 1024 / cost.seconds_per_step)
    assert plan(config, 16, peak_tflops=100, mfu=0.5).seconds_per_step == pytest.approx(3.12 * cost.seconds_per_step)
    assert plan(load(BASELINE, ["train.peak_tflops=7"]), 8).peak_tflops == 7


def test_unknown_vocabulary_is_assumed_and_said():
    cost = plan(load(TINY))
    assert any("50258" in note for note in cost.notes)
    assert cost.parameters == num_parameters(load(TINY, ["model.vocab_size=50258"]).model)
    assert not any("50258" in note for note in plan(load(TINY, ["model.vocab_size=99"])).notes)


def test_no_world_size_means_one_replica():
    cost = plan(load(SPLIT))
    assert cost.topology.world_size == 4
    assert any("one replica" in note for note in cost.notes)


def test_what_does_not_fit_is_said():
    notes = plan(
        load(CONFIGS / "scale/70b.yaml", ["parallel.pipeline_size=1", "parallel.virtual_pipeline_size=1"]), 8
    ).notes
    assert any("will not fit on H100" in note for note in notes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"world_size": 3}, "start 4 processes"),
        ({"world_size": 64}, "global_batch_size"),
        ({"device": "TPU"}, "A100, H100, H200, B200"),
        ({"mfu": 40}, "0.4 for 40 percent"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        plan(load(SPLIT), **arguments)


def test_json_holds_what_the_table_shows():
    cost = plan(load(SPLIT), 8)
    tree = json.loads(json.dumps(cost.as_dict()))
    assert tree["memory_per_rank"] == cost.memory_per_rank == max(stage["total"] for stage in tree["stages"])
    assert (tree["topology"]["data_size"], tree["days"]) == (2, cost.days)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(cost)
    text = console.export_text()
    assert f"{cost.parameters:,}" in text
    assert "pipeline 2 x data 2 x tensor 2" in text
    assert f"{cost.stages[1].total / GIB:.2f}" in text


def test_planning_does_not_import_torch():
    code = (
        "import sys, esolm_megatron.plan, esolm_megatron.doctor, esolm_megatron.cli; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def long_rows():
    """The table of long rows in docs/performance.md: (configuration, length, CP, offload, GiB, tokens/s of 8 GPUs)."""
    text = (ROOT / "docs" / "performance.md").read_text()
    return re.findall(r"^\| (1\.7B|7B) \| ([\d,]+) \| (\d+) \| (yes|no) \| ([\d.]+) \| (\d+) \|$", text, re.MULTILINE)


def planned_long_row(name, length, context, offload):
    path = ROOT / "configs" / "scale" / {"1.7B": "1p7b.yaml", "7B": "7b.yaml"}[name]
    words = [
        "model.vocab_size=50258", f"model.seq_length={length}", f"parallel.context_size={context}", "parallel.recompute=full",
        f"parallel.offload_activations={offload}", "train.micro_batch_size=2", "train.global_batch_size=64",
        "parallel.tensor_size=1", "parallel.sequence_parallel=false", "parallel.pipeline_size=1",
    ]  # fmt: skip
    found = plan(load(path, words), 8, device="H200", mfu=0.4)
    return round(found.stages[0].total / 2**30, 1), round(found.as_dict()["tokens_per_second"] / 1000)


def test_the_table_of_long_rows_is_what_is_planned():
    rows = long_rows()
    assert len(rows) >= 10
    for name, length, context, offload, gib, rate in rows:
        planned = planned_long_row(name, length.replace(",", ""), context, str(offload == "yes").lower())
        assert planned == (float(gib), int(rate)), (name, length, offload)


def test_muon_has_one_moment_of_blocks():
    def states(optimizer, ema):
        words = ["model.vocab_size=50258", f"optim.name={optimizer}", f"optim.ema_decay={ema}", "parallel.zero_stage=1"]
        return plan(load(ROOT / "configs" / "scale" / "1p7b.yaml", words), 8, device="H200").stages[0].optimizer

    for ema in (0, 0.9):
        fewer = states("adamw", ema) - states("muon", ema)
        assert 0.9 < fewer / (1.7e9 * 4 / 8) < 1
