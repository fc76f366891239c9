"""Asks a GPU everything that waits for one, in under 8 minutes, and keeps the answers: see docs/gpu.md.

    bash tools/gpu_check.sh [tests train step sample profile] [--budget SECONDS] [--budget PART=SECONDS] [--bars]

    tests     is it right: tests/test_gpu.py, tests/model/test_flash.py, tests/model/test_compile.py
    train     does it work: text -> shards -> `esolm train` (124M, bf16, ZeRO-1, compiled) -> convert -> sample -> eval
    step      how fast is a step: tools/benchmark_train.py
    sample    how fast is a pass: tools/benchmark_sample.py
    profile   where the time goes: kernels of a step at alpha_0 1 and 0.25, and of a pass at batch 1 and 512

Each part has its own budget; what is still at work then is ended, and the next part begins. Each measurement is written to the
JSON file when it is there. A file holds many runs, the newest last. Needs no network. Status: 0 if all parts were done and no
bar was missed, 1 if not, 2 where it cannot begin.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BUDGETS = {"tests": 75, "train": 105, "step": 165, "sample": 80, "profile": 55}
"""Seconds of each part on one H200: tests and train together 3 minutes, all of them 8."""
GRACE_S = 3.0
"""Seconds from asking a process to end to killing it."""
Row = dict[str, Any]


@dataclass
class Job:
    """One command of a part. read: the measurements that it has left so far. before: what must be done first."""

    name: str
    words: list[str]
    read: Callable[[str], list[Row]] = lambda said: []
    before: Callable[[], None] = lambda: None


@dataclass
class Ask:
    """What is asked: of which device, at which size, with which bars. work: a folder for what is thrown away.
    seconds: the budget of each part.
    """

    device: str
    tiny: bool
    bars: bool
    work: Path
    seconds: dict[str, float]

    @property
    def rough(self) -> str:
        """The type to sample with."""
        return "bf16" if self.device == "cuda" else "fp32"


# ------------------------------------------------------------------------------------------------------------ the parts


def tests(ask: Ask) -> list[Job]:
    """Correctness; on a CPU what can be asked quickly."""
    files = ["tests/test_gpu.py", "tests/model/test_flash.py", "tests/model/test_compile.py"]
    words = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    return [Job("pytest", [*words, *files[: 2 if ask.tiny else 3]], tests_of)]


def tests_of(said: str) -> list[Row]:
    """Counts by file, from what pytest -v says as it goes."""
    out: dict[str, Row] = {}
    for file, name, how in re.findall(r"^(\S+\.py)::(.+?) (PASSED|FAILED|SKIPPED|ERROR)\b", said, re.MULTILINE):
        row = out.setdefault(file, {"file": file, "passed": 0, "failed": 0, "skipped": 0, "failures": []})
        row["failed" if how == "ERROR" else how.lower()] += 1
        if how in ("FAILED", "ERROR"):
            row["failures"].append(name)
    return list(out.values())


def train(ask: Ask) -> list[Job]:
    """From text to samples, by the command line; the text is Python's standard library.

    GPT-2's vocabulary cannot be had here, and times depend on its size: the tokenizer that is trained gets unused tokens up
    to the 50,257 of the paper's.
    """
    w, tiny = ask.work, ask.tiny
    text, tokens, tokenizer, model = (str(w / name) for name in ("text", "tokens", "tokenizer", "model"))
    vocab, learnt = (640, 600) if tiny else (50257, 8192)
    run = ["model.num_layers=2", "model.hidden_size=32", "model.num_heads=2", "model.seq_length=64", "train.num_steps=40",
           "train.global_batch_size=4", "train.micro_batch_size=4", "train.log_every_steps=1"] if tiny else [
           "train.num_steps=60", "train.global_batch_size=32", "train.micro_batch_size=32", "train.log_every_steps=10"]  # fmt: skip
    gpu = ask.device == "cuda"
    run += [
        f"train.device={ask.device}",
        f"train.precision={'bf16' if gpu else 'fp32'}",
        f"train.compile={str(gpu).lower()}",
    ]
    run += [
        f"model.vocab_size={vocab + 1}",
        f"optim.lr={1e-2 if tiny else 1e-3}",
        "optim.warmup_steps=5",
        "optim.ema_decay=0.9",
    ]
    run += [
        "parallel.zero_stage=1",
        "evaluate.every_steps=1000",
        "evaluate.num_sequences=8",
        "checkpoint.every_steps=1000",
    ]

    def verb(name: str, *words: str, read: Callable[[str], list[Row]] = lambda said: [], **more: Any) -> Job:
        return Job(name, [sys.executable, "-m", "esolm_megatron", *words], read, **more)

    place = [f"device={ask.device}", f"dtype={ask.rough}", "--json"]
    return [
        verb("corpus", "data", "corpus", text, f"max_bytes={300_000 if tiny else 12_000_000}"),
        verb("tokenizer", "data", "train-tokenizer", text, f"output={tokenizer}", f"vocab_size={learnt}"),
        verb("prepare", "data", "prepare", "configs/data/python.yaml", f"inputs=[{text}]", f"output={tokens}",
             f"tokenizer={tokenizer}", "validation_fraction=0.1", before=lambda: pad_vocabulary(Path(tokenizer), vocab)),
        verb("train", "train", "configs/paper/124m_alpha0p25.yaml", "name=run", f"runs_dir={w}", f"data.path={tokens}", *run,
             read=lambda said: training_of(w / "run" / "metrics.jsonl", 40 if tiny else 60)),
        verb("convert", "convert", str(w / "run"), model),
        verb("sample", "sample", model, "num_samples=4", "steps=32", *place, read=samples_of),
        verb("int8", "sample", model, "num_samples=4", "steps=32", "weights=int8", "cache=int8", *place, read=samples_of),
        verb("eval", "eval", model, f"data={tokens}", "num_sequences=8", "orders=2", *place, read=bounds_of),
        verb("written", "eval", model, "what=generation", "num_sequences=8", "steps=[16,64]", f"judge={model}", *place,
             read=written_of),
    ]  # fmt: skip


def pad_vocabulary(tokenizer: Path, size: int) -> None:
    """Give a trained tokenizer unused special tokens, so that it has `size`."""
    file = tokenizer / "tokenizer.json"
    tree = json.loads(file.read_text())
    (end,) = tree["added_tokens"]
    first = len(tree["model"]["vocab"])
    tree["added_tokens"] += [{**end, "id": n, "content": f"<|unused {n}|>"} for n in range(first, size)]
    file.write_text(json.dumps(tree))


def training_of(metrics: Path, steps: int) -> list[Row]:
    """What a run of so many steps has logged: its losses, and the median of its speed after the first line."""
    if not metrics.exists():
        return []
    lines = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]
    lines = [line for line in lines if "loss" in line]
    if not lines:
        return []
    last = [line["loss"] for line in lines[-3:]]
    row: Row = {"steps": lines[-1]["step"], "first_loss": lines[0]["loss"], "last_loss": sum(last) / len(last)}
    row["providers"] = lines[0].get("providers")
    speeds = sorted((line["tokens_per_s"], line["mfu"]) for line in lines[1:])
    if speeds:
        row["tokens_per_second"], row["mfu"] = speeds[len(speeds) // 2]
    if row["steps"] == steps and not row["last_loss"] < row["first_loss"] - 0.1:
        row["missed"] = (
            f"training: the loss went from {row['first_loss']:.3f} to {row['last_loss']:.3f} in {steps} steps"
        )
    return [row]


def samples_of(said: str) -> list[Row]:
    """Passes, the mean log-probability of a text, and what a cache of 8 bits costs."""
    found = last_json(said)
    probs = [sample["log_prob"] for sample in found.get("samples", [])]
    cost = {k: v for k, v in found.items() if k == "int8_cache_nats_per_token"}
    return [{"passes": found["num_forward_passes"], "mean_log_prob": sum(probs) / len(probs), **cost}] if probs else []


def written_of(said: str) -> list[Row]:
    """Of each number of steps: speed of drawing, perplexity under the model itself, entropy."""
    names = ("steps", "passes", "tokens_per_second", "perplexity", "entropy")
    return [{name: x[name] for name in names} for x in last_json(said).get("texts", [])]


def bounds_of(said: str) -> list[Row]:
    """The bounds in nats per token."""
    found = last_json(said)
    names = ("nelbo", "any_order", "importance_weighted", "left_to_right")
    return [{name: found[name]["nats_per_token"] for name in names}] if found else []


def last_json(said: str) -> Row:
    """The JSON document that ends what was said, after any warnings."""
    at = [0, *(m.end() for m in re.finditer(r"\n", said))]
    for start in (n for n in at if said[n : n + 1] == "{"):
        with suppress(json.JSONDecodeError):
            return json.loads(said[start:])
    return {}


def rows_in(file: Path) -> Callable[[str], list[Row]]:
    """Rows of the JSON that a benchmark writes as it goes."""

    def read(said: str) -> list[Row]:
        with suppress(OSError, json.JSONDecodeError):  # not there yet, or half written
            found = json.loads(file.read_text())
            return [*found["rows"], *({"missed": line} for line in found.get("missed", []))]
        return []

    return read


def benchmark(ask: Ask, name: str, tool: str, *words: str) -> Job:
    """A run of a tool that leaves its rows in a JSON file."""
    file = ask.work / f"{name}.json"
    command = [sys.executable, f"tools/{tool}.py", "--device", ask.device, "--json", str(file), *words]
    return Job(name, command, rows_in(file))


def begun_within(ask: Ask, part: str) -> list[str]:
    """Nothing is begun when most of a budget is spent, so that what was got is judged before the rest is."""
    return ["--budget", f"{0.8 * ask.seconds[part]:g}"]


def step(ask: Ask) -> list[Job]:
    """Training steps, those with a bar first."""
    sizes = ["--sizes", "tiny", "--alphas", "1,0.25", "--steps", "2", "--no-peaks"] if ask.tiny else []
    return [benchmark(ask, "step", "benchmark_train", *sizes, *begun_within(ask, "step"), *["--bars"] * ask.bars)]


def sample(ask: Ask) -> list[Job]:
    """The sampler; the cells that have a bar."""
    cells = ["--batch", "--bars" if ask.bars else "--bar-cells"]
    if ask.tiny:
        cells = ["--shape", "tiny", "--batch", "1", "4", "--length", "32", "--steps", "8", "one"]
    words = ["--dtype", ask.rough, *cells, *begun_within(ask, "sample")]
    jobs = [benchmark(ask, "sample", "benchmark_sample", *words)]
    if all(find_spec(package) for package in ("fastapi", "uvicorn", "prometheus_client")):  # the extra `serve`
        size = ["--shape", "tiny", "--length", "32", "--steps", "8", "--clients", "4", "--repeats", "1"]
        size = size if ask.tiny else ["--shape", "124m", "--length", "512", "--steps", "64"]
        words = ["--dtype", ask.rough, *size, *["--bar", "0.8"] * ask.bars]
        jobs.append(benchmark(ask, "serve", "benchmark_serve", *words))
    cell = ["--shape", "tiny", "--batch", "4", "--length", "32", "--steps", "8"] if ask.tiny else [
        "--batch", "64", "--length", "1024", "--steps", "64"]  # fmt: skip
    one = [*cell[:-1], "one", "--methods", "ours", "proposals"]
    jobs.append(benchmark(ask, "proposals", "benchmark_sample", "--dtype", ask.rough, *one))
    jobs.append(
        benchmark(ask, "int8", "benchmark_sample", "--dtype", ask.rough, *cell, "--methods", "ours", "int8_cache")
    )
    return jobs


def profile(ask: Ask) -> list[Job]:
    """Kernels."""
    option = "compile" if ask.device == "cuda" else "plain"
    steps = ["--profile", "--alphas", "1,0.25", "--sizes", "tiny" if ask.tiny else "124m", "--options", option]
    passes = (
        ["--shape", "tiny", "--batch", "1", "4", "--length", "32"]
        if ask.tiny
        else ["--batch", "1", "512", "--length", "1024"]
    )
    return [
        benchmark(ask, "steps", "benchmark_train", *steps),
        benchmark(ask, "passes", "benchmark_sample", "--dtype", ask.rough, "--profile", *passes, "--steps", "16"),
    ]


PARTS: dict[str, Callable[[Ask], list[Job]]] = {
    "tests": tests, "train": train, "step": step, "sample": sample, "profile": profile
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- running and keeping


@dataclass
class Record:
    """One run in a JSON file of many: written anew, whole, after each measurement."""

    file: Path
    run: Row
    earlier: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Read the runs that are there.

        Raises:
            SystemExit: the file is no file of runs; nothing is overwritten.
        """
        if self.file.exists():
            try:
                self.earlier = json.loads(self.file.read_text())["runs"]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise SystemExit(refusal(f"--json {self.file}: is not a file of this tool; name another")) from None
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.save()

    def save(self) -> None:
        """Write it."""
        text = json.dumps({"runs": [*self.earlier, self.run]}, indent=1)
        new = self.file.with_name(self.file.name + ".new")
        new.write_text(text + "\n")
        os.replace(new, self.file)


def refusal(text: str) -> int:
    """Status 2, after saying why."""
    print(f"error: {text}", file=sys.stderr)
    return 2


def ended(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    process.wait()


def last_lines(said: str, count: int = 30) -> str:
    """The end of what was said, without folders of this machine: the file is made to be published."""
    return re.sub(r"(?<![\w.])/(?:[\w.+@-]+/)+", "", "\n".join(said.splitlines()[-count:]))


def run_part(name: str, jobs: list[Job], budget: float, record: Record, environment: dict[str, str]) -> Row:
    """Run the commands of a part until its budget is spent; its entry in the record."""
    entry: Row = {"part": name, "budget_s": budget, "state": "running", "seconds": 0.0, "results": []}
    record.run["parts"].append(entry)
    record.save()
    began = time.monotonic()
    try:
        for job in jobs:
            run_job(job, entry, began + budget, record, environment)
            if entry["state"] != "running":
                break
        else:
            entry["state"] = "missed" if any("missed" in row for row in entry["results"]) else "done"
    except KeyboardInterrupt:
        entry["state"] = "cut"
        entry["error"] = "this program was told to end"
        raise
    finally:
        entry["seconds"] = round(time.monotonic() - began, 1)
        record.save()
    return entry


def run_job(job: Job, entry: Row, until: float, record: Record, environment: dict[str, str]) -> None:
    """Run one command; `entry` gets its measurements as they come, and the state if the part ends here."""
    before, began = list(entry["results"]), time.monotonic()
    with tempfile.TemporaryFile() as out:

        def absorb() -> str:
            out.seek(0)
            said = out.read().decode(errors="replace")
            rows = [{"stage": job.name, **row} for row in job.read(said)]
            if before + rows != entry["results"]:
                entry["results"] = before + rows
                record.save()
            return said

        try:
            job.before()
        except (OSError, ValueError, KeyError) as error:
            entry["state"], entry["error"] = "failed", f"{job.name}: {error!r}"
            return
        process = subprocess.Popen(
            job.words,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=environment,
            start_new_session=True,
        )
        try:
            while process.poll() is None and time.monotonic() < until:
                time.sleep(0.1)
                absorb()
        finally:
            cut = process.poll() is None
            ended(process)
        said = absorb()
    seconds = round(time.monotonic() - began, 1)
    rows = entry["results"][len(before) :]
    entry["results"] = before + (
        [{**row, "stage_s": seconds} for row in rows] or [{"stage": job.name, "stage_s": seconds}]
    )
    if cut:
        entry["state"], entry["error"] = "cut", f"{job.name}: its budget of {entry['budget_s']:g} s was spent"
    elif process.returncode and not any("missed" in row for row in rows):
        how = (
            f"was killed by signal {-process.returncode}"
            if process.returncode < 0
            else f"ended with {process.returncode}"
        )
        if job.name == "pytest" and process.returncode == 5:
            how = "found no tests"
        entry["state"], entry["error"] = "failed", f"{job.name} {how}:\n{last_lines(said)}"
    record.save()


COLUMNS: dict[str, list[str]] = {
    "tests": ["file", "passed", "failed", "skipped"],
    "train": ["stage", "stage_s", "steps", "first_loss", "last_loss", "tokens_per_second", "mfu", "passes", "nelbo"],
    "step": [
        "size",
        "layers",
        "alpha_0",
        "option",
        "kind",
        "seconds",
        "tokens_per_second",
        "mfu",
        "peak_mib",
        "planned_mib",
        "refused",
    ],
    "sample": [
        "batch",
        "length",
        "steps",
        "method",
        "first_s",
        "wall_s",
        "shapes",
        "recording_s",
        "ms_per_pass",
        "tokens_per_s",
        "times_ours",
        "what",
        "tokens/s",
        "share",
    ],
}


def show(entry: Row) -> None:
    """A part's table, and how it ended."""
    from rich.console import Console  # imported when it is known to be there
    from rich.table import Table

    console = Console(stderr=True, width=130)
    title = f"{entry['part']}: {entry['state']}, {entry['seconds']:.0f} of {entry['budget_s']:.0f} s"
    rows, columns = entry["results"], COLUMNS.get(entry["part"], [])
    if entry["part"] == "profile":
        columns = ["what", "kernel", "count", "ms", "share"]
        rows = [
            {"what": r["what"], "kernel": k["name"][:70], **k} for r in rows if "kernels" in r for k in r["kernels"][:5]
        ]
    table = Table(*columns, title=title)
    for row in rows:
        if any(name in row for name in columns):
            table.add_row(*(told(row.get(name)) for name in columns))
    console.print(table)
    for line in [*(row["missed"] for row in rows if "missed" in row), *entry.get("error", "").splitlines()[:31]]:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def told(value: Any) -> str:
    """A cell."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value).splitlines()[0][:60]


# ------------------------------------------------------------------------------------------------- what must be there

WITH_TORCH = {
    "deepspeed": ("einops", "hjson", "msgpack", "ninja", "packaging", "psutil", "py-cpuinfo", "pydantic", "tqdm"),
    "megatron-core": ("packaging",),
}
"""Packages that ask for torch, which is there and must not be brought again, and what else they ask for."""
NOT_NEEDED = {"wandb"}
"""Of the extra `train`: imported only where a run asks for it."""
SDISTS = {"deepspeed"}
"""Packages without wheels in the index."""


def declared() -> list[Any]:
    """What training and its tests need, from pyproject.toml, as parsed requirements."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    fp8 = [x for x in extras["fp8"] if not x.startswith(project["name"])]
    lines = [
        *project["dependencies"],
        *extras["train"],
        *fp8,
        *(x for x in extras["dev"] if re.match(r"pytest\b(?!-)", x)),
    ]
    return [found for found in map(requirement, lines) if found.name not in NOT_NEEDED]


def requirement(text: str) -> Any:
    """A parsed requirement; pip has the parser, where nothing else has it."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        from pip._vendor.packaging.requirements import Requirement
    return Requirement(text)


def missing_wheels() -> list[str]:
    """Requirements that this Python does not meet: those declared, and those of packages that are there, all the way down."""
    out: dict[str, str] = {}
    left, seen = declared(), set()
    while left:
        wanted = left.pop(0)
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if (name, str(wanted.specifier)) in seen or name == "torch":
            continue
        seen.add((name, str(wanted.specifier)))
        try:
            there = importlib.metadata.version(name)
            further = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            out.setdefault(name, f"{name}{wanted.specifier}")
            left += map(requirement, WITH_TORCH.get(name, ()))
            continue
        if not wanted.specifier.contains(there, prereleases=True):
            out[name] = f"{name}{wanted.specifier}"
            continue
        found = map(requirement, further)
        left += [r for r in found if (r.marker is None or r.marker.evaluate({"extra": ""})) and name not in WITH_TORCH]
        left += map(requirement, WITH_TORCH.get(name, ()))
    return list(out.values())


def how_to_bring(missing: list[str]) -> str:
    """The lines to type on a machine with a network, and here."""
    major, minor = sys.version_info[:2]
    there = [f"--python-version {major}.{minor}", f"--platform manylinux_2_28_{platform.machine()}",
             f"--platform manylinux2014_{platform.machine()}", "--only-binary=:all:"]  # fmt: skip
    names = {text: requirement(text).name for text in missing}
    lines = []
    plain = [text for text, name in names.items() if name not in WITH_TORCH]
    alone = [text for text, name in names.items() if name in WITH_TORCH and name not in SDISTS]
    built = [text for text, name in names.items() if name in SDISTS]
    if plain:
        lines.append(shlex.join(["pip", "download", "-d", "wheels", *" ".join(there).split(), *plain]))
    if alone:
        lines.append(shlex.join(["pip", "download", "-d", "wheels", "--no-deps", *" ".join(there).split(), *alone]))
    if built:
        lines.append("DS_BUILD_OPS=0 " + shlex.join(["pip", "wheel", "-w", "wheels", "--no-deps", *built]))
    return "\n".join(f"  {line}" for line in lines)


def bring(folder: Path, target: Path) -> None:
    """Unpack the wheels of a folder beside this run, all but those of torch itself and of a numpy that torch has already."""
    there = "|numpy" if importlib.util.find_spec("numpy") else ""
    own = re.compile(rf"^(torch|triton|nvidia\w*|cuda\w*{there})-")
    wheels = [str(path) for path in sorted(folder.glob("*.whl")) if not own.match(path.name)]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--target",
        str(target),
        *wheels,
    ]
    subprocess.run(command, check=True)
    sys.path.insert(0, str(target))


def source_hash() -> str:
    """Of the package's code, for checkouts without git."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "esolm_megatron").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def git(*words: str) -> str:
    """What git says; empty where there is none."""
    with suppress(OSError):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return ""


PROBE = """
import json, sys, torch
from esolm_megatron.model import flash
device = torch.device(sys.argv[1])
gpu = device.type == "cuda"
if gpu and not torch.cuda.is_available():
    sys.exit(3)
out = {"device": torch.cuda.get_device_name() if gpu else "cpu", "torch": torch.__version__, "cuda": torch.version.cuda}
try:
    out["kernels"] = flash.choose(device)
except Exception as error:
    out["kernels"] = f"none: {error}"
if gpu:
    out["memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
print(json.dumps(out))
"""


def driver() -> str | None:
    """Version of the GPU's driver."""
    with suppress(OSError):
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(words, capture_output=True, text=True, check=False).stdout.split()
        return said[0] if said else None
    return None


def head_of(ask: Ask, environment: dict[str, str]) -> Row | int:
    """What was asked of what; or 3 where torch sees no GPU, or another status."""
    words = [sys.executable, "-c", PROBE, ask.device]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        if done.returncode != 3:
            print(done.stderr, file=sys.stderr)
        return done.returncode
    now = datetime.datetime.now().astimezone()
    facts: Row = {"date": now.isoformat(timespec="seconds"), **last_json(done.stdout), "driver": driver()}
    facts |= {"python": platform.python_version(), "size": "tiny" if ask.tiny else "full", "bars": ask.bars}
    facts |= {"commit": git("rev-parse", "HEAD") or None, "changed": bool(git("status", "--porcelain", "-uno"))}
    return facts | {"source": source_hash(), "parts": []}


# --------------------------------------------------------------------------------------------------------- command line


def budgets_of(words: list[str], parts: list[str]) -> dict[str, float]:
    """Seconds of each part: those of the table, scaled to a sum that was given, or as given for a part.

    Raises:
        ValueError: a word is neither SECONDS nor PART=SECONDS.
    """
    out: dict[str, float] = {part: float(BUDGETS[part]) for part in parts}
    for word in sorted(words, key=lambda word: "=" in word):
        part, _, seconds = word.rpartition("=")
        if not re.fullmatch(r"\d+(\.\d+)?", seconds) or float(seconds) <= 0 or (part and part not in BUDGETS):
            raise ValueError(
                f"--budget {word}: is neither SECONDS nor PART=SECONDS with a part of {', '.join(BUDGETS)}"
            )
        if part:
            out |= {part: float(seconds)} if part in out else {}
        else:
            factor = float(seconds) / sum(out.values())
            out = {name: value * factor for name, value in out.items()}
    return out


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default: all, in this order")
    parser.add_argument(
        "--budget", action="append", default=[], metavar="SECONDS", help="of all parts together; or PART=SECONDS"
    )
    parser.add_argument("--bars", action="store_true", help="judge the bars of an H200; status 1 where one is missed")
    parser.add_argument("--json", type=Path, help="default: docs/gpu/DEVICE-DATE.json")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu, with --size tiny, tries this tool out"
    )
    parser.add_argument(
        "--size", choices=["full", "tiny"], default="full", help="tiny: seconds on a CPU; its times mean nothing"
    )
    parser.add_argument("--wheels", type=Path, help="folder of wheels to use for what is missing here")
    args = parser.parse_args()
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if args.device == "cpu" and args.size == "full":
        parser.error("--device cpu: needs --size tiny; the full size is for a GPU")
    if args.bars and args.size == "tiny":
        parser.error("--bars: are those of the full size; leave out --size tiny")
    if args.wheels and not list(args.wheels.glob("*.whl")):
        parser.error(f"--wheels {args.wheels}: holds no .whl")
    args.parts = [part for part in PARTS if part in (args.parts or PARTS)]
    try:
        args.seconds = budgets_of(args.budget, args.parts)
    except ValueError as error:
        parser.error(str(error))
    return args


def interrupted(number: int, frame: Any) -> None:
    """A signal ends the program as Ctrl-C does: the part at work is ended and recorded."""
    raise KeyboardInterrupt


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, interrupted)
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        ask = Ask(args.device, args.size == "tiny", args.bars, Path(folder), args.seconds)
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        paths = [str(ROOT), environment.get("PYTHONPATH", "")]
        if args.wheels and missing_wheels():
            bring(args.wheels, ask.work / "site")
            paths.insert(1, str(ask.work / "site"))
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        if args.device == "cpu":
            environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        missing = missing_wheels()
        if missing:
            names = ", ".join(missing)
            return refusal(
                f"this Python ({platform.python_version()}) lacks {names}.\nOn a machine with a network:\n{how_to_bring(missing)}\n"
                "then bring the folder `wheels` here, and add: --wheels wheels"
            )
        head = head_of(ask, environment)
        if head == 3:
            return refusal("torch sees no CUDA GPU here (nvidia-smi?); to try this tool out: --device cpu --size tiny")
        if isinstance(head, int):
            return refusal("the package does not start here; what it said is above")
        slug = re.sub(r"[^a-z0-9]+", "-", head["device"].lower()).strip("-")
        file = args.json or ROOT / "docs" / "gpu" / f"{slug}-{head['date'][:10]}.json"
        record = Record(file, head)
        print(f"{head['device']}, torch {head['torch']}, kernels: {head['kernels']}; writing {file}", file=sys.stderr)
        try:
            for part in args.parts:
                show(run_part(part, PARTS[part](ask), args.seconds[part], record, environment))
        except KeyboardInterrupt:
            print("ended by a signal; what was measured is kept", file=sys.stderr)
    return 0 if [entry["state"] for entry in head["parts"]] == ["done"] * len(args.parts) else 1


if __name__ == "__main__":
    sys.exit(main())
