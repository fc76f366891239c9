"""Exports in `transformers`: with remote code in a process that has no esolm_megatron, and with the registered classes."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conversion.test_export import MODERN, make_run, random_model, run_config

from checkpoints_conversion import hub
from checkpoints_conversion.export import export_run
from checkpoints_conversion.probe import folder_logits
from esolm_megatron.data.tokenizer import load_tokenizer
from esolm_megatron.model.attention import PackedAttention, PackedLayout
from esolm_megatron.model.pretrained import load_model, save_model

pytest.importorskip("transformers")

REMOTE = """
import sys, torch
sys.modules["esolm_megatron"] = sys.modules["checkpoints_conversion"] = None  # importing them fails, as if not installed
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, GenerationConfig
folder, dtype = sys.argv[1], getattr(torch, sys.argv[2])
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
case = torch.load(sys.argv[3], weights_only=True)
for kind in (AutoModel, AutoModelForMaskedLM):
    model = kind.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    assert all(p.dtype == dtype for p in model.parameters())
    for p in model.parameters():
        p.data = p.data.clone()  # transformers may leave it where the file is mapped; MKL adds by alignment
    with torch.no_grad():
        logits = model(case["ids"], order=case["order"]).logits
    found = logits.gather(1, case["order"][..., None].expand_as(logits))
    assert torch.equal(found, case["logits"]), (found[..., :-1] - case["logits"][..., :-1]).abs().max()
model.save_pretrained(sys.argv[4])
if sys.argv[5] == "tokens":
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("some text").input_ids == case["text"].tolist()
    assert tokenizer.mask_token_id == config.mask_id == GenerationConfig.from_pretrained(folder).mask_token_id
    assert tokenizer.eos_token_id == GenerationConfig.from_pretrained(folder).eos_token_id == config.mask_id - 1
print("as ours")
"""


def run_python(code, *args, cache):
    env = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True, cwd=cache, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def write_case(folder, path, dtype, text="some text"):
    """Rows with masks in random orders, and what our own model answers."""
    model = load_model(folder, dtype)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, model.shape.mask_id + 1, (3, 11), generator=generator)
    order = torch.stack([torch.randperm(11, generator=generator) for _ in range(3)])
    with torch.no_grad():
        logits = model(ids.gather(1, order).flatten(), order.flatten(), PackedAttention(PackedLayout(11, 3)))
    case = {"ids": ids, "order": order, "logits": logits.view(3, 11, -1)}
    torch.save(case | {"text": torch.tensor(load_tokenizer("bytes").encode(text))}, path)


@pytest.mark.parametrize(
    ("model", "dtype"), [({}, torch.float64), (MODERN | {"tied_embeddings": True, "qkv_bias": True}, torch.bfloat16)]
)
def test_opens_offline_without_this_package_and_answers_the_same(tmp_path, model, dtype):
    config = run_config(**model, vocab_size=258).model
    load_tokenizer("bytes").save(tmp_path / "tokenizer")
    folder = tmp_path / "tokenizer"
    save_model(
        tmp_path / "m", config, 0.5, random_model(config, 0).named_parameters(), dtype=dtype, tokenizer_folder=folder,
        extra=hub.files(config, 0.5, {}, folder), extra_config=hub.config_fields(config), shard_bytes=9_000,
    )  # fmt: skip
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 2
    write_case(tmp_path / "m", tmp_path / "case.pt", dtype)
    name = str(dtype).removeprefix("torch.")
    assert "as ours" in run_python(
        REMOTE, tmp_path / "m", name, tmp_path / "case.pt", tmp_path / "back", "tokens", cache=tmp_path
    )
    ours, theirs = load_model(tmp_path / "m", dtype), load_model(tmp_path / "back", dtype)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_registered_classes_need_no_remote_code(tmp_path):
    from transformers import AutoConfig, AutoModel

    import esolm_megatron.huggingface as ours

    make_run(tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "m")
    model = AutoModel.from_pretrained(tmp_path / "m").eval()
    assert type(model) is ours.EsoLMForMaskedLM
    assert type(AutoConfig.from_pretrained(tmp_path / "m")) is ours.EsoLMConfig
    tokens = torch.tensor([3, 1, 28, 4, 28])
    with torch.no_grad():
        logits = model(tokens[None]).logits[0]
    order = torch.tensor([0, 1, 3, 2, 4])  # masks last
    assert torch.equal(logits[order], folder_logits(tmp_path / "m", tokens[order], order))
    labels = torch.tensor([[-100, -100, 7, -100, 9]])
    padded = model(tokens[None], attention_mask=torch.tensor([[1, 0, 1, 1, 1]]), labels=labels)
    order = torch.tensor([0, 3, 2, 4, 1])
    masked = folder_logits(tmp_path / "m", tokens[order], order)
    loss = torch.nn.functional.cross_entropy(masked[2:4], torch.tensor([7, 9]))
    torch.testing.assert_close(padded.loss, loss)


def test_a_fresh_model_is_initialised(tmp_path):
    from esolm_megatron.huggingface import EsoLMConfig, EsoLMForMaskedLM

    model = EsoLMForMaskedLM(EsoLMConfig(num_layers=1, hidden_size=24, num_heads=2, head_dim=12, vocab=19, mask_id=18))
    assert torch.equal(model.final_norm.weight, torch.ones(24))
    assert not model.head.bias.any()
    assert 0.015 < model.embedding.weight.std() < 0.025


def test_the_network_may_import_nothing_that_exports_cannot_carry():
    with pytest.raises(AssertionError, match="imports ConfigError .* only configurations"):
        hub._IMPORT.sub(hub._relative, "from esolm_megatron.config import ConfigError\n")
    assert not [name for name, text in hub.code().items() if re.search(r"^\s*(from|import) esolm_megatron", text, re.M)]
