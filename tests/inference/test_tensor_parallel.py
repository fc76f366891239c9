"""A model cut over processes samples what one process samples."""

import json
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from parity import random_model
from ranks import run_ranks

from esolm_megatron.config import ConfigError
from esolm_megatron.config.tree import ModelConfig
from esolm_megatron.data.tokenizer import load_tokenizer
from esolm_megatron.inference import load_pretrained
from esolm_megatron.model.pretrained import save_model

SHAPE = {
    "num_layers": 3, "hidden_size": 48, "num_heads": 6, "num_kv_heads": 2, "ffn_hidden_size": 44, "vocab_size": 258,
    "seq_length": 24, "norm": "rmsnorm", "activation": "swiglu", "mlp_bias": False, "qk_norm": True, "qkv_bias": True,
    "output_bias": False, "tied_embeddings": True,
}  # fmt: skip
PLAIN = SHAPE | {
    "num_kv_heads": None, "norm": "layernorm", "activation": "gelu", "mlp_bias": True, "output_bias": True,
    "tied_embeddings": False, "vocab_size": 259,
}  # fmt: skip


@pytest.fixture(scope="module", params=[SHAPE, PLAIN], ids=["modern", "reference"])
def folder(request, tmp_path_factory):
    top = tmp_path_factory.mktemp("split")
    load_tokenizer("bytes").save(top / "tokenizer")
    model = random_model(torch.float64, **request.param)
    config = ModelConfig.model_validate(request.param)
    save_model(top / "model", config, 0.5, model.named_parameters(), tokenizer_folder=top / "tokenizer")
    return top / "model"


def sampled(folder, *words):
    command = [sys.executable, "-m", "esolm_megatron", "sample", str(folder), "dtype=fp64", "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.gloo
@pytest.mark.parametrize(
    "words",
    [
        ["num_samples=3", "steps=4", "prompt=def", "top_p=0.9"],
        ["num_samples=2", "schedule=first_hitting", "propose=2", "length=20"],
        ["num_samples=2", "alpha_0=0", "stop=true"],
    ],
    ids=["steps", "proposals", "left_to_right"],
)
def test_two_processes_write_what_one_writes(folder, words):
    alone, _ = sampled(folder, *words)
    together, said = sampled(folder, "--processes=2", *words)
    assert said.count("tokens/s") == 1
    for one, two in zip(alone["samples"], together["samples"], strict=True):
        assert one["tokens"] == two["tokens"]
        assert one["log_prob"] == pytest.approx(two["log_prob"], rel=1e-9)


def collectives(folder):
    """One rank: what one pass over two rows of one mask sums and gathers, and the bytes of its weights."""
    import os

    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    from esolm_megatron.inference.tensor_parallel import load_split

    model = load_split(folder, torch.float32, torch.device("cpu"))
    reduce, gather, seen = dist.all_reduce, dist.all_gather_into_tensor, []
    dist.all_reduce = lambda x, *args: (seen.append(("sum", tuple(x.shape))), reduce(x, *args))[1]
    dist.all_gather_into_tensor = lambda out, x: (seen.append(("gather", tuple(x.shape))), gather(out, x))[1]
    model.sample(2, 1, steps=1, alpha_0=1.0)
    return seen, sum(p.numel() for p in model.model.layers.parameters() if p.dim() > 1)


@pytest.mark.gloo
def test_a_pass_has_two_sums_a_block_and_puts_logits_together(folder):
    whole = sum(p.numel() for p in load_pretrained(folder).model.layers.parameters() if p.dim() > 1)
    for seen, numbers in run_ranks(collectives, 2, folder):
        assert seen == [("sum", (1, 2, 48)), *[("sum", (2, 1, 48))] * 6, ("gather", (2, 256))]
        assert numbers == whole / 2


def refused(folder):
    import os

    os.environ["WORLD_SIZE"] = "4"
    from esolm_megatron.inference.tensor_parallel import load_split

    try:
        load_split(folder, torch.float32, torch.device("cpu"))
    except ConfigError as error:
        return str(error)


def test_processes_that_do_not_divide_the_heads_are_refused(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert refused(folder) == "--processes 4: must divide the model's num_heads = 6"
