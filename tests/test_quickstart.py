"""The quickstart leaves what the README says; the whole of it (slow) learns Python."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.end_to_end
SHORT = ("train.num_steps=20", "optim.warmup_steps=4", "optim.decay_steps=8", "evaluate.num_sequences=4")


def quickstart(runs, *words):
    command = [sys.executable, str(ROOT / "tools" / "quickstart.py"), "--runs", str(runs), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)


def check_what_is_left(runs):
    run = runs / "quickstart"
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "loss.png",
        "samples.txt",
        "model/model.safetensors",
        "model/config.json",
    ):
        assert (run / name).stat().st_size > 100, name
    samples = (run / "samples.txt").read_text()
    assert samples.count("def __init__(self, x, y):") == 4
    assert samples.count("with open(path) as file:") == 2
    assert "[MASK]" not in samples
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["seconds"]) >= {"corpus", "tokenizer", "shards", "training", "export", "evaluation", "samples"}
    assert summary["tokens_per_s"] > 0
    return summary


def test_a_short_quickstart_leaves_everything(tmp_path):
    done = quickstart(tmp_path / "r", *SHORT)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = check_what_is_left(tmp_path / "r")
    assert summary["steps"] == 20
    assert summary["last_training_loss"] < summary["first_training_loss"]
    assert f"{summary['unigram_entropy']:.3f}" in done.stdout
    assert f"{summary['validation']['nelbo']['nats_per_token']:.3f}" in done.stdout
    again = quickstart(tmp_path / "r", *SHORT)
    assert again.returncode != 0
    assert "has been run here" in again.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_quickstart_learns_python(tmp_path):
    assert quickstart(tmp_path).returncode == 0
    summary = check_what_is_left(tmp_path)
    assert summary["validation"]["nelbo"]["nats_per_token"] < summary["unigram_entropy"] - 1.4
