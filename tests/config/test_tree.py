"""Each check of the configuration, with the fix in its sentence; loading, overriding, and writing it again."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from esolm_megatron.config import Config, ConfigError, check, dump, load, with_values, world_problems
from esolm_megatron.config.tree import read_tree


def tree(**sections):
    """A small valid configuration with some fields replaced, as plain dictionaries."""
    base = {
        "name": "run",
        "model": {"num_layers": 6, "hidden_size": 60, "num_heads": 10, "seq_length": 35, "vocab_size": 101},
        "objective": {"alpha_0": 0.25},
        "train": {"num_steps": 100, "global_batch_size": 48, "micro_batch_size": 2},
        "data": {"path": "tokens"},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values} if isinstance(values, dict) else values
    return base


def problems(**sections):
    with pytest.raises(ConfigError) as caught:
        check(tree(**sections))
    return str(caught.value).splitlines()


def test_the_small_configuration_is_valid():
    config = check(tree())
    assert isinstance(config, Config)
    assert config.run_dir == Path("runs/run")


PIPELINE = {"pipeline_size": 2, "virtual_pipeline_size": 3}

CROSS_FIELD = {
    "heads do not divide the width": (
        {"model": {"num_heads": 7}},
        "model.num_heads = 7: must divide model.hidden_size = 60",
    ),
    "odd head width": ({"model": {"num_heads": 4}}, "makes heads 15 wide, but RoPE needs an even width"),
    "checkpoints that are never saved": (
        {"checkpoint": {"every_steps": 100, "keep_every": 250}},
        "checkpoint.keep_every = 250: must be a multiple of checkpoint.every_steps = 100",
    ),
    "key-value heads": ({"model": {"num_kv_heads": 3}}, "model.num_kv_heads = 3: must divide model.num_heads = 10"),
    "tied head with a bias": ({"model": {"tied_embeddings": True}}, "set model.output_bias=false"),
    "diffusion model with a sequential part": (
        {"objective": {"alpha_0": 1, "diffusion_fraction": 0.5}},
        "alpha_0 = 1 has no sequential part; set it to 1 or null",
    ),
    "AR model with a diffusion part": (
        {"objective": {"alpha_0": 0, "diffusion_fraction": 0.5}},
        "alpha_0 = 0 has no diffusion part; set it to 0 or null",
    ),
    "hybrid without diffusion": (
        {"objective": {"diffusion_fraction": 0}},
        "alpha_0 = 0.25 needs both losses; set it to 0.5 or null",
    ),
    "hybrid without sequential part": (
        {"objective": {"diffusion_fraction": 1}},
        "alpha_0 = 0.25 needs both losses; set it to 0.5 or null",
    ),
    "unweighted loss below 1": (
        {"objective": {"diffusion_loss": "low_var"}},
        "objective.diffusion_loss = low_var: unweighted it is no bound for alpha_0 = 0.25 < 1; use elbo or any_order",
    ),
    "batch against micro-batch": (
        {"train": {"global_batch_size": 47}},
        "train.global_batch_size = 47: must be a multiple of micro_batch_size = 2",
    ),
    "half a diffusion row": (
        {"train": {"micro_batch_size": 3}},
        "train.micro_batch_size = 3: times objective.diffusion",
    ),
    "a third of a diffusion row": ({"objective": {"diffusion_fraction": 0.375}}, "use a multiple of 8"),
    "heads against TP": (
        {"parallel": {"tensor_size": 4}},
        "parallel.tensor_size = 4: must divide model.num_heads = 10",
    ),
    "key-value heads against TP": (
        {"parallel": {"tensor_size": 5}, "model": {"num_kv_heads": 2}},
        "parallel.tensor_size = 5: must divide model.num_kv_heads = 2",
    ),
    "MLP against TP": (
        {"parallel": {"tensor_size": 5}, "model": {"ffn_hidden_size": 64}},
        "parallel.tensor_size = 5: must divide model.ffn_hidden_size = 64",
    ),
    "fewer layers than stages": (
        {"parallel": {"pipeline_size": 7}},
        "model.num_layers = 6: each of pipeline_size x virtual_pipeline_size = 7 x 1 chunks needs a layer",
    ),
    "fewer layers than chunks": (
        {"parallel": {"pipeline_size": 2, "virtual_pipeline_size": 4}},
        "each of pipeline_size x virtual_pipeline_size = 2 x 4 chunks needs a layer; use fewer chunks",
    ),
    "too many stages named": (
        {"parallel": {"pipeline_size": 2, "layers_per_stage": [2, 2, 2]}},
        "parallel.layers_per_stage = [2, 2, 2]: must have parallel.pipeline_size = 2 entries",
    ),
    "stages with too few layers in all": (
        {"parallel": {"pipeline_size": 2, "layers_per_stage": [2, 3]}},
        "parallel.layers_per_stage = [2, 3]: adds up to 5, but model.num_layers = 6",
    ),
    "a stage without layers": (
        {"parallel": {"pipeline_size": 2, "layers_per_stage": [6, 0]}},
        "each stage needs a layer for each of its 1 chunks",
    ),
    "a chunk without layers": (
        {"parallel": {**PIPELINE, "layers_per_stage": [4, 2]}},
        "each stage needs a layer for each of its 3 chunks",
    ),
    "heads against CP": (
        {"parallel": {"context_size": 3}, "model": {"seq_length": 36}},
        "parallel.context_size = 3: times tensor_size = 1 it must divide model.num_heads = 10; use one of [1, 2, 5, 10]",
    ),
    "heads against TP x CP": (
        {"parallel": {"tensor_size": 2, "context_size": 2}, "model": {"seq_length": 36}},
        "parallel.context_size = 2: times tensor_size = 2 it must divide model.num_heads = 10; use one of [1, 5]",
    ),
    "key-value heads against CP": (
        {"parallel": {"context_size": 5}, "model": {"num_kv_heads": 2}},
        "parallel.context_size = 5: it must divide the 2 key-value heads of a tensor rank, or be a multiple of them; "
        "use one of [1, 2, 10]",
    ),
    "more context ranks than query heads": (
        {"parallel": {"context_size": 20}, "model": {"num_kv_heads": 2, "seq_length": 40}},
        "parallel.context_size = 20: times tensor_size = 1 it must divide model.num_heads = 10; use one of [1, 2, 10]",
    ),
    "key-value heads of a tensor rank against CP": (
        {
            "parallel": {"tensor_size": 2, "context_size": 6},
            "model": {"num_heads": 24, "head_size": 4, "num_kv_heads": 8, "seq_length": 36},
        },
        "parallel.context_size = 6: it must divide the 4 key-value heads of a tensor rank, or be a multiple of them; "
        "use one of [1, 2, 4, 12]",
    ),
    "length against CP": (
        {"parallel": {"context_size": 2}},
        "model.seq_length = 35: context parallelism needs a multiple of parallel.context_size = 2",
    ),
    "length against sequence and context parallelism": (
        {"parallel": {"context_size": 2, "tensor_size": 5, "sequence_parallel": True}, "model": {"seq_length": 38}},
        "model.seq_length = 38: sequence and context parallelism need a multiple of tensor_size x context_size = 10",
    ),
    "optimizer offload without ZeRO": (
        {"parallel": {"zero_stage": 0, "offload_optimizer": True}},
        "ZeRO 0 keeps every state on every rank; use zero_stage=1 or more",
    ),
    "parameter offload below ZeRO 3": (
        {"parallel": {"zero_stage": 2, "offload_optimizer": True, "offload_parameters": True}},
        "zero_stage = 2 keeps whole weights on the device; use zero_stage=3",
    ),
    "parameter offload without the optimizer": (
        {"parallel": {"zero_stage": 3, "offload_parameters": True}},
        "the update needs them beside the optimizer; set offload_optimizer=true",
    ),
    "chunks of a single stage": (
        {"parallel": {"virtual_pipeline_size": 3}},
        "needs parallel.pipeline_size of 2 or more; set it to 1",
    ),
    "sequence parallelism alone": (
        {"parallel": {"sequence_parallel": True}},
        "needs parallel.tensor_size of 2 or more; set it to false",
    ),
    "length against sequence parallelism": (
        {"parallel": {"sequence_parallel": True, "tensor_size": 2}},
        "model.seq_length = 35: sequence parallelism needs a multiple of parallel.tensor_size = 2",
    ),
    "micro-batches against interleaving": (
        {"parallel": PIPELINE, "train": {"global_batch_size": 18}},
        "multiple of parallel.pipeline_size = 2 micro-batches, found 9",
    ),
    "WSD without a decay": (
        {"optim": {"schedule": "wsd", "warmup_steps": 1}},
        "optim.decay_steps = 0: wsd needs between 1 and train.num_steps = 100",
    ),
    "WSD with a decay longer than the run": (
        {"optim": {"schedule": "wsd", "decay_steps": 101, "warmup_steps": 1}},
        "wsd needs between 1 and train.num_steps = 100",
    ),
    "warm-up longer than the run": (
        {"optim": {"schedule": "cosine"}},
        "optim.warmup_steps = 2500: must be below train.num_steps = 100",
    ),
}

SILENT_TRAPS = {
    "ZeRO-2 with stages": (
        {"parallel": {"zero_stage": 2, "pipeline_size": 2}},
        "with pipeline stages it hangs (3) or corrupts gradients (2); use zero_stage=1",
    ),
    "ZeRO-3 with stages": (
        {"parallel": {"zero_stage": 3, "pipeline_size": 2}},
        "with pipeline stages it hangs (3) or corrupts gradients (2); use zero_stage=1",
    ),
    "two interleaved stages that swap messages": (
        {"parallel": {**PIPELINE, "batch_p2p_comm": True}},
        "messages are swapped in silence; set it to false or null",
    ),
    "outputs freed while gloo still sends them": (
        {"parallel": {**PIPELINE, "deallocate_pipeline_outputs": True}, "train": {"device": "cpu"}},
        "interleaved over gloo it sends freed memory; set it to false",
    ),
}


@pytest.mark.parametrize(
    ("sections", "words"), [*CROSS_FIELD.values(), *SILENT_TRAPS.values()], ids=[*CROSS_FIELD, *SILENT_TRAPS]
)
def test_a_configuration_that_cannot_run_is_refused_with_the_fix(sections, words):
    found = problems(**sections)
    assert len([line for line in found if words in line]) == 1, found
    assert len(found) == 1, "one cause, one sentence"


NEIGHBOURS = [
    {"objective": {"alpha_0": 1}},
    {"objective": {"alpha_0": 0, "diffusion_fraction": 0}},
    {"objective": {"alpha_0": 1, "diffusion_loss": "low_var"}},
    {"objective": {"diffusion_loss": "any_order"}},
    {"objective": {"diffusion_fraction": 0.25}, "train": {"micro_batch_size": 4}},
    {"model": {"tied_embeddings": True, "output_bias": False}},
    {"model": {"activation": "swiglu"}, "parallel": {"tensor_size": 2}},
    {"parallel": PIPELINE},
    {"parallel": {**PIPELINE, "batch_p2p_comm": False}},
    {"parallel": {**PIPELINE, "pipeline_size": 3, "virtual_pipeline_size": 2, "batch_p2p_comm": True}},
    {"parallel": {"pipeline_size": 2, "batch_p2p_comm": True}},
    {"parallel": {"pipeline_size": 2, "deallocate_pipeline_outputs": True}, "train": {"device": "cpu"}},
    {"parallel": {**PIPELINE, "deallocate_pipeline_outputs": True}, "train": {"device": "cuda"}},
    {"parallel": {"sequence_parallel": True, "tensor_size": 5}},
    {"parallel": {"zero_stage": 0, "pipeline_size": 2}},
    {"parallel": {"zero_stage": 2, "offload_optimizer": True}},
    {"parallel": {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True, "tensor_size": 2}},
    {"parallel": {"context_size": 5}},
    {"parallel": {"context_size": 2, "tensor_size": 5}, "model": {"seq_length": 34}},
    {"parallel": {"context_size": 10}, "model": {"num_kv_heads": 2, "seq_length": 40}},
    {"parallel": {"context_size": 5}, "model": {"num_kv_heads": 1}},
    {"parallel": {"context_size": 5, "tensor_size": 2}, "model": {"num_kv_heads": 2}},
    {"parallel": {"context_size": 2}, "model": {"num_kv_heads": 2, "seq_length": 36}},
    {"parallel": {"pipeline_size": 4}},
    {"parallel": {"pipeline_size": 2, "layers_per_stage": [1, 5]}},
    {"parallel": {"pipeline_size": 2, "virtual_pipeline_size": 2}},
    {"optim": {"schedule": "wsd", "decay_steps": 100, "warmup_steps": 5}},
    {"optim": {"schedule": "cosine", "warmup_steps": 99}},
    {"optim": {"warmup_steps": 2500}},
]


@pytest.mark.parametrize("sections", NEIGHBOURS, ids=str)
def test_what_lies_beside_a_refused_configuration_is_accepted(sections):
    check(tree(**sections))


@pytest.mark.parametrize(
    ("sections", "start"),
    [
        ({"objective": {"alpha_0": 1.5}}, "objective.alpha_0 = 1.5: "),
        ({"model": {"num_layers": 0}}, "model.num_layers = 0: "),
        ({"model": {"norm": "batchnorm"}}, "model.norm = 'batchnorm': "),
        ({"train": {"num_steps": "many"}}, "train.num_steps = 'many': "),
        ({"optim": {"betas": [0.9]}}, "optim.betas.1: missing"),
        ({"parallel": {"zero_stage": 4}}, "parallel.zero_stage = 4: "),
        ({"name": "a/b"}, "name = 'a/b': "),
        ({"seed": -1}, "seed = -1: "),
    ],
)
def test_a_field_out_of_range_is_named_with_its_value(sections, start):
    assert [line for line in problems(**sections) if line.startswith(start)]


def test_all_problems_are_told_at_once():
    found = problems(
        model={"num_heads": 7, "seq_lenght": 35},
        objective={"alpha_0": 2},
        train={"global_batch_size": 47},
        optim={"schedule": "cosine"},
        parallel={"zero_stage": 2, "pipeline_size": 2},
    )
    paths = [line.split(" ")[0] for line in found]
    assert sorted(paths) == [
        "model.num_heads",
        "model.seq_lenght",
        "objective.alpha_0",
        "optim.warmup_steps",
        "parallel.zero_stage",
        "train.global_batch_size",
    ]


def test_a_missing_section_does_not_hide_the_rest():
    values = tree(model={"num_heads": 7})
    del values["objective"], values["data"]["path"]
    with pytest.raises(ConfigError) as caught:
        check(values)
    found = str(caught.value).splitlines()
    assert "objective: missing; give it a value" in found
    assert "data.path: missing; give it a value" in found
    assert any(line.startswith("model.num_heads = 7") for line in found)


@pytest.mark.parametrize(
    ("sections", "hint"),
    [
        ({"model": {"hiden_size": 3}}, "model.hiden_size = 3: no such field; did you mean model.hidden_size?"),
        ({"modle": {"num_layers": 3}}, "did you mean model?"),
        ({"train": {"alpha_0": 3}}, "did you mean objective.alpha_0?"),
        ({"tensor_size": 2}, "did you mean parallel.tensor_size?"),
        ({"data": {"zzz": 1}}, "known here: path, num_lanes"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(sections, hint):
    assert [line for line in problems(**sections) if hint in line]


def test_values_left_out_are_worked_out():
    config = check(tree())
    assert (config.model.kv_heads, config.model.head_dim, config.model.ffn_size) == (10, 6, 240)
    assert check(tree(model={"activation": "swiglu"})).model.ffn_size == 192  # 160, up to a multiple of 64
    assert check(tree(model={"ffn_hidden_size": 77})).model.ffn_size == 77
    assert config.model.mask_id == 100
    assert [check(tree(objective={"alpha_0": a})).objective.fraction for a in (0, 0.1, 1)] == [0, 0.5, 1]


def test_an_unknown_vocabulary_is_asked_for_when_it_is_needed():
    model = check(tree(model={"vocab_size": None})).model
    with pytest.raises(ConfigError, match=r"model\.vocab_size = null"):
        _ = model.vocab


def test_nothing_can_be_changed_afterwards():
    config = check(tree())
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3
    with pytest.raises(ValidationError, match="frozen"):
        config.model.num_layers = 3


def test_with_values_replaces_and_checks():
    config = check(tree())
    assert with_values(config, model={"num_layers": 5}).model.num_layers == 5
    assert config.model.num_layers == 6
    with pytest.raises(ConfigError, match=r"model.num_heads = 7"):
        with_values(config, model={"num_heads": 7})


@pytest.fixture
def write(tmp_path):
    def written(name, values):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return path

    return written


def test_what_is_dumped_loads_as_the_same(write):
    config = check(
        tree(
            model={"num_kv_heads": 5, "dropout": 0.1},
            optim={"betas": [0.8, 0.95], "lr": 1e-7},
            parallel={**PIPELINE, "batch_p2p_comm": False},
            train={"peak_tflops": 3.5},
        )
    )
    again = load(write("run.yaml", dump(config)))
    assert again == config
    assert dump(again) == dump(config)


def test_overrides_come_last_and_are_yaml(write):
    path = write("run.yaml", tree())
    config = load(path, ["model.num_layers=9", "optim.betas=[0.5, 0.6]", "name=other", "parallel.batch_p2p_comm=null"])
    assert (config.model.num_layers, config.optim.betas, config.name) == (9, (0.5, 0.6), "other")
    assert load(path, ["train.num_steps=5", "train.num_steps=7"]).train.num_steps == 7


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.num_layers", "an override is written section.field=value"),
        ("=3", "an override is written section.field=value"),
        ("name.first=3", "name is not a section"),
        ("model.num_layers=[", "the value is not YAML"),
        ("model.num_layer=3", "did you mean model.num_layers?"),
    ],
)
def test_a_bad_override_is_refused(write, override, words):
    with pytest.raises(ConfigError) as caught:
        load(write("run.yaml", tree()), [override])
    assert words in str(caught.value)


def test_a_base_is_read_first_from_the_folder_of_its_file(write):
    write("shared/root.yaml", tree(model={"num_layers": 12}, optim={"lr": 0.5}))
    write("shared/middle.yaml", {"base": "root.yaml", "model": {"num_layers": 9, "dropout": 0.1}})
    config = load(write("run.yaml", {"base": "shared/middle.yaml", "name": "top", "model": {"dropout": 0.2}}))
    assert (config.name, config.model.num_layers, config.model.dropout, config.optim.lr) == ("top", 9, 0.2, 0.5)
    assert config.model.hidden_size == 60


@pytest.mark.parametrize("names", [("a.yaml",), ("a.yaml", "b.yaml"), ("a.yaml", "b.yaml", "c.yaml")])
def test_base_files_in_a_circle_are_refused(write, names):
    for name, base in zip(names, [*names[1:], names[0]], strict=True):
        path = write(name, {"base": base})
    with pytest.raises(ConfigError, match="base files form a circle"):
        load(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [("[1, 2]", "must be a mapping of sections, found list"), ("a: [", "not YAML"), ("", "found NoneType")],
)
def test_a_file_that_is_no_tree_is_refused(write, text, words):
    with pytest.raises(ConfigError, match=words):
        read_tree(write("bad.yaml", text))


def test_a_missing_file_or_base_is_named(write, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.yaml: cannot be read"):
        load(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match=r"gone.yaml: cannot be read"):
        load(write("run.yaml", {**tree(), "base": "gone.yaml"}))


def test_problems_are_headed_by_the_file(write):
    path = write("run.yaml", tree(model={"num_heads": 7}))
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).splitlines()[0] == f"{path}:"


SPLIT = {
    "parallel": {"tensor_size": 2, "pipeline_size": 3, "virtual_pipeline_size": 2},
    "train": {"global_batch_size": 36},
}


@pytest.mark.parametrize(
    ("sections", "world", "device", "words"),
    [
        (
            SPLIT,
            8,
            "cuda",
            "world size = 8: must be a multiple of parallel.tensor_size x pipeline_size = 2 x 3; start 12",
        ),
        (SPLIT, 24, "cuda", "must be a multiple of micro_batch_size x data-parallel size = 2 x 4"),
        (SPLIT, 12, "cuda", None),
        (SPLIT, 36, "cuda", None),
        (
            SPLIT,
            54,
            "cuda",
            "leaves 2 micro-batches to a rank, but interleaving needs a multiple of parallel.pipeline_size = 3",
        ),
        ({"parallel": {"context_size": 5}}, 6, "cpu", "pipeline_size x context_size = 1 x 1 x 5; start 10 processes"),
        ({"parallel": {"context_size": 5}}, 10, "cpu", None),
        ({}, 5, "cpu", "2 x 5"),
        ({}, 6, "cpu", None),
        ({"parallel": {**PIPELINE, "deallocate_pipeline_outputs": True}}, 2, "cpu", "over gloo it sends freed memory"),
        ({"parallel": {**PIPELINE, "deallocate_pipeline_outputs": True}}, 2, "cuda", None),
    ],
)
def test_a_world_that_does_not_fit_is_told_with_the_fix(sections, world, device, words):
    found = world_problems(check(tree(**sections)), world, device)
    assert len(found) == (words is not None)
    assert words is None or words in found[0]
