"""What tools/benchmark_train.py compares is the same training, and it times the product's steps."""

import json
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import benchmark_train as benchmark

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def steps_of(kind, alpha_0, option="plain"):
    return benchmark.steps_of(kind, benchmark.config_of("tiny", alpha_0, option, None, CPU))


@pytest.mark.parametrize(("alpha_0", "large"), [(1.0, 5e8), (0.5, 5e8), (0.25, 5e8), (0.0, 5e8), (0.25, 0)])
def test_the_references_way_trains_the_same_model(alpha_0, large, monkeypatch):
    """large: 0, where weights are drawn as those of a large model are."""
    monkeypatch.setattr(benchmark, "LARGE", large)
    ours, reference = steps_of("ours", alpha_0), steps_of("reference", alpha_0)
    for _ in range(3):
        (loss, norm), (other_loss, other_norm) = ours.step(), reference.step()
        assert loss == pytest.approx(other_loss, rel=1e-5)
        assert norm == pytest.approx(other_norm, rel=1e-4)
    for a, b in zip(ours.parameters, reference.parameters, strict=True):
        torch.testing.assert_close(a[: len(b)], b, rtol=1e-3, atol=2e-5)
        assert not a[len(b) :].any(), "what pads the vocabulary was trained"
    ours.close()
    reference.close()


@pytest.mark.parametrize("kind", ["ours", "reference", "ar"])
def test_a_step_learns(kind, monkeypatch):
    monkeypatch.setattr(benchmark.RandomRows, "tokens", lambda self, number, shape: np.full(shape, 5))
    steps = steps_of(kind, 1.0)
    losses = [steps.step()[0] for _ in range(12)]
    steps.close()
    assert losses[-1] < losses[0] - 0.01


def test_the_product_is_stepped_as_the_trainer_steps_it():
    """DeepSpeed's optimizer, the moving average and the noise of the step before are in what is timed."""
    ours = steps_of("ours", 0.5)
    before = [x.clone() for x in ours.engine.state.ema]
    for _ in range(3):
        ours.step()
    assert ours.engine.state.num_steps == 3
    assert ours.ahead.drawn == 3
    assert any(not torch.equal(a, b) for a, b in zip(before, ours.engine.state.ema, strict=True))
    ours.close()


def test_the_memory_of_a_case_is_given_back():
    ours = steps_of("ours", 0.5)
    ours.step()
    parts = [ours.engine, ours.engine.deepspeed, ours.engine.deepspeed.optimizer, ours.engine.chunks[0]]
    kept = [weakref.ref(part) for part in parts]
    ours.close()
    del ours, parts
    benchmark.free_memory(CPU)
    assert [part() for part in kept] == [None] * 4


def test_losses_that_differ_are_told():
    row = {
        "size": "tiny",
        "alpha_0": 1.0,
        "option": "plain",
        "kind": "ours",
        "losses": [4.0, 3.9],
        "grad_norms": [1, 1],
    }
    other = row | {"kind": "reference", "losses": [4.0, 3.8]}
    assert benchmark.differences([row, row | {"kind": "reference"}], CPU) == []
    assert "step 1: losses" in benchmark.differences([row, other], CPU)[0]
    assert benchmark.differences([row, other | {"kind": "ar"}, other | {"option": "compile+dropout"}], CPU) == []


def test_a_ratio_is_that_of_turns():
    """Of five turns, the machine is slower in some; medians alone would say 3."""
    row, other = (
        {"each": [1.0, 1.0, 1.0, 2.0, 2.0], "cpu_seconds": 1.0},
        {"each": [1.5, 3.0, 3.0, 3.0, 3.0], "cpu_seconds": 3.0},
    )
    assert benchmark.times(other, row, CPU) == 1.5


def test_bars_that_were_not_measured_are_missed():
    cell = {"kind": "ours", "size": "124m", "alpha_0": 1.0, "option": "compile", "tokens_per_second": 6.1e5}
    refused = cell | {"option": "compile+dropout", "refused": "train.compile = true: does not go with dropout"}
    del refused["tokens_per_second"]
    found = benchmark.below_bars([cell, refused], torch.device("cuda"))
    assert len(found) == len(benchmark.GPU_BARS) - 1
    assert [line for line in found if "does not go with dropout" in line] == [found[1]]
    found = benchmark.below_bars([cell | {"tokens_per_second": 5.9e5}], torch.device("cuda"))
    assert found[0] == "124m, alpha_0 = 1: tokens_per_second 5.9e+05 is below 6e+05"


@pytest.mark.end_to_end
def test_a_run_leaves_a_row_for_each_kind(tmp_path):
    words = ["--sizes", "tiny", "--alphas", "0.5", "--steps", "2", "--no-peaks", "--options", "plain,recompute,graphs"]
    command = [sys.executable, "tools/benchmark_train.py", *words, "--json", str(tmp_path / "out.json"),
               "--picture", str(tmp_path / "out.png")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    out = json.loads((tmp_path / "out.json").read_text())
    assert [(r["option"], r["kind"]) for r in out["rows"]] == [
        ("plain", "ours"), ("plain", "reference"), ("plain", "ar"), ("recompute", "ours"), ("graphs", "ours")
    ]  # fmt: skip
    plain, reference, _, recompute, graphs = out["rows"]
    assert plain["losses"] == pytest.approx(reference["losses"], rel=1e-5)
    assert plain["losses"] == pytest.approx(recompute["losses"], rel=1e-6)
    assert "cuda_graphs" in graphs["refused"]
    assert sum(plain["parts"].values()) == pytest.approx(1)
    assert plain["parts"]["matrix products"] > 0
    assert plain["planned_mib"] > 1
    assert (tmp_path / "out.png").stat().st_size > 1000
