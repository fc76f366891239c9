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
    assert stage.buckets == 2 * 4 * 50_000_000
    # 16 diffusion rows of 1024; 16 sequential ones of 1024 and 640 masks (512 + 6 x 16 = 608, a multiple of 16)
    assert cost.packed_tokens == 32 * 1024 + 16 * 608
    assert stage.activations == (12 * (6 * 768 + 5 * 768 + 2 * 3072) + 768) * cost.packed_tokens * 2
    # 16 (1024 + 608) x 50304 logits are 10 chunks: one is there in fp32 and, as its gradient, in bf16; the gradients of what
    # the head is fed and of its matrix, which is added up in fp32
    places, matrix = 16 * (1024 + 608), 50304 * 768
    assert stage.logits == 6 * 2**27 + 2 * places * 768 + 6 * matrix
    assert plan(load(BASELINE, ["model.vocab_size=1000"]), 8).stages[0].logits == (
        6 * places * 1024 + 2 * places * 768 + 2 * 1024 * 768
    )
    parts = (stage.weights, stage.gradients, stage.optimizer, stage.buckets, stage.activations, stage.logits)
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
    assert [bool(stage.logits) for stage in cost.stages] == [False, True]
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
    half = 16 * (1024 + 608) // 2
    assert (split.activations, split.logits) == (whole.activations // 2, whole.logits - 2 * half * 768)
    few = [load(BASELINE, ["model.vocab_size=1000", f"parallel.context_size={size}"]) for size in (1, 2)]
    one, two = (plan(config, 2).stages[0].logits for config in few)
    assert two == one - half * (6 * 1024 + 2 * 768)
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
    whole, *split = (
        plan(load(CONFIGS / "scale/70b.yaml", ["model.vocab_size=128000", f"parallel.context_size={size}"]), 256)
        for size in (1, 2, 8)
    )
    for cost, size in zip(split, (2, 8), strict=True):
        assert cost.topology.data_size * size == whole.topology.data_size
        per_token = whole.stages[0].activations / whole.packed_tokens
        assert cost.stages[0].activations == pytest.approx(per_token * cost.packed_tokens / size)


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


def test_recomputation_and_splits_lower_what_a_block_keeps():
    model = load(CONFIGS / "scale/7b.yaml").model
    kept = [channels_per_token(model, r, 1, False) for r in ("none", "selective", "full")]
    assert kept == [4 * 4096 + 5 * 4096 + 4 * 12288, 3 * 4096 + 5 * 4096, 4096]
    assert channels_per_token(model, "none", 2, True) == kept[0] / 2
    assert channels_per_token(model, "none", 2, False) == kept[0] / 2 + 2 * 4096


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
