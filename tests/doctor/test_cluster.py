"""doctor --cluster on real ranks, and who it names."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
import yaml
from ranks import run_ranks
from truth import MODERN, make_config

from esolm_megatron.doctor.cluster import (
    ClusterReport,
    GroupSpeed,
    RankReport,
    layout_groups,
    layout_speeds,
    product_is_right,
)


def doctor(*words, cwd=None):
    command = [sys.executable, "-m", "esolm_megatron", "doctor", "--cluster", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=cwd)


@pytest.mark.gloo
def test_three_ranks_are_tried_together(tmp_path):
    done = doctor("--processes=3", f"--folder={tmp_path}", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [r["rank"] for r in report["ranks"]] == [0, 1, 2]
    assert set(report["collectives_gb_s"]) == {"all_reduce", "all_gather", "reduce_scatter"}
    assert all(0.001 < speed < 1000 for speed in report["collectives_gb_s"].values())
    assert [len(r["links_gb_s"]) for r in report["ranks"]] == [1, 2, 1]
    assert all(r["tflops"] > 0 and r["disk_mb_s"] > 0 and abs(r["clock_s"]) < 5 for r in report["ranks"])
    assert report["wrong"] == []
    assert list(tmp_path.iterdir()) == []


MODEL = MODERN | {"num_heads": 8, "num_kv_heads": 4}
TENSOR_CONTEXT = {"tensor_size": 2, "sequence_parallel": True, "context_size": 2}
STAGES = {"pipeline_size": 2, "zero_stage": 0}


def with_layout(folder, parallel):
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(make_config(MODEL, parallel=parallel).model_dump(mode="json")))
    return path


@pytest.mark.gloo
@pytest.mark.parametrize("starter", ["--processes", "torchrun"])
def test_a_layout_is_tried_on_its_own_groups(tmp_path, starter):
    """One of them started as on a cluster without SLURM."""
    if starter == "torchrun":
        path = with_layout(tmp_path, TENSOR_CONTEXT)
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=127.0.0.1:0",
            "--local-addr=127.0.0.1",
            "--nproc-per-node=4",
            "-m",
        ]
        words = ["esolm_megatron", "doctor", "--cluster", f"--folder={tmp_path}", "--json", f"--layout={path}"]
        done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=120, check=False)
    else:
        path = with_layout(tmp_path, STAGES)
        done = doctor("--processes=4", f"--folder={tmp_path}", "--json", f"--layout={path}")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    found = {(row["groups"], row["collective"]): row for row in report["layout"]}
    tensor, pairs = [[0, 1], [2, 3]], [[0, 2], [1, 3]]
    expected = {
        "torchrun": {
            ("tensor", "all_reduce"): tensor, ("tensor", "all_gather"): tensor, ("tensor", "reduce_scatter"): tensor,
            ("context", "all_to_all"): pairs, ("data", "all_reduce"): pairs, ("data", "all_gather"): pairs,
        },
        "--processes": {("data", "all_reduce"): tensor, ("stage", "send"): pairs},
    }[starter]  # fmt: skip
    assert {key: row["ranks"] for key, row in found.items()} == expected
    assert all(len(row["gb_s"]) == 2 and 0.001 < min(row["gb_s"]) < 1000 for row in found.values())
    assert report["wrong"] == []


@pytest.mark.gloo
def test_a_layout_of_other_processes_is_refused(tmp_path):
    done = doctor("--processes=3", f"--folder={tmp_path}", f"--layout={with_layout(tmp_path, STAGES)}")
    assert done.returncode == 2, done.stdout + done.stderr


def test_groups_are_those_of_training():
    config = make_config(MODEL, parallel={"tensor_size": 2, "pipeline_size": 2})
    assert layout_groups(config, 8) == {
        "tensor": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "data": [[0, 2], [1, 3], [4, 6], [5, 7]],
        "stage": [[0, 4], [1, 5], [2, 6], [3, 7]],
    }
    assert layout_groups(make_config(), 1) == {}


def broken(config, name, victim):
    """Problems of each rank, of which one gets wrong numbers from one collective."""
    import torch.distributed as dist

    honest, rank = getattr(dist, name), dist.get_rank()

    def wrong(out, *args, **options):
        result = honest(out, *args, **options)
        out.view(-1)[-1] += rank == victim
        return result

    setattr(dist, name, wrong)
    problems = []
    rows = layout_speeds(config, torch.device("cpu"), 1, problems)
    return rows, problems


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("parallel", "name", "line"),
    [
        (TENSOR_CONTEXT, "all_to_all_single", "all_to_all delivers wrong numbers in the context group of ranks 1, 3"),
        (
            TENSOR_CONTEXT,
            "all_gather_into_tensor",
            "all_gather delivers wrong numbers in the tensor group of ranks 2, 3",
        ),
        ({"pipeline_size": 2, "virtual_pipeline_size": 2, "zero_stage": 0}, "all_reduce", "data group of ranks 2, 3"),
    ],
)
def test_wrong_numbers_in_a_group_are_told_by_the_rank_that_gets_them(parallel, name, line):
    found = run_ranks(broken, 4, make_config(MODEL, parallel=parallel), name, 3)
    assert [bool(problems) for _, problems in found] == [False, False, False, True]
    assert any(line in problem for problem in found[3][1])
    assert all(rows == found[0][0] for rows, _ in found)


@pytest.mark.gloo
def test_a_disk_that_refuses_is_named(tmp_path):
    done = doctor(f"--folder={tmp_path}/missing")
    assert done.returncode == 1, done.stderr
    text = " ".join(done.stdout.split())
    assert "WRONG rank 0" in text
    assert "cannot write into" in text


RANKS = [RankReport(i, f"node{i // 2}", "CPU", 100.0 + i, [10.0, 11.0], 0.001 * i, 500.0, []) for i in range(4)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tflops": 60.0}, "rank 2 (node1): matrix product 60 TFLOP/s"),
        ({"links_gb_s": [2.0, 3.0]}, "rank 2 (node1): best link 3 GB/s"),
        ({"disk_mb_s": 50.0}, "rank 2 (node1): disk 50 MB/s"),
        ({"clock_s": -3.0}, "rank 2 (node1): its clock is -3.00 s off"),
    ],
)
def test_slow_ranks_are_named(change, words):
    assert ClusterReport(RANKS, {}).slow == []
    (line,) = ClusterReport([*RANKS[:2], dataclasses.replace(RANKS[2], **change), RANKS[3]], {}).slow
    assert line.startswith(words)


def test_a_slow_group_is_named():
    row = GroupSpeed("all_to_all", "context", [[0, 1], [2, 3], [4, 5]], [9.0, 1.0, 10.0])
    assert ClusterReport(RANKS, {}, [row]).slow == [
        "context group of ranks 2, 3: all_to_all 1 GB/s, the median group has 9"
    ]


def test_one_slow_link_accuses_nobody():
    ranks = [dataclasses.replace(r, links_gb_s=[10.0, 1.0] if r.rank in (1, 2) else [10.0]) for r in RANKS]
    assert ClusterReport(ranks, {}).slow == []


def test_one_wrong_element_of_a_product_is_seen():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (31, 31), generator=generator).float() for _ in range(2))
    signs = torch.randint(0, 2, (31,), generator=generator).double() * 2 - 1
    expected = a.double() @ (b.double() @ signs)
    product = a @ b
    assert product_is_right(product, signs, expected)
    product[7, 3] += 1
    assert not product_is_right(product, signs, expected)
