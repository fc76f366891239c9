"""How tools/benchmark_sample.py judges, and that a baseline that takes too long is stopped."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import benchmark_sample as benchmark

from esolm_megatron.config import ModelConfig
from esolm_megatron.model.layers import PlainLinears
from esolm_megatron.model.transformer import EsoLM, initialise

GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def model():
    model = EsoLM(ModelConfig(seq_length=64, **benchmark.SHAPES["tiny"]), PlainLinears(torch.float32))
    initialise(model, 0)
    return model


def row(method, **fields):
    usual = {"batch": 1, "length": 1024, "steps": "one", "method": method, "wall_s": 0.3, "first_s": 0.4, "cpu_s": 9.0}
    return usual | {"tokens_per_s": 3400.0, "ms_per_pass": 0.29, "stopped": False} | fields


@pytest.mark.parametrize(
    ("ours", "others", "said"),
    [
        ({}, {}, []),
        ({"ms_per_pass": 0.31}, {}, ["ms 0.31 is above 0.30"]),
        ({"first_s": 3.4}, {}, ["the first call took 3.1 s longer than the best, more than 3"]),
        ({}, {"ar": {"wall_s": 0.29}}, ["ar 0.97 is below 1.00"]),
        ({}, {"loop": {"wall_s": 0.8}}, ["loop 2.67 is below 3.00"]),
        ({}, {"loop": None}, ["loop was not measured (memory, or the budget)"]),
    ],
)
def test_what_a_bar_is_compared_with(ours, others, said):
    key = (1, 1024, "one")
    found = {"loop": {"wall_s": 1.2}, "ar": {"wall_s": 0.31}} | others
    rows = [row("ours", **ours), *(row(name, **fields) for name, fields in found.items() if fields is not None)]
    missed = benchmark.missed(benchmark.with_costs(rows, GPU), {key: benchmark.GPU_BARS[key]}, GPU)
    assert missed == [f"batch 1, L 1024, T one: {line}" for line in said]


def test_costs_are_cpu_seconds_on_a_cpu():
    rows = [row("ours", cpu_s=2.0), row("loop", cpu_s=5.0, wall_s=0.1)]
    assert benchmark.with_costs(rows, torch.device("cpu"))[1]["times_ours"] == 2.5
    assert benchmark.with_costs(rows[1:], torch.device("cpu"))[0]["times_ours"] is None


def test_a_baseline_that_takes_long_is_stopped_and_says_so(model):
    def loop(ours):
        (found,) = benchmark.cell(model, 2, 64, "one", ["loop"], 1, ours)
        return found

    whole = loop(float("inf"))
    assert not whole["stopped"]
    cut = loop(0.0)
    assert cut["stopped"]
    assert cut["cpu_s"] < whole["cpu_s"]


def test_a_profile_is_of_one_pass(model):
    one, two = (benchmark.profiled(model, 1, length, "one", 10) for length in (16, 64))
    assert (one["passes"], two["passes"]) == (16, 64)
    linears = [
        sum(k["count"] for k in found["kernels"] if "linear" in k["name"] or "mm" in k["name"]) for found in (one, two)
    ]
    assert linears[0] == pytest.approx(linears[1], rel=0.3)
    assert 4 < linears[0] < 40


def test_left_to_right_at_fixed_shapes_is_the_same_baseline(model):
    found = []
    for fixed_shapes in (False, True):
        torch.manual_seed(3)
        found.append(benchmark.left_to_right(model, 3, 21, torch.device("cpu"), fixed_shapes))
    assert torch.equal(*found)
    assert len(found[0].unique()) > 20
