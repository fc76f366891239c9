"""There and back: inference folder -> training run -> inference folder, and through the reference's names, bit by bit."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from conversion.test_export import MODERN, make_run, random_model
from conversion.test_from_training import train_and_save
from ranks import run_ranks
from safetensors.torch import load_file
from train.test_trainer import finish, start, tokens, tree  # noqa: F401 - a fixture
from truth import MODERN as TRAINED
from truth import make_config

from checkpoints_conversion import to_reference, training
from checkpoints_conversion.export import export_run
from checkpoints_conversion.reference import ForeignCheckpoint, import_reference
from checkpoints_conversion.to_reference import export_reference
from checkpoints_conversion.training import start_run
from esolm_megatron.checkpoint import Checkpoint, step_folder
from esolm_megatron.cli import main
from esolm_megatron.config import ConfigError, check
from esolm_megatron.model.pretrained import PretrainedError, load_model, save_model
from esolm_megatron.train import preflight


def same(one, other):
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_import_export_is_bit_exact(tmp_path, dtype):
    make_run(tmp_path / "run", **MODERN, qkv_bias=True)
    export_run(tmp_path / "run", tmp_path / "a", dtype=dtype)
    report = start_run(tmp_path / "a", tmp_path / "again")
    assert report.max_difference == 0
    saved = Checkpoint.open(step_folder(tmp_path / "again", 0), verify=True)
    assert (saved.kinds(), saved.manifest["data_fingerprint"]) == (["weight"], None)
    assert saved.manifest["world_size"] > 2
    export_run(tmp_path / "again", tmp_path / "b", weights="last", dtype=dtype)
    assert same(tmp_path / "a", tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "again", "b", "run"]


@pytest.mark.gloo
@pytest.mark.parametrize(
    "parallel", [{"tensor_size": 2, "sequence_parallel": True}, {"pipeline_size": 2}, {"zero_stage": 3}]
)
def test_any_layout_loads_it_with_average_and_fresh_moments(tmp_path, parallel):
    config = make_config(TRAINED | {"qkv_bias": True, "head_size": 10}, parallel=parallel)
    model = random_model(config.model, 1)
    save_model(tmp_path / "m", config.model, 0.5, model.named_parameters())
    start_run(tmp_path / "m", tmp_path / "run")
    run_ranks(train_and_save, 2, config, tmp_path / "run", 0, 0)
    saved = Checkpoint.open(step_folder(tmp_path / "run", 1))
    for name, parameter in model.named_parameters():
        assert torch.equal(saved.read("weight", name), parameter), name
        assert torch.equal(saved.read("ema", name), parameter), name
        assert not saved.read("exp_avg", name).any()


@pytest.mark.gloo
def test_the_trainer_starts_from_it(tmp_path, tokens):  # noqa: F811
    """A step too small to change a bit leaves the exported weights; another network is refused."""
    run = tree(tokens, tmp_path, train={"num_steps": 1}, optim={"lr": 1e-30}, evaluate={"every_steps": 0})
    model = random_model(preflight.resolve(check(run)).model, 1)
    save_model(tmp_path / "m", model.shape, 0.5, model.named_parameters())
    assert main(["convert", str(tmp_path / "m"), "--to", "training", str(tmp_path / "run")]) == 0
    code, text = finish(start(run | {"model": run["model"] | {"hidden_size": 32}}, tmp_path))
    assert code == 2
    assert "model.hidden_size = 32: the weights need 24" in text
    run = {"base": "run/model.yaml"} | {k: v for k, v in run.items() if k != "model"}
    code, text = finish(start(run, tmp_path))
    assert code == 0, text
    saved = Checkpoint.open(step_folder(tmp_path / "run", 1))
    assert saved.kinds() == ["weight", "exp_avg", "exp_avg_sq", "ema"]
    for name, parameter in model.named_parameters():
        assert torch.equal(saved.read("weight", name), parameter), name
        assert torch.equal(saved.read("ema", name), parameter), name
    assert saved.read("exp_avg", "embedding.weight").any()


def test_a_config_file_from_before_a_field_existed_is_still_the_same_run(tmp_path):
    config = make_config(runs_dir=str(tmp_path))
    config.run_dir.mkdir()
    old = config.model_dump(mode="json")
    del old["model"]["qkv_bias"], old["model"]["head_size"]
    (config.run_dir / "config.yaml").write_text(yaml.safe_dump(old))
    preflight.refuse_other_run(config)
    old["model"]["qk_norm"] = False
    (config.run_dir / "config.yaml").write_text(yaml.safe_dump(old))
    with pytest.raises(ConfigError, match="model.qk_norm: was False, now True"):
        preflight.refuse_other_run(config)


def test_runs_are_not_overwritten_and_a_failed_probe_leaves_none(tmp_path, monkeypatch):
    make_run(tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "m")
    with pytest.raises(PretrainedError, match="run: exists and is not empty"):
        start_run(tmp_path / "m", tmp_path / "run")
    real = training.Checkpoint.read
    monkeypatch.setattr(training.Checkpoint, "read", lambda self, k, n: real(self, k, n) * (1 + ("out" in n)))
    with pytest.raises(PretrainedError, match="does not answer the probe as .* largest difference"):
        start_run(tmp_path / "m", tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "run"]


def test_through_the_references_names_and_back(tmp_path, theirs):
    make_run(tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "m")
    report = export_reference(tmp_path / "m", tmp_path / "ref")
    assert report.max_difference <= 1e-12
    written = load_file(tmp_path / "ref" / "model.safetensors")
    assert {n for n in written if "blocks.1" in n or "." not in n} == {
        n for n in theirs if "blocks.1" in n or "." not in n
    }
    assert {n for n in written if "blocks" not in n} == {n for n in theirs if "blocks" not in n}
    back = import_reference(tmp_path / "ref", tmp_path / "back")
    assert (back.alpha_0, back.alpha_0_known) == (0.25, True)
    assert same(tmp_path / "m", tmp_path / "back")


def test_the_references_own_weights_go_back_as_the_same_function(tmp_path, hub_folder, theirs):
    report = import_reference(hub_folder, tmp_path / "m")
    assert report.max_difference < 1e-10
    export_reference(tmp_path / "m", tmp_path / "ref")
    import_reference(tmp_path / "ref", tmp_path / "back")
    ours, back = load_model(tmp_path / "m", torch.float64), load_model(tmp_path / "back", torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), back.parameters(), strict=True))
    rates = load_file(tmp_path / "ref" / "model.safetensors")["rotary_emb.inv_freq"]
    assert torch.equal(rates, theirs["rotary_emb.inv_freq"])


def test_what_the_reference_has_not_and_wrong_exports_are_refused(tmp_path, monkeypatch):
    make_run(tmp_path / "modern", **MODERN)
    export_run(tmp_path / "modern", tmp_path / "m")
    with pytest.raises(PretrainedError, match="norm = 'rmsnorm': the reference's network has 'layernorm'"):
        export_reference(tmp_path / "m", tmp_path / "ref")
    make_run(tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "n")
    real = to_reference.unfold
    monkeypatch.setattr(
        to_reference, "unfold", lambda *a: {n: t.flip(0) if "qkv" in n else t for n, t in real(*a).items()}
    )
    with pytest.raises(PretrainedError, match=r"layers.0.attention.qkv.weight: importing .* does not give it back"):
        export_reference(tmp_path / "n", tmp_path / "ref")
    assert not list(tmp_path.glob("*ref*"))


def test_a_wrong_fold_fails_the_references_probe(tmp_path, hub_folder, monkeypatch):
    from checkpoints_conversion import reference

    real = reference.fold
    wrong = {"layers.0.norm1.bias": 0.0, "layers.1.attention.out.weight": 1.5}
    monkeypatch.setattr(reference, "fold", lambda s, h: {n: t * wrong.get(n, 1) for n, t in real(s, h).items()})
    with pytest.raises(ForeignCheckpoint, match="does not answer as the reference's does: largest difference"):
        import_reference(hub_folder, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_the_command_line_checks_hashes_and_refuses_what_makes_no_sense(tmp_path, capsys):
    make_run(tmp_path / "run")
    run, out = str(tmp_path / "run"), str(tmp_path / "m")
    assert main(["convert", run, out, "dtype=bf16"]) == 0
    assert "max_difference" in capsys.readouterr().out
    assert main(["convert", out, "--check"]) == 0
    (tmp_path / "m" / "modeling_esolm.py").write_text("import os")
    for words, said in (
        ([out, "--check"], "modeling_esolm.py: is not what was written"),
        ([run, "--check"], "is a training run or its checkpoint, without hashes.json"),
        ([run, "dtype=bf16"], "OUT is missing"),
        ([run], "OUT is missing"),
        ([run, "x", "vocab_size=9"], "vocab_size: has no meaning for a conversion from run to model; it takes dtype"),
        ([out, "x", "--to", "reference", "dtype=fp32"], "dtype: has no meaning"),
        ([out, "x", "--from", "reference", "--to", "training"], "convert to an inference folder first"),
        ([run, "x", "--to", "training"], "is a training run or its checkpoint"),
    ):
        assert main(["convert", *words]) == 2, words
        assert said in capsys.readouterr().err.replace("\n", ""), words
    assert not (tmp_path / "x").exists()


KILLED = """
import os, signal, sys
from checkpoints_conversion import export
from esolm_megatron.model import pretrained
pretrained.save_model.__kwdefaults__["shard_bytes"] = 4000
def progress(name, number, total):
    print(number, total, flush=True)
    if number == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
export.export_run(sys.argv[1], sys.argv[2], progress=progress)
"""


@pytest.fixture
def killed(tmp_path):
    """An export of tmp_path/run to tmp_path/out that was killed at its fifteenth tensor."""
    make_run(tmp_path / "run")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run"), str(tmp_path / "out"), "15"]
    assert subprocess.run(command, capture_output=True, env=os.environ, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    return tmp_path / ".out.partial"


def test_a_killed_export_goes_on_after_its_last_whole_file(tmp_path, killed, monkeypatch):
    export_run(tmp_path / "run", tmp_path / "whole")
    make_run(tmp_path / "other", change=lambda ranks, probe: [p.tensor.add_(1e-5) for p in ranks[0] if p.kind == "ema"])
    shutil.copytree(killed, tmp_path / ".b.partial")
    shutil.copytree(killed, tmp_path / ".c.partial")
    damaged = sorted((tmp_path / ".b.partial").glob("model-*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    monkeypatch.setitem(save_model.__kwdefaults__, "shard_bytes", 4000)
    numbers = {}
    for name, run in (("out", "run"), ("b", "run"), ("c", "other")):
        numbers[name] = []
        export_run(tmp_path / run, tmp_path / name, progress=lambda _, n, total, to=numbers[name]: to.append(n))
        assert not (tmp_path / f".{name}.partial").exists()
        assert main(["convert", str(tmp_path / name), "--check"]) == 0
    total = numbers["c"][-1]
    assert numbers["c"] == list(range(1, total + 1)), "what another conversion left is not mixed in"
    assert 1 < numbers["out"][0] <= 15, "whole files are kept, the one it died in is written again"
    assert numbers["out"] == list(range(numbers["out"][0], total + 1))
    assert numbers["b"][0] == 1, "a file that has changed since is written again"
    assert len(numbers["out"]) < len(numbers["b"]) < total
    whole = load_model(tmp_path / "whole").state_dict()
    for name in ("out", "b"):
        assert all(torch.equal(t, whole[n]) for n, t in load_model(tmp_path / name).state_dict().items())


def test_two_conversions_do_not_write_one_folder(tmp_path):
    make_run(tmp_path / "run")

    def meanwhile(name, number, total):
        with pytest.raises(PretrainedError, match="another process is writing it"):
            export_run(tmp_path / "run", tmp_path / "out")

    export_run(tmp_path / "run", tmp_path / "out", progress=meanwhile)
    assert main(["convert", str(tmp_path / "out"), "--check"]) == 0
