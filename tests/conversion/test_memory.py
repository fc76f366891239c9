"""The converter's peak memory, measured on 3 GB of checkpoint: the largest tensor times four, and 1 GiB, however many there are."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from checkpoints_conversion import autoregressive
from checkpoints_conversion.probe import streamed_logits
from esolm_megatron.checkpoint import Piece
from esolm_megatron.checkpoint import folder as checkpoint
from esolm_megatron.checkpoint.tensorfile import Entry, write_tensors
from esolm_megatron.config import check
from esolm_megatron.model.pretrained import parameter_shapes

pytestmark = pytest.mark.slow

SHAPE = {
    "num_layers": 38, "hidden_size": 1280, "num_heads": 10, "ffn_hidden_size": 5120, "vocab_size": 16001, "seq_length": 512,
}  # fmt: skip

MEASURED = """
import json, pathlib, re, sys
from esolm_megatron.cli import main
code = main(sys.argv[1:])
status = pathlib.Path("/proc/self/status").read_text()  # ru_maxrss would start with the parent's peak
print(json.dumps({"code": code, "peak": 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])}))
"""


def measured(*words):
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["code"] == 0, done.stderr[-2000:]
    return report["peak"]


def make_big_run(run):
    """A checkpoint whose weights are in one rank's file, the harder case; returns the shapes of its tensors."""
    train = {"num_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "precision": "bf16"}
    config = check(
        {"name": "big", "model": SHAPE, "objective": {"alpha_0": 1.0}, "train": train, "data": {"path": "x"}}
    )
    shapes = parameter_shapes(config.model)

    def tensor(name):
        seeded = torch.Generator().manual_seed(list(shapes).index(name))
        return torch.randn(shapes[name], generator=seeded) * 0.02

    tokens = torch.arange(8)
    logits = streamed_logits(config.model, tensor, tokens, tokens * 60)
    probe = {"tokens": tokens, "positions": tokens * 60, "logits_weight": logits}
    staging = checkpoint.staging_folder(run, 1)
    pieces = (Piece("weight", name, shape, (0,) * len(shape), tensor(name)) for name, shape in shapes.items())
    checkpoint.write_rank(staging, 0, pieces)
    manifest = {"step": 1, "config": config.model_dump(mode="json")}
    checkpoint.commit(staging, checkpoint.step_folder(run, 1), manifest, 1, probe)
    return shapes


def make_big_llama(folder):
    """An autoregressive checkpoint of the same size, in one file."""
    folder.mkdir()
    tree = {
        "model_type": "llama", "vocab_size": 16000, "hidden_size": 1280, "intermediate_size": 3456, "num_hidden_layers": 38,
        "num_attention_heads": 10, "num_key_value_heads": 10, "max_position_embeddings": 512, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(tree))
    nothing = type("Nothing", (), {"shapes": ()})
    source = autoregressive._Source(tree, nothing, autoregressive._model(tree, nothing, folder, None), 16000)
    entries = [Entry(name, torch.float32, shape) for name, shape in autoregressive._names(source, 16000)]
    write_tensors(folder / "model.safetensors", entries, (torch.randn(entry.shape) * 0.02 for entry in entries))
    return sum(entry.bytes for entry in entries)


@pytest.mark.timeout(1500)
def test_peak_memory_is_bound_by_the_largest_tensor(tmp_path):
    run = tmp_path / "run"
    sizes = [4 * torch.Size(shape).numel() for shape in make_big_run(run).values()]
    bound = 4 * max(sizes) + 2**30
    assert sum(sizes) > max(3e9, 1.5 * bound)
    peaks = {
        "to model, fp32": measured("convert", run, tmp_path / "fp32", "weights=last", "dtype=fp32"),
        "to model, bf16": measured("convert", run, tmp_path / "bf16", "weights=last", "dtype=bf16"),
    }
    shutil.rmtree(run)  # gigabytes, which pytest would keep
    shutil.rmtree(tmp_path / "bf16")
    peaks["to training"] = measured("convert", tmp_path / "fp32", tmp_path / "again", "--to", "training")
    shutil.rmtree(tmp_path / "again")
    shutil.rmtree(tmp_path / "fp32")
    assert make_big_llama(tmp_path / "llama") > 3e9
    peaks["from llama"] = measured("convert", tmp_path / "llama", tmp_path / "imported", "--from", "transformers")
    shutil.rmtree(tmp_path / "llama")
    shutil.rmtree(tmp_path / "imported")
    mib = {name: round(peak / 2**20) for name, peak in peaks.items()}
    print(f"{sum(sizes) / 1e9:.2f} GB, largest {max(sizes) / 2**20:.0f} MiB, bound {bound / 2**20:.0f} MiB: {mib}")
    assert {name: peak for name, peak in peaks.items() if peak > bound} == {}
