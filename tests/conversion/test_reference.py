"""Reference checkpoints come in exactly, whatever they are packed in; foreign, damaged and hostile ones with a sentence."""

import os
import pickle
import zipfile

import pytest
import torch
from conversion.reference_files import Opaque, write_folder
from objective.test_parity import close, needs, packed_case
from parity import MASK, Reference
from safetensors.torch import load_file

from checkpoints_conversion.reference import ForeignCheckpoint, import_reference
from esolm_megatron.model.pretrained import PretrainedError, load_model, read_config
from esolm_megatron.objective.esolm import DIFFUSION


def same(folder, other):
    mine, theirs = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_imported_model_gives_the_references_logits_and_losses(tmp_path, hub_folder):
    needs("diff_elbo_a1")
    report = import_reference(hub_folder, tmp_path / "out", alpha_0=1.0)
    assert (report.alpha_0, report.alpha_0_known, report.weights) == (1.0, True, "last")
    model = load_model(tmp_path / "out", torch.float64)
    case, batch, _ = packed_case("diff_elbo_a1")
    attend = batch.attend
    with torch.no_grad():
        logits = model(batch.tokens, batch.positions, attend)
        losses = model(batch.tokens, batch.positions, attend, places=batch.places, targets=batch.targets)
    theirs = case["diff.logits"]
    close(logits[: theirs.shape[0] * 32].view(theirs.shape)[..., :MASK], theirs[..., :MASK], 1e-10, "logits")
    mine = (losses * batch.weights.double())[batch.parts == DIFFUSION]
    theirs = case["diff.per_token_loss_sorted"]
    close(mine, theirs[theirs != 0], 1e-10, "token losses")


def test_folder_is_stored_without_rounding(tmp_path, hub_folder):
    import_reference(hub_folder, tmp_path / "out")
    folded = Reference().loaded().state_dict()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == folded.keys()
    for name, tensor in stored.items():
        assert torch.equal(tensor.double(), folded[name]), name
    assert stored["head.weight"].dtype == torch.float32
    assert stored["layers.1.mlp.fc2.weight"].dtype == torch.float64
    import_reference(hub_folder, tmp_path / "half", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert read_config(tmp_path / "half").dtype == torch.bfloat16


def test_ckpt_gives_the_same_through_its_moving_average(tmp_path, hub_folder, lightning):
    import_reference(hub_folder, tmp_path / "hub_out")
    torch.save(lightning, tmp_path / "last.ckpt")
    calls = []
    report = import_reference(tmp_path / "last.ckpt", tmp_path / "out", progress=lambda *args: calls.append(args))
    assert (report.alpha_0, report.alpha_0_known, report.weights, report.step) == (0.25, True, "ema", 77)
    assert same(tmp_path / "out", tmp_path / "hub_out")
    info = read_config(tmp_path / "out")
    assert info.facts == {"imported_from": "last.ckpt", "weights": "ema", "step": 77}
    assert (info.model.num_heads, info.model.seq_length, info.model.vocab_size) == (4, 32, 101)
    assert [call[1:] for call in calls] == [(i, len(calls)) for i in range(1, len(calls) + 1)]


def test_last_weights_on_request_or_where_there_is_no_average(tmp_path, theirs, lightning):
    moved = {name: tensor + 1 for name, tensor in theirs.items()}
    import_reference(write_folder(tmp_path / "moved", moved), tmp_path / "moved_out")
    torch.save(lightning, tmp_path / "last.ckpt")
    assert import_reference(tmp_path / "last.ckpt", tmp_path / "a", use_ema=False).weights == "last"
    del lightning["ema"]
    torch.save(lightning, tmp_path / "bare.ckpt")
    assert import_reference(tmp_path / "bare.ckpt", tmp_path / "b").weights == "last"
    assert same(tmp_path / "a", tmp_path / "moved_out")
    assert same(tmp_path / "b", tmp_path / "moved_out")


def test_parameters_bf16_and_views_of_shared_storage_are_read_right(tmp_path, theirs, lightning):
    state = lightning["state_dict"]
    big = torch.stack([theirs["blocks.0.mlp.0.weight"], theirs["blocks.1.mlp.0.weight"]])
    state["backbone.blocks.0.mlp.0.weight"], state["backbone.blocks.1.mlp.0.weight"] = big[0], big[1]
    state["backbone.blocks.0.mlp.2.weight"] = theirs["blocks.0.mlp.2.weight"].t().contiguous().t()
    state["backbone.blocks.0.attn_qkv.weight"] = torch.nn.Parameter(theirs["blocks.0.attn_qkv.weight"])
    state["backbone.vocab_embed.embedding"] = theirs["vocab_embed.embedding"].bfloat16()
    torch.save(lightning, tmp_path / "x.ckpt")
    import_reference(tmp_path / "x.ckpt", tmp_path / "out", use_ema=False, dtype=torch.float64)
    plain = {name.removeprefix("backbone."): tensor.float() for name, tensor in state.items() if name != "metric"}
    import_reference(write_folder(tmp_path / "plain", plain), tmp_path / "plain_out", dtype=torch.float64)
    assert same(tmp_path / "out", tmp_path / "plain_out")


def test_names_with_prefix_in_a_folder_and_nested_or_hub_configs(tmp_path, theirs):
    prefixed = write_folder(tmp_path / "a", {f"backbone.{name}": t for name, t in theirs.items()}, alpha_0=0.5)
    assert import_reference(prefixed, tmp_path / "a_out").alpha_0 == 0.5
    (prefixed / "config.json").write_text('{"n_heads": 4, "model_length": 32}')
    report = import_reference(prefixed, tmp_path / "b_out")
    assert (report.alpha_0, report.alpha_0_known) == (1.0, False)
    assert read_config(tmp_path / "b_out").facts["alpha_0_assumed"] is True
    (prefixed / "config.json").write_text('{"model": {"n_heads": 4, "length": 32}, "algo": {"alpha_0": 0.125}}')
    assert import_reference(prefixed, tmp_path / "c_out").alpha_0 == 0.125
    assert same(tmp_path / "a_out", tmp_path / "c_out")


def test_ar_checkpoint_has_no_modulation(tmp_path, theirs):
    plain = {name: t for name, t in theirs.items() if "adaLN" not in name and "sigma_map" not in name}
    report = import_reference(write_folder(tmp_path / "ar", plain), tmp_path / "out")
    assert report.alpha_0 == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for ours, name in (("norm2", "norm2"), ("mlp.fc2", "mlp.2"), ("attention.out", "attn_out")):
        assert torch.equal(stored[f"layers.1.{ours}.weight"], plain[f"blocks.1.{name}.weight"])
    assert not stored["layers.0.norm1.bias"].any()


def without(name):
    return lambda tree: tree["state_dict"].pop(name)


def told(**algo):
    def change(tree):
        tree["hyper_parameters"] = {"config": {"model": {"n_heads": 4, "length": 32}, "algo": algo}}

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("backbone.blocks.1.mlp.2.bias"), "use_ema=False"),
        (
            lambda t: (t.pop("ema"), t["state_dict"].pop("backbone.blocks.1.mlp.2.bias")),
            "blocks.1.mlp.2.bias is missing",
        ),
        (lambda t: t["state_dict"].clear(), "no tensor vocab_embed.embedding"),
        (lambda t: t.pop("state_dict"), "has no state_dict"),
        (lambda t: t.pop("hyper_parameters"), "does not tell num_heads; give it as num_heads="),
        (lambda t: t["ema"]["shadow_params"].reverse(), "use_ema=False"),
        (lambda t: t["ema"].update(shadow_params=[Opaque()] * 30), "ema of vocab_embed.embedding is no tensor"),
        (lambda t: t["ema"]["shadow_params"][5].fill_(float("nan")), "not finite"),
        (told(name="mdlm"), "algo.name = mdlm: only esolm and ar attend causally"),
        (told(name="esolm", alpha_0=0.5, diffusion_attn_mode="bidirectional"), "diffusion_attn_mode = bidirectional"),
        (told(name="esolm", alpha_0=0.5, sequential_attn_mode="mixed"), "sequential_attn_mode = mixed"),
        (told(name="esolm", time_conditioning=True), "time_conditioning"),
        (told(alpha_0=1.5), "alpha_0 = 1.5: must be between 0 and 1"),
    ],
)
def test_what_cannot_be_imported_is_refused_with_a_sentence(tmp_path, theirs, lightning, change, words):
    lightning["ema"]["shadow_params"] = [t.clone() for t in lightning["ema"]["shadow_params"]]
    change(lightning)
    torch.save(lightning, tmp_path / "x.ckpt")
    with pytest.raises(ForeignCheckpoint, match=words):
        import_reference(tmp_path / "x.ckpt", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.ckpt"]


def test_arguments_win_over_the_checkpoint_and_are_checked(tmp_path, hub_folder):
    assert import_reference(hub_folder, tmp_path / "a", num_heads=2, length=9).model.num_heads == 2
    assert read_config(tmp_path / "a").model.seq_length == 9
    for number in (3, 64):
        with pytest.raises(ForeignCheckpoint, match=f"num_heads = {number}: must divide half the width 64"):
            import_reference(hub_folder, tmp_path / "b", num_heads=number)
    with pytest.raises(PretrainedError, match="not empty"):
        import_reference(hub_folder, tmp_path / "a")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_hostile_pickles_run_nothing(tmp_path, hub_folder, lightning):
    """Beside the weights their code stays a name; in the place of weights it is refused."""
    fired = tmp_path / "fired"
    assert pickle.loads(pickle.dumps(Hostile(fired))) == 0
    assert fired.exists(), "this pickle is hostile where pickles are run"
    fired.unlink()
    lightning["hyper_parameters"]["tokenizer"] = Hostile(fired)
    torch.save(lightning, tmp_path / "beside.ckpt")
    import_reference(tmp_path / "beside.ckpt", tmp_path / "out")
    import_reference(hub_folder, tmp_path / "hub_out")
    assert same(tmp_path / "out", tmp_path / "hub_out")
    lightning["ema"]["shadow_params"][3] = Hostile(fired)
    torch.save(lightning, tmp_path / "inside.ckpt")
    with pytest.raises(ForeignCheckpoint, match=r"is no tensor that can be read, but (posix|os)\.system"):
        import_reference(tmp_path / "inside.ckpt", tmp_path / "out2")
    assert not fired.exists()


def rewritten(source, target, change):
    """A copy of a torch archive with `change(name, data)` applied to each member; None leaves it out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return target


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda name, data: data[:-4] if name.endswith("data/0") else data, "bytes where .* belong"),
        (lambda name, data: None if name.endswith("data/0") else data, r"data/0\) is missing"),
        (lambda name, data: None if name.endswith("data.pkl") else data, "holds 0 data.pkl"),
        (lambda name, data: data[: len(data) // 2] if name.endswith("data.pkl") else data, "its pickle is broken"),
        (lambda name, data: b"big" if name.endswith("byteorder") else data, "big-endian"),
        (lambda name, data: data.replace(b"FloatStorage", b"WeirdStorage"), "storage type"),
        (lambda name, data: data.replace(b"storageq", b"bananasq"), "unknown reference 'bananas'"),
    ],
)
def test_broken_archives_are_refused(tmp_path, lightning, change, words):
    torch.save(lightning, tmp_path / "x.ckpt", pickle_protocol=2)
    broken = rewritten(tmp_path / "x.ckpt", tmp_path / "broken.ckpt", change)
    with pytest.raises(ForeignCheckpoint, match=words):
        import_reference(broken, tmp_path / "out")


def test_damaged_and_foreign_files_are_refused(tmp_path, hub_folder, lightning):
    path = tmp_path / "x.ckpt"
    torch.save(lightning, path)
    data = path.read_bytes()
    middle = data.index(lightning["state_dict"]["backbone.blocks.0.mlp.2.weight"].numpy().tobytes()[:64])
    flipped = bytearray(data)
    flipped[middle] ^= 1
    weights = hub_folder / "model.safetensors"
    for content, words in (
        (data[:-1000], "is no whole torch.save archive"),
        (b"", "is no whole torch.save archive"),
        (pickle.dumps({"state_dict": 1}), "is no whole torch.save archive"),
        (bytes(flipped), "is damaged: Bad CRC"),
    ):
        path.write_bytes(content)
        with pytest.raises(ForeignCheckpoint, match=words):
            import_reference(path, tmp_path / "out")
    with pytest.raises(ForeignCheckpoint, match="no such file"):
        import_reference(tmp_path / "nothing", tmp_path / "out")
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ForeignCheckpoint, match="is no whole safetensors file"):
        import_reference(hub_folder, tmp_path / "out")
    (hub_folder / "config.json").unlink()
    with pytest.raises(ForeignCheckpoint, match="at least n_heads and length"):
        import_reference(hub_folder, tmp_path / "out")
    weights.unlink()
    with pytest.raises(ForeignCheckpoint, match=r"has no model.safetensors"):
        import_reference(hub_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
