"""doctor --cluster on real ranks, and who it names."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from esolm_megatron.cluster import ClusterReport, RankReport, product_is_right


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
