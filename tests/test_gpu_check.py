"""tools/gpu_check.sh on a CPU, with tiny sizes: what a GPU is asked runs, and what was measured is never lost."""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import gpu_check

ROOT = Path(__file__).parent.parent
TINY = ["--device", "cpu", "--size", "tiny"]
PATIENT = ["--budget", "3000"]
"""The budgets are a GPU's; here many processes may share two cores."""


def started(*words):
    """The command that a user types, with this Python."""
    return subprocess.Popen(
        ["bash", "tools/gpu_check.sh", *map(str, words)], cwd=ROOT, env=os.environ | {"ESOLM_PYTHON": sys.executable},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def runs_of(file):
    return json.loads(file.read_text())["runs"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(status, output, file) of a run of all parts."""
    file = tmp_path_factory.mktemp("gpu") / "found.json"
    process = started(*TINY, *PATIENT, "--json", file)
    said, _ = process.communicate()
    return process.returncode, said, file


@pytest.mark.end_to_end
@pytest.mark.timeout(900)
def test_every_part_leaves_results(whole):
    status, said, file = whole
    assert status == 0, said
    (run,) = runs_of(file)
    assert {"device", "torch", "cuda", "driver", "date", "commit", "kernels", "source"} <= run.keys()
    assert [(part["part"], part["state"]) for part in run["parts"]] == [(name, "done") for name in gpu_check.PARTS]
    tests, train, step, sample, profile = (part["results"] for part in run["parts"])
    assert {row["file"] for row in tests} == {"tests/test_gpu.py", "tests/model/test_flash.py"}
    assert sum(row["passed"] for row in tests) > 10
    assert all(row["failed"] == 0 for row in tests)
    assert [row["stage"] for row in train] == [
        "corpus",
        "tokenizer",
        "prepare",
        "train",
        "convert",
        "sample",
        "int8",
        "eval",
        "written",
        "written",
    ]
    assert train[3]["steps"] == 40
    assert train[3]["tokens_per_second"] > 0
    assert train[5]["passes"] > 0
    assert 0 < abs(train[6]["int8_cache_nats_per_token"]) < 0.1
    assert 0 < train[7]["importance_weighted"] < 7
    assert [row["steps"] for row in train[8:]] == [16, 64]
    assert all(row["tokens_per_second"] > 0 and row["perplexity"] > 1 for row in train[8:])
    assert {(row["alpha_0"], row["kind"]) for row in step} == {
        (alpha_0, kind) for alpha_0 in (1.0, 0.25) for kind in ("ours", "reference", "ar")
    }
    served = [row for row in sample if "what" in row]
    assert [row["what"] for row in served] == ["served whole", "served streamed", "offline"]
    assert all(row["share"] > 0 for row in served)
    sample = [row for row in sample if row not in served]
    assert {row["method"] for row in sample if (row["batch"], row["steps"]) == (4, "8")} >= {"ours", "int8_cache"}
    assert {(row["batch"], row["steps"]) for row in sample} == {(1, "8"), (1, "one"), (4, "8"), (4, "one")}
    assert {row["method"] for row in sample if (row["batch"], row["steps"]) == (4, "one")} >= {"ours", "proposals"}
    assert all(row["ms_per_pass"] > 0 for row in sample)
    assert len(profile) == 4
    for found in profile:
        assert {"name", "count", "ms", "share"} <= found["kernels"][0].keys()
        assert sum(row["share"] for row in found["kernels"]) == pytest.approx(1)
        assert any(re.search("mm|linear", row["name"]) for row in found["kernels"])


@pytest.mark.end_to_end
@pytest.mark.timeout(900)
def test_parts_that_are_cut_or_die_leave_what_they_had_and_the_next_ones_run(whole):
    file = whole[2]
    before = runs_of(file)
    process = started("tests", "train", "sample", *TINY, *PATIENT, "--budget", "tests=1.5", "--json", file)
    until = time.monotonic() + 800
    while time.monotonic() < until and process.poll() is None:
        run = runs_of(file)[-1]
        parts = {part["part"]: part for part in run["parts"]}
        if len(runs_of(file)) > 1 and [row["stage"] for row in parts.get("train", {}).get("results", [])][2:3] == [
            "prepare"
        ]:
            time.sleep(1)  # the process that trains has been started
            (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(child), signal.SIGKILL)
            break
        time.sleep(0.1)
    said, _ = process.communicate()
    assert process.returncode == 1, said
    *earlier, run = runs_of(file)
    assert earlier == before
    tests, train, sample = run["parts"]
    assert (tests["state"], train["state"], sample["state"]) == ("cut", "failed", "done"), said
    assert "its budget of 1.5 s was spent" in tests["error"]
    assert 1 < tests["seconds"] < 60
    assert train["error"].startswith("train was killed by signal 9")
    assert [row["stage"] for row in train["results"]] == ["corpus", "tokenizer", "prepare", "train"]
    assert len(sample["results"]) == 14 + 3 + 2 + 2


def test_the_budgets_fit_a_lease():
    assert sum(gpu_check.BUDGETS.values()) <= 480
    assert gpu_check.BUDGETS["tests"] + gpu_check.BUDGETS["train"] <= 180
    assert gpu_check.BUDGETS.keys() == gpu_check.PARTS.keys()
    assert gpu_check.budgets_of(["90"], ["tests", "train"]) == {"tests": 37.5, "train": 52.5}
    assert gpu_check.budgets_of(["step=7", "240"], ["step", "sample"])["step"] == 7


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stepp"], "no part 'stepp'; there are tests, train, step, sample, profile"),
        (["--budget", "soon"], "--budget soon: is neither SECONDS nor PART=SECONDS"),
        (["--budget", "tests=0"], "--budget tests=0: is neither"),
        (["--device", "cpu"], "needs --size tiny"),
        ([*TINY, "--bars"], "leave out --size tiny"),
        (["--wheels", "docs"], "holds no .whl"),
    ],
)
def test_bad_usage_is_told_before_anything_starts(words, said):
    process = started(*words)
    out, _ = process.communicate()
    assert process.returncode == 2
    assert said in " ".join(out.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told_so(tmp_path):
    process = started("--json", tmp_path / "none.json")
    out, _ = process.communicate()
    assert process.returncode == 2
    assert "torch sees no CUDA GPU here" in out
    assert not list(tmp_path.iterdir())


def test_a_machine_without_torch_is_told_so():
    done = subprocess.run(["bash", "tools/gpu_check.sh"], cwd=ROOT, env=os.environ | {"ESOLM_PYTHON": "false"},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert "no Python 3.11 or 3.12 with torch" in done.stderr


def test_a_file_of_something_else_is_not_overwritten(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text("[1, 2]")
    with pytest.raises(SystemExit, match="2"):
        gpu_check.Record(file, {"parts": []})
    assert file.read_text() == "[1, 2]"


def part(tmp_path, *codes, name="pytest", budget=20.0):
    """The entry of a part that runs Python lines, and the file."""
    record = gpu_check.Record(tmp_path / "out.json", {"parts": []})
    jobs = [gpu_check.Job(name, [sys.executable, "-c", code], lambda said: [{"n": len(said)}]) for code in codes]
    return gpu_check.run_part("tests", jobs, budget, record, dict(os.environ)), runs_of(tmp_path / "out.json")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise SystemExit(5)", "pytest found no tests"),
        ("raise SystemExit(1)", "pytest ended with 1"),
        ("import os; os.kill(os.getpid(), 11)", "pytest was killed by signal 11"),
    ],
)
def test_a_command_that_fails_ends_its_part(tmp_path, code, said):
    entry, ((run),) = part(tmp_path, "print('x')", code, "print('never')")
    assert entry["state"] == "failed"
    assert entry["error"].startswith(said)
    assert run["parts"] == [entry]
    assert [row["n"] for row in entry["results"]] == [2, 0]


def test_what_a_command_started_ends_with_it(tmp_path):
    """A grandchild that ignores the request to end, and holds the output open."""
    child = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    began = time.monotonic()
    entry, _ = part(tmp_path, f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])", budget=1.0)
    assert entry["state"] == "cut"
    assert time.monotonic() - began < 15
    alive = [p for p in Path("/proc").glob("[0-9]*/cmdline") if child.encode() in _read(p)]
    assert alive == []


def _read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_folders_of_a_machine_are_not_published():
    assert (
        gpu_check.last_lines('File "' + "/some" + '/where/x.py", line 3\nok tests/a.py')
        == 'File "x.py", line 3\nok tests/a.py'
    )


def test_missing_wheels_are_named_with_the_lines_that_bring_them(monkeypatch, capsys):
    assert gpu_check.missing_wheels() == []
    real = importlib.metadata.version

    def version(name):
        if name in ("megatron-core", "deepspeed", "hjson", "pydantic", "webdataset"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.20" if name == "tokenizers" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *TINY])
    assert gpu_check.main() == 2
    said = capsys.readouterr().err
    for name in ("megatron-core==0.16.1", "deepspeed==0.19.8", "hjson", "webdataset==1.0.2", "tokenizers>=0.21"):
        assert name in said.splitlines()[0], said
    assert not {"torch", "wandb", "numpy"} & set(re.split(r"[ ,=<>]+", said.splitlines()[0]))
    plain, alone, built = (line.strip() for line in said.splitlines() if line.startswith("  "))
    assert plain.startswith("pip download -d wheels --python-version 3.")
    assert {"hjson", "webdataset==1.0.2", "'pydantic<3,>=2.7'", "'tokenizers>=0.21'"} <= set(plain.split())
    assert "--no-deps" in alone.split()
    assert alone.split()[-1] == "megatron-core==0.16.1"
    assert built == "DS_BUILD_OPS=0 pip wheel -w wheels --no-deps deepspeed==0.19.8"


@pytest.mark.parametrize("name", gpu_check.WITH_TORCH)
def test_what_packages_that_want_torch_ask_for_is_known(name):
    wanted = [gpu_check.requirement(line) for line in importlib.metadata.requires(name)]
    names = {r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})}
    assert names - {"torch", "numpy"} == set(gpu_check.WITH_TORCH[name])


def test_wheels_of_a_folder_are_used_without_those_of_torch(tmp_path, monkeypatch):
    for name in ("brought", "numpy"):
        with zipfile.ZipFile(tmp_path / f"{name}-9.9-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "here = 1\n")
            wheel.writestr(f"{name}-9.9.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
            wheel.writestr(
                f"{name}-9.9.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{name}-9.9.dist-info/RECORD", "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    gpu_check.bring(tmp_path, tmp_path / "site")
    assert {path.name for path in (tmp_path / "site").glob("*.py")} == {"brought.py"}
    assert importlib.metadata.version("brought") == "9.9"
