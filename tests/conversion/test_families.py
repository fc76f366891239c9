"""The ten most used families of tokenizers: prepared, shown, trained, exported, decoded."""

import json
import sys
from pathlib import Path

import pytest
from ranks import run_ranks

from checkpoints_conversion.export import export_run
from esolm_megatron.config import check
from esolm_megatron.data.prepare import PrepareConfig, prepare
from esolm_megatron.data.tokenizer import load_tokenizer
from esolm_megatron.data.verify import show
from esolm_megatron.inference import load_pretrained

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from tokenizer_families import FAMILIES, LOSSY, TEXTS

transformers = pytest.importorskip("transformers")
HARD = ["alpha beta", " alpha", "beta  gamma\n", "die Straße", "it's 2026", "x<s></s> <|end|>", *TEXTS[:2]]


def trained(config):
    """One rank: the steps that a run makes."""
    import torch.distributed as dist

    from esolm_megatron.train.trainer import train

    step = train(config).step
    dist.init_process_group(
        "gloo", init_method=f"file://{config.run_dir}.again", rank=0, world_size=1
    )  # which ended with it
    return step


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_a_family_goes_all_the_way(family, tmp_path):
    engine, end = family()
    source = tmp_path / "tokenizer"
    source.mkdir()
    engine.save(str(source / "tokenizer.json"))
    declared = {
        "eos_token": {"content": end, "special": True},
        "add_bos_token": True,
        "chat_template": "{{ messages }}",
    }
    (source / "tokenizer_config.json").write_text(json.dumps(declared))
    ours = load_tokenizer(source)
    assert ours.eos_id == engine.token_to_id(end)
    for text in HARD:
        ids = ours.encode(text)
        assert ours.eos_id not in ids, "no text can forge the end"
        assert max(ids) < ours.vocab_size
        assert ours.encode_batch([text]) == [ids]
        if family not in LOSSY:
            assert ours.decode(ids).removeprefix(" ") == text.removeprefix(" "), "roberta's begins with a blank"

    texts = [f"{text} {n}" for n in range(20) for text in TEXTS[:4]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    fields = {"inputs": (str(tmp_path / "a.jsonl"),), "output": str(tmp_path / "tokens"), "tokenizer": str(source)}
    summary = prepare(PrepareConfig(**fields, validation_fraction=0.2, num_processes=1), progress=False)
    assert summary.manifest.documents["kept"] == len(texts)
    assert summary.manifest.eos_id == ours.eos_id
    parts = [part for row in show(tmp_path / "tokens", rows=8, seq_length=64) for part in row.parts]
    stored = {ours.decode(ours.encode(text)) for text in texts}
    whole = [part.replace(end, "") for part in parts if part.endswith(end)]
    assert sum(part in stored for part in whole) > len(whole) // 2, "those of which a row holds the start"

    config = check({
        "name": "run", "runs_dir": str(tmp_path),
        "model": {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "seq_length": 32, "vocab_size": ours.vocab_size + 1},
        "objective": {"alpha_0": 0.5}, "optim": {"warmup_steps": 0},
        "train": {"num_steps": 1, "global_batch_size": 4, "micro_batch_size": 4, "precision": "fp32", "device": "cpu"},
        "data": {"path": str(tmp_path / "tokens")}, "evaluate": {"every_steps": 0},
    })  # fmt: skip
    assert run_ranks(trained, 1, config) == [1]
    export_run(tmp_path / "run", tmp_path / "model")

    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    back = load_pretrained(tmp_path / "model")
    for text in (text for text in HARD if "<" not in text):  # which their library takes for tokens
        ids = ours.encode(text)
        assert theirs(text).input_ids == back.tokenizer.encode(text) == ids
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == ours.decode(ids)
    assert (theirs.eos_token_id, theirs.mask_token_id, theirs.pad_token_id) == (
        ours.eos_id,
        ours.vocab_size,
        ours.eos_id,
    )
    assert theirs.chat_template == "{{ messages }}"
    (row,) = back.sample(1, 12, 4, seed=1)[0].tolist()
    assert isinstance(back.tokenizer.decode(row), str)
    assert row.count(ours.vocab_size) == 0, "no mask is left"
