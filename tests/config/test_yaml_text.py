"""YAML is strict where the library is silent: keys, aliases, comments; and messages stay short."""

import pytest

from esolm_megatron.commands import options
from esolm_megatron.commands.generate import SampleOptions
from esolm_megatron.config import ConfigError, check, load
from esolm_megatron.config.yaml_text import parse, value_of
from esolm_megatron.data.prepare.prepare_config import PrepareConfig, load_prepare_config
from esolm_megatron.errors import shown
from esolm_megatron.launch.site import load_cluster

RUN = "name: x\nmodel: {num_layers: 1, hidden_size: 8, num_heads: 2, seq_length: 8, vocab_size: 11}\nobjective: {alpha_0: 1}\n"
RUN += "train: {num_steps: 1, global_batch_size: 1, micro_batch_size: 1}\noptim: {warmup_steps: 0}\ndata: {path: nowhere}\n"


@pytest.mark.parametrize("read", [load, load_cluster, load_prepare_config], ids=["run", "cluster", "prepare"])
def test_a_key_twice_is_refused_with_both_lines_in_every_file(tmp_path, read):
    path = tmp_path / "file.yaml"
    path.write_text("# one\nname: x\nother: {a: 1, b: 2}\nname: y\n")
    with pytest.raises(ConfigError, match=r"file.yaml: 'name' stands in line 2 and again in line 4; remove one"):
        read(path)
    path.write_text("name: x\nother:\n  a: 1\n  a: 2\n")
    with pytest.raises(ConfigError, match="'a' stands in line 3 and again in line 4"):
        read(path)


def test_merged_keys_may_be_said_again():
    assert parse("base: &b {x: 1, y: 2}\nhere: {<<: *b, y: 3}", "f")["here"] == {"x": 1, "y": 3}


def test_aliases_that_grow_are_refused():
    lines = ["a0: &a0 [xxxxxxxxxx, xxxxxxxxxx]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(
        ConfigError, match=r"f: is [\d,]+ characters with its aliases written out; 1,048,576 are allowed"
    ):
        parse("\n".join(lines), "f")
    with pytest.raises(ConfigError, match="f: an alias holds itself"):
        parse("a: &a [*a]", "f")


def test_messages_repeat_the_beginning_of_a_value(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN.replace("num_layers: 1", f"num_layers: [{'1, ' * 5000}]"))
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert "model.num_layers = [1, 1" in str(caught.value)
    assert len(str(caught.value)) < 500
    assert shown("x" * 500).endswith("xxx... (502 characters)")


@pytest.mark.parametrize("word", ["optim.lr=.inf", "optim.lr=inf", "optim.clip_grad=.nan", "optim.betas=[0.9,1.5]",
                                  "optim.betas=[-0.1,0.9]", "model.norm_eps=.inf", "data.timeout_s=.inf"])  # fmt: skip
def test_numbers_are_finite_and_in_their_range(tmp_path, word):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    load(path)
    with pytest.raises(ConfigError, match=word.partition("=")[0].replace(".", r"\.")):
        load(path, [word])


def test_no_field_of_any_section_takes_infinity(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    tree = load(path).model_dump(mode="json")
    for section, values in tree.items():
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, float):
                with pytest.raises(ConfigError, match="finite"):
                    check({**tree, section: {**values, name: float("inf")}})


def test_text_is_taken_as_it_stands_and_a_comment_elsewhere_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    config = load(path, ["runs_dir=cut #1", "data.cache_dir=a: b", "data.path=[x]"])
    assert (str(config.runs_dir), config.data.cache_dir, config.data.path) == ("cut #1", "a: b", "[x]")
    assert load(path, ["data.cache_dir=null"]).data.cache_dir is None
    assert load(path, ["name='quoted'"]).name == "quoted"
    with pytest.raises(ConfigError, match="train.num_steps=3 #x.*begins a comment"):
        load(path, ["train.num_steps=3 #x"])
    assert value_of("output=cut #1/tokens", PrepareConfig) == "cut #1/tokens"
    assert options(SampleOptions, ["prompt=# a\\nb"]).prompt == "# a\nb"
    with pytest.raises(ConfigError, match="begins a comment"):
        options(SampleOptions, ["num_samples=2 # two"])
