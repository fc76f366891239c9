"""Simulated ranks: they call what real ones call, hold what is planned, and what does not go together is found."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from truth import MODERN, make_config

from esolm_megatron.cli import main
from esolm_megatron.config import ConfigError, dump, load, with_values
from esolm_megatron.plan import plan
from esolm_megatron.simulation.check import check, disagreements, ranks_to_try
from esolm_megatron.topology import Topology

ROOT = Path(__file__).parents[2]
LAYOUTS = {
    "tensor, pipeline": {"tensor_size": 2, "pipeline_size": 2, "sequence_parallel": True},
    "context, ZeRO 2": {"context_size": 2, "zero_stage": 2},
}


def small(parallel, world):
    train = {"precision": "bf16", "global_batch_size": 2 * world, "micro_batch_size": 2}  # of 4 ranks all are simulated
    return make_config(MODERN, parallel=parallel, train=train)


def simulated(config, rank, world, tmp_path):
    (tmp_path / "run.yaml").write_text(dump(config))
    command = [
        sys.executable,
        "-m",
        "esolm_megatron.simulation.one_rank",
        str(tmp_path / "run.yaml"),
        str(world),
        str(rank),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


REAL = """
import json, os, sys
from esolm_megatron.simulation.one_rank import Sent, batch_of

sent = Sent(int(os.environ["RANK"]))  # before what keeps functions of torch.distributed is imported
from esolm_megatron.config import load
from esolm_megatron.parallel.engine import Engine

engine = Engine(load(sys.argv[1], []))
sent.taken()
engine.forward_backward(batch_of(engine.config, engine.topology))
engine.state.step(1e-3)
print("\\n" + json.dumps(sent.taken()))
"""


def really(config, world, tmp_path):
    """What real ranks over gloo call in a step, by the same notes."""
    (tmp_path / "run.yaml").write_text(dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": "0",
    }
    command = [sys.executable, "-c", REAL, str(tmp_path / "run.yaml")]
    ranks = [
        subprocess.Popen(command, env=shared | {"RANK": str(n)}, stdout=subprocess.PIPE, text=True)
        for n in range(world)
    ]
    return [json.loads(process.communicate()[0].strip().splitlines()[-1]) for process in ranks]


@pytest.mark.gloo
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_simulated_rank_calls_what_a_real_one_calls(layout, tmp_path):
    config = small(LAYOUTS[layout], 4)
    found = check(config, 4, whole=True).ranks
    assert len(found) > 2
    real = really(config, 4, tmp_path)
    for theirs in found:
        assert len(theirs["step"]) > 5
        assert theirs["step"] == real[theirs["rank"]], theirs["rank"]


@pytest.mark.gloo
def test_some_of_a_thousand_ranks_go_together_and_hold_what_is_planned():
    config = small(LAYOUTS["tensor, pipeline"], 1024)
    told = []
    found = check(config, 1024, progress=lambda *x: told.append(x))
    assert found.problems == []
    assert [x["rank"] for x in found.ranks] == [0, 1, 510, 512, 513, 1022]
    assert told[0] == (0, 6)
    assert told[-1] == (6, 6)
    for x in found.ranks:
        stage = plan(config, 1024).stages[x["stage"]]
        assert x["weights"] == stage.weights
        assert x["gradients"] == stage.gradients
        assert x["activations"] > 0
    console = Console(width=120, record=True)
    console.print(found)
    assert "6 of 1,024 ranks were simulated: what they call of each other goes together" in console.export_text()
    assert json.loads(json.dumps(found.as_dict()))["ranks"][0]["calls"]


SPLITS = {
    "tensor, selective": (["tensor_size=2", "sequence_parallel=true", "recompute=selective"], 16, 0),
    "context": (["context_size=2", "tensor_size=1", "sequence_parallel=false", "recompute=none"], 16, 0),
    "pipeline in chunks, not compiled": (
        ["pipeline_size=2", "virtual_pipeline_size=2", "tensor_size=2", "recompute=none"],
        8,
        0,
    ),
    "its last stage": (["pipeline_size=2", "tensor_size=2", "recompute=none"], 8, 6),
    "everything again": (["tensor_size=2", "recompute=full"], 16, 0),
    "ZeRO 2": (["zero_stage=2", "tensor_size=1", "sequence_parallel=false", "recompute=selective"], 16, 0),
    "ZeRO 3": (["zero_stage=3", "tensor_size=2", "recompute=none"], 16, 0),
}


@pytest.mark.gloo
@pytest.mark.parametrize("layout", SPLITS)
def test_memory_is_planned_within_a_twentieth(layout, tmp_path):
    """Eight of 7B's blocks; what a rank holds, and the most that a step adds."""
    words, world, number = SPLITS[layout]
    words = [f"parallel.{word}" for word in words] + ["model.num_layers=8", "model.vocab_size=50258", "data.path=none"]
    words += [f"train.compile={'false' if 'not compiled' in layout else 'null'}", "train.global_batch_size=64"]
    config = load(ROOT / "configs" / "scale" / "7b.yaml", words)
    found = simulated(config, number, world, tmp_path)
    stage = plan(config, world).stages[found["stage"]]
    took = sum(found[name] for name in ("weights", "gradients", "optimizer", "activations"))
    assert 0.97 < stage.total / took < 1.05
    assert found["activations"] > took / 10


@pytest.mark.gloo
def test_the_command_line(tmp_path, capsys):
    """That of docs/scale.md, on fewer ranks: a vocabulary that the data decides, and kernels that no CPU has."""
    path, words = (
        str(ROOT / "configs" / "debug" / "tiny_tp2_pp2.yaml"),
        ["train.kernels.attention=fa3", "train.precision=bf16"],
    )
    assert main(["plan", "check", path, *words, "--gpus", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert found["world_size"] == 8
    (tmp_path / "run.yaml").write_text(dump(small({"tensor_size": 2}, 4)))
    assert main(["plan", "check", str(tmp_path / "run.yaml")]) == 2
    assert "plan check: takes --gpus N" in capsys.readouterr().err
    assert main(["plan", "check", str(tmp_path / "run.yaml"), "--gpus", "3"]) == 2


def test_ranks_are_the_ends_of_each_stage_and_of_the_last_replica():
    assert ranks_to_try(Topology(0, 64, 4, 2, 1), False) == [0, 3, 28, 32, 35, 60]
    assert ranks_to_try(Topology(0, 64, 4, 2, 1), True) == [0, 1, 2, 3, 28, 32, 33, 34, 35, 60]
    assert ranks_to_try(Topology(0, 1, 1, 1, 1), False) == [0]


def rank(number, *step):
    return {"rank": number, "stage": 0, "built": [], "step": [list(call) for call in step]}


BOTH = "0 to 1 by 1"


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (
            [("all_reduce", BOTH, 8)],
            [("all_reduce", BOTH, 12)],
            "call 0: rank 0 makes all_reduce of 8 bytes, rank 1 all_reduce of 12 bytes",
        ),
        (
            [("all_reduce", BOTH, 8)] * 2,
            [("all_reduce", BOTH, 8)],
            "call 1: rank 0 makes all_reduce of 8 bytes, rank 1 nothing",
        ),
        (
            [("all_reduce", BOTH, 8), ("broadcast", BOTH, 8)],
            [("broadcast", BOTH, 8), ("all_reduce", BOTH, 8)],
            "call 0: rank 0 makes all_reduce",
        ),
        ([("message", "0 -> 1", 8)], [], "ranks 0 -> 1, call 0: rank 0 makes message of 8 bytes, rank 1 nothing"),
        ([("barrier", "0, 1, 5", 0)], [], "rank 1 nothing"),
    ],
)
def test_what_does_not_go_together_is_named(first, second, said):
    (problem,) = disagreements([rank(0, *first), rank(1, *second)])
    assert said in problem
    assert problem.startswith("step, ranks ")
    assert disagreements([rank(0, *first), rank(1, *first)]) == []
    assert disagreements([rank(0, ("all_reduce", "0 to 4 by 4", 8)), rank(1)]) == [], "of groups that it is not in"


@pytest.mark.gloo
def test_a_rank_that_cannot_build_itself_says_why(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ConfigError, match=r"ranks \d(, \d)? of 4: it ended without a word"):
        check(small({"tensor_size": 2}, 4), 4)


@pytest.mark.gloo
def test_nobody_waits_for_the_others_once_a_rank_has_died(monkeypatch, tmp_path):
    """One process dies at once; the other one, and what it has started, would go on for ten minutes."""
    script, pids = tmp_path / "python", tmp_path / "pids"
    script.write_text(
        f"#!/bin/sh\ncase \"$*\" in *' 4 0'*) sleep 1; kill -9 $$;; esac\necho $$ >> {pids}\n"
        f"sleep 600 & echo $! >> {pids}\nwait\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(ConfigError, match="ranks 0, 2 of 4: it ended without a word"):
        check(small({"tensor_size": 2}, 4), 4)
    deadline = time.monotonic() + 30
    others = [int(pid) for pid in pids.read_text().split()]
    assert len(others) == 2
    while any(alive(pid) for pid in others):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.gloo
def test_a_run_that_frees_what_it_has_sent_is_checked_as_on_gpus():
    """Which gloo does not bear, so that a run on CPUs is refused."""
    layout = {"pipeline_size": 2, "virtual_pipeline_size": 2, "deallocate_pipeline_outputs": True}
    config = with_values(small({}, 2), parallel=layout, train={"device": "auto", "global_batch_size": 8})
    freed = check(config, 2)
    kept = check(with_values(config, parallel={"deallocate_pipeline_outputs": False}), 2)
    assert freed.problems == kept.problems == []
    assert [x["step"] for x in freed.ranks] == [x["step"] for x in kept.ranks]
    assert sum(x["activations"] for x in freed.ranks) < sum(x["activations"] for x in kept.ranks)
