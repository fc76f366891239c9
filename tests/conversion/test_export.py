"""From boxes on many ranks to one folder that answers as the training model did, or to no folder at all."""

import json

import pytest
import torch
from safetensors.torch import save_file

from checkpoints_conversion.export import ExportError, export_run
from checkpoints_conversion.probe import BOUNDS
from esolm_megatron.checkpoint import CheckpointError, Piece
from esolm_megatron.checkpoint import folder as checkpoint
from esolm_megatron.config import check
from esolm_megatron.data.tokenizer import load_tokenizer
from esolm_megatron.model.attention import PackedAttention, PackedLayout
from esolm_megatron.model.layers import PlainLinears
from esolm_megatron.model.pretrained import (
    PretrainedError,
    check_hashes,
    load_model,
    parameter_shapes,
    read_config,
    save_model,
)
from esolm_megatron.model.transformer import EsoLM

MODERN = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "mlp_bias": False,
    "output_bias": False,
    "qk_norm": True,
    "num_kv_heads": 1,
}
SHAPES = [{}, MODERN, MODERN | {"tied_embeddings": True}]
BASE = {"num_layers": 2, "hidden_size": 20, "num_heads": 2, "ffn_hidden_size": 28, "vocab_size": 29, "seq_length": 17}


def run_config(precision="fp32", **model):
    return check(
        {
            "name": "run",
            "model": BASE | model,
            "objective": {"alpha_0": 0.25},
            "train": {"num_steps": 9, "global_batch_size": 2, "micro_batch_size": 2, "precision": precision},
            "data": {"path": "nowhere"},
        }
    )


def random_model(config, seed, dtype=torch.float32):
    model = EsoLM(config, PlainLinears())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.to(dtype)


def answer(model, tokens, positions):
    with torch.no_grad():
        return model(tokens, positions, PackedAttention(PackedLayout(len(tokens), 1)))


def make_run(run, step=3, kinds=("weight", "ema"), precision="fp32", change=None, **model):
    """A run with one checkpoint on three ranks, as training leaves it; returns its models by kind."""
    config = run_config(precision, **model)
    models = {kind: random_model(config.model, seed) for seed, kind in enumerate(kinds)}
    tokens = torch.randint(0, 29, (13,), generator=torch.Generator().manual_seed(5))
    probe = {"tokens": tokens, "positions": torch.randperm(13, generator=torch.Generator().manual_seed(6))}
    ranks = [[], [], []]
    for kind, whole in models.items():
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        trained = random_model(config.model, list(models).index(kind), dtype)
        probe[f"logits_{kind}"] = answer(trained, tokens, probe["positions"]).float()
        for name, parameter in whole.named_parameters():
            parts = parameter.detach().tensor_split(3)
            starts = [0, *torch.tensor([len(part) for part in parts]).cumsum(0).tolist()]
            for rank, (start, part) in enumerate(zip(starts, parts, strict=False)):
                offset = (start, *(0,) * (parameter.dim() - 1))
                ranks[rank].append(Piece(kind, name, tuple(parameter.shape), offset, part))
    if change is not None:
        change(ranks, probe)
    staging = checkpoint.staging_folder(run, step)
    for rank, pieces in enumerate(ranks):
        checkpoint.write_rank(staging, rank, pieces)
    manifest = {
        "step": step,
        "config": config.model_dump(mode="json"),
        "numbers": {"validation_nelbo": 1.5, "loss": None},
    }
    checkpoint.commit(staging, checkpoint.step_folder(run, step), manifest, 3, probe)
    (run / "tokenizer").mkdir(exist_ok=True)
    load_tokenizer("bytes").save(run / "tokenizer")
    (run / "tokenizer" / "notes.bin").write_text("not copied")
    return models


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize(("weights", "kind"), [("ema", "ema"), ("last", "weight")])
def test_export_is_the_trained_model(tmp_path, model, weights, kind):
    models, calls = make_run(tmp_path / "run", **model), []
    report = export_run(tmp_path / "run", tmp_path / "out", weights=weights, progress=lambda *args: calls.append(args))
    assert report.max_difference <= 1e-5 < report.tolerance
    assert (report.step, report.weights, report.num_tensors) == (3, weights, len(calls))
    assert calls[-1][1:] == (len(calls), len(calls))
    loaded = dict(load_model(tmp_path / "out").named_parameters())
    expected = dict(models[kind].named_parameters())
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in loaded)
    info = read_config(tmp_path / "out")
    assert info.model == run_config(**model).model
    assert (info.alpha_0, info.dtype) == (0.25, torch.float32)
    tokens = 3 * 2 * 17
    assert info.facts == {"step": 3, "weights": weights, "run": "run", "tokens": tokens, "validation_nelbo": 1.5}
    data = {"config.json", "generation_config.json", "hashes.json", "model.safetensors", "README.md"}
    data |= {"tokenizer.json", "tokenizer_config.json"}
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert data | {"configuration_esolm.py", "modeling_esolm.py"} <= found
    assert {name for name in found - data if not name.endswith(".py")} == set()
    assert sorted(check_hashes(tmp_path / "out")) == sorted(found - {"hashes.json"})
    assert "| tokens seen in training | 102 |" in (tmp_path / "out" / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_which_step_is_exported(tmp_path):
    run = tmp_path / "run"
    for step in (3, 4, 5):
        make_run(run, step)
    assert export_run(run, tmp_path / "a").step == 5
    assert export_run(run, tmp_path / "b", step=4).step == 4
    assert export_run(checkpoint.step_folder(run, 3), tmp_path / "c").step == 3
    assert (tmp_path / "c" / "tokenizer.json").exists()
    with pytest.raises(ExportError, match="step = 9: .* it has 3, 4, 5"):
        export_run(run, tmp_path / "d", step=9)
    with pytest.raises(ExportError, match="holds no checkpoint"):
        export_run(tmp_path / "a", tmp_path / "d")
    path = checkpoint.step_folder(run, 5) / "rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    assert export_run(run, tmp_path / "e").step == 4
    with pytest.raises(CheckpointError, match="rank_00001.safetensors: its content has changed"):
        export_run(run, tmp_path / "d", step=5)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_exports_pass_their_looser_bound(tmp_path, dtype):
    make_run(tmp_path / "run")
    report = export_run(tmp_path / "run", tmp_path / "out", dtype=dtype)
    assert BOUNDS[torch.float32] < report.max_difference <= report.tolerance
    assert read_config(tmp_path / "out").dtype == dtype


def test_a_bf16_run_passes_though_its_probe_is_rounded(tmp_path):
    make_run(tmp_path / "run", precision="bf16")
    report = export_run(tmp_path / "run", tmp_path / "out")
    assert BOUNDS[torch.float32] < report.max_difference <= report.tolerance


def swap(first, second):
    """Each named tensor's boxes get the other's values: what a converter that mixes names up would do."""

    def change(ranks, probe):
        for pieces in ranks:
            for i, piece in enumerate(pieces):
                other = second if piece.name == first else first if piece.name == second else None
                if other is not None and piece.kind == "ema":
                    (j,) = (j for j, p in enumerate(pieces) if (p.kind, p.name) == ("ema", other))
                    if j > i:
                        tensors = pieces[j].tensor, pieces[i].tensor
                        for at, tensor in zip((i, j), tensors, strict=True):
                            p = pieces[at]
                            pieces[at] = Piece(p.kind, p.name, p.whole_shape, p.offset, tensor)

    return change


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "names",
    [
        ("layers.0.attention.out.weight", "layers.1.attention.out.weight"),
        ("layers.0.mlp.fc1.weight", "layers.1.mlp.fc1.weight"),
        ("embedding.weight", "head.weight"),
    ],
)
def test_a_failed_probe_leaves_nothing(tmp_path, names, precision):
    make_run(tmp_path / "run", change=swap(*names), precision=precision)
    with pytest.raises(ExportError, match="does not answer the probe .* largest difference"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def nan(ranks, probe):
    probe["logits_ema"][3, 4] = float("nan")


def finite_mask(ranks, probe):
    probe["logits_ema"][:, -1] = 0.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (nan, "largest difference nan"),
        (finite_mask, "largest difference inf"),
        (lambda ranks, probe: probe.pop("logits_ema"), "its probe has no logits_ema, so the export cannot be checked"),
        (lambda ranks, probe: probe.clear(), "its probe has no tokens"),
        (
            lambda ranks, probe: probe.update(logits_ema=torch.zeros(13, 30)),
            r"shape \(13, 30\), the model gives \(13, 29\)",
        ),
    ],
)
def test_a_probe_that_proves_nothing_is_refused(tmp_path, change, words):
    make_run(tmp_path / "run", change=change)
    with pytest.raises(ExportError, match=words):
        export_run(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_is_not_there_is_not_exported(tmp_path):
    make_run(tmp_path / "run", kinds=("weight",))
    with pytest.raises(ExportError, match="without a moving average .* export weights=last"):
        export_run(tmp_path / "run", tmp_path / "out")
    with pytest.raises(ExportError, match="weights = 'best': must be ema or last"):
        export_run(tmp_path / "run", tmp_path / "out", weights="best")
    export_run(tmp_path / "run", tmp_path / "out", weights="last")

    def drop(ranks, probe):
        ranks[:] = [[p for p in pieces if p.name != "layers.1.norm2.bias"] for pieces in ranks]

    make_run(tmp_path / "other", change=drop)
    with pytest.raises(ExportError, match=r"ema layers.1.norm2.bias: found nothing, the network needs \(20,\)"):
        export_run(tmp_path / "other", tmp_path / "out2")


def test_an_existing_folder_is_not_touched(tmp_path):
    make_run(tmp_path / "run")
    out = tmp_path / "out"
    out.mkdir()
    export_run(tmp_path / "run", out)
    before = (out / "config.json").read_bytes()
    with pytest.raises(PretrainedError, match="exists and is not empty"):
        export_run(tmp_path / "run", out, weights="last")
    assert (out / "config.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.fixture
def folder(tmp_path):
    config = run_config().model
    save_model(tmp_path / "m", config, 0.5, random_model(config, 0).named_parameters(), facts={"step": 1})
    return tmp_path / "m"


def rewrite(folder, **changes):
    tree = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in tree.items() if v != "dropped"}))


def test_tensors_may_come_in_any_order_and_dtype(tmp_path):
    config = run_config(**MODERN).model
    model = random_model(config, 0)
    dtypes = {
        name: (torch.float64, torch.bfloat16, torch.float32)[i % 3] for i, name in enumerate(parameter_shapes(config))
    }
    tensors = list(model.named_parameters())[::-1]
    save_model(tmp_path / "m", config, 0.5, tensors, dtype=dtypes)
    loaded = load_model(tmp_path / "m", torch.float64)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.to(dtypes[name]).double()), name
    assert read_config(tmp_path / "m").dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.pop("final_norm.bias"),
            r"tensor final_norm.bias is missing; the network needs it in shape \(20,\)",
        ),
        (lambda t: t.update(extra=torch.ones(1)), "tensor extra is not in the network"),
        (
            lambda t: t.update({"final_norm.bias": torch.ones(21)}),
            r"final_norm.bias has shape \(21,\), the network needs \(20,\)",
        ),
    ],
)
def test_wrong_tensors_are_not_saved(tmp_path, change, words):
    config = run_config().model
    tensors = dict(random_model(config, 0).named_parameters())
    change(tensors)
    with pytest.raises(PretrainedError, match=words):
        save_model(tmp_path / "m", config, 0.5, tensors.items())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 3}, r"tensor layers.2.\S+ is missing"),
        ({"num_layers": 1}, r"tensor layers.1.\S+ is not in the network"),
        ({"ffn_hidden_size": 24}, r"tensor \S+ has shape .*28.*, the network needs .*24"),
        ({"norm": "rmsnorm"}, "is not in the network"),
        ({"model_type": "llama"}, "model_type = 'llama', expected 'esolm'"),
        ({"format_version": 2}, "format_version = 2, this package reads up to 1; update"),
        ({"alpha_0": 2}, "alpha_0 = 2: must be a number between 0 and 1"),
        ({"torch_dtype": "int4"}, "torch_dtype = 'int4': must be one of float64"),
        ({"hidden_size": "dropped", "num_heads": 0}, "hidden_size: Field required; num_heads: "),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, changes, words):
    rewrite(folder, **changes)
    with pytest.raises(PretrainedError, match=words):
        load_model(folder)


def test_other_tools_may_add_fields_to_the_config(folder):
    before = read_config(folder)
    rewrite(folder, architectures=["EsoLM"], transformers_version="9")
    assert read_config(folder) == before
    assert before.facts == {"step": 1}


def test_broken_weight_files_are_named(tmp_path, folder):
    config = run_config().model
    tensors = dict(random_model(config, 0).named_parameters())
    save_model(tmp_path / "s", config, 0.5, tensors.items(), shard_bytes=9000)
    whole = sorted((tmp_path / "s").glob("model-*.safetensors"))
    assert len(whole) > 2
    assert all(torch.equal(t, tensors[n]) for n, t in load_model(tmp_path / "s").named_parameters())
    index = tmp_path / "s" / "model.safetensors.index.json"
    tree, data = json.loads(index.read_text()), whole[1].read_bytes()
    assert tree["metadata"]["total_size"] == sum(4 * t.numel() for t in tensors.values())
    whole[1].write_bytes(data[:-9])
    with pytest.raises(PretrainedError, match=f"{whole[1].name}: is no whole safetensors file"):
        load_model(tmp_path / "s")
    whole[1].unlink()
    with pytest.raises(PretrainedError, match=f"{whole[1].name}: missing"):
        load_model(tmp_path / "s")
    with pytest.raises(PretrainedError, match=f"{whole[1].name}: missing"):
        check_hashes(tmp_path / "s")
    for content, words in (
        ("{", "cannot be read as an index"),
        ('{"weight_map": 3}', "cannot be read as an index"),
        (json.dumps({"weight_map": {"nobody": whole[0].name}}), "names tensor nobody, which no file holds"),
    ):
        index.write_text(content)
        with pytest.raises(PretrainedError, match=words):
            load_model(tmp_path / "s")
    integers = {n: t.detach().long() if n == "final_norm.bias" else t.detach() for n, t in tensors.items()}
    save_file(integers, folder / "model.safetensors")
    with pytest.raises(PretrainedError, match="tensor final_norm.bias is I64; weights must be one of F64, F32"):
        load_model(folder)


def test_folders_that_are_none_say_what_they_are(tmp_path, folder):
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    for content in (data[:-3], b"\x80\x04." + data[3:], b""):
        weights.write_bytes(content)
        with pytest.raises(PretrainedError, match="is no whole safetensors file"):
            load_model(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(
        PretrainedError, match="has no model.safetensors but pytorch_model.bin, a pickle, .* never opened"
    ):
        load_model(folder)
    with pytest.raises(PretrainedError, match="a pickle"):
        load_model(folder / "pytorch_model.bin")
    with pytest.raises(PretrainedError, match="no such folder"):
        load_model(tmp_path / "nothing")
    make_run(tmp_path / "run")
    with pytest.raises(PretrainedError, match="is a training run or its checkpoint"):
        load_model(tmp_path / "run")
    with pytest.raises(PretrainedError, match="holds no tokenizer"):
        save_model(tmp_path / "t", run_config().model, 0.5, [], tokenizer_folder=tmp_path / "run")
