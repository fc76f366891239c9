"""What this machine can and cannot do: versions, devices, optional packages, SLURM, and what to do about each.

Nothing heavy is imported: packages are looked up, not loaded, so this answers where an import would crash.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

Level = Literal["ok", "note", "warning", "error"]
"""ok: as it should be. note: works without it. warning: something will be wrong or missing. error: training cannot run."""

_COLOURS = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. found: what is there. advice: what it costs and how to mend it; empty if fine."""

    subject: str
    level: Level
    found: str
    advice: str = ""


class Machine:
    """The look-ups that findings are made from; tests give a made-up one."""

    python: tuple[int, ...] = sys.version_info[:3]

    def version(self, distribution: str) -> str | None:
        """Version of an installed distribution."""
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def folder(self, module: str) -> Path | None:
        """Where a top-level module lies, without importing it; a single file's folder for a plain module."""
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        places = list(spec.submodule_search_locations or [])
        return Path(places[0] if places else Path(spec.origin or ".").parent)

    def command(self, name: str) -> str | None:
        """Path of a program."""
        return shutil.which(name)

    def gpus(self) -> list[str] | None:
        """A line for each NVIDIA GPU; None where there is no driver that answers."""
        program = self.command("nvidia-smi")
        if program is None:
            return None
        query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return [line.strip() for line in answer.stdout.splitlines() if line.strip()]

    def cores(self) -> int:
        """CPU cores that this process may use."""
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def requirements(self) -> list[str] | None:
        """What this package asks for, as `name==version; extra == ...`; None where it is not installed."""
        try:
            return importlib.metadata.requires("esolm-megatron") or []
        except importlib.metadata.PackageNotFoundError:
            return None


def report(machine: Machine | None = None) -> list[Finding]:
    """Everything that was found, in the order to read it."""
    machine = machine or Machine()
    findings = [_python(machine), *_packages(machine), *_devices(machine), *_optional(machine), _slurm(machine)]
    return findings


def exit_status(findings: Sequence[Finding]) -> int:
    """0, or 1 where a finding is an error."""
    return int(any(finding.level == "error" for finding in findings))


def _python(machine: Machine) -> Finding:
    found = f"{'.'.join(map(str, machine.python))} on {platform.system()} {platform.machine()}"
    if (3, 11) <= machine.python[:2] <= (3, 12):
        return Finding("python", "ok", found)
    return Finding("python", "error", found, "use Python 3.11 or 3.12: megatron-core 0.16.1 has no wheel for others")


_USES = {
    "torch": "nothing runs",
    "megatron-core": "no training; sampling, evaluation of an exported model and conversion still work",
    "deepspeed": "no training; sampling, evaluation of an exported model and conversion still work",
    "webdataset": "shards are written and read without it; its tests and other readers of the shards are missing",
    "wandb": "log.wandb must stay off; metrics.jsonl is written in any case",
    "matplotlib": "no loss.png",
    "tiktoken": "esolm data prepare tokenizes with the tokenizers library, several times slower; equal tokens",
}
"""What is missing without a package; packages that are not named here are needed by everything."""

_FOR_TRAINING = ("megatron-core", "deepspeed")
_ADVISORY = ("webdataset", "wandb", "matplotlib", "tiktoken")


def _packages(machine: Machine) -> list[Finding]:
    requirements = machine.requirements()
    if requirements is None:
        advice = "run `pip install -e .[train]` in its folder: without that, versions cannot be checked"
        return [Finding("esolm-megatron", "warning", "not installed", advice)]
    out = []
    for line in requirements:
        name, wanted, extra = _parsed(line)
        if name != "esolm-megatron" and extra in ("", "train"):
            out.append(_package(machine, name, wanted, extra))
    if version := machine.version("transformers"):
        out.append(Finding("transformers", "ok", version))
    else:
        advice = "only needed to compare an exported model with other libraries: pip install transformers"
        out.append(Finding("transformers", "note", "not installed", advice))
    return out


def _parsed(requirement: str) -> tuple[str, str, str]:
    """`deepspeed==0.19.8; extra == "train"` -> ("deepspeed", "==0.19.8", "train")."""
    head, _, marker = requirement.partition(";")
    name = re.match(r"[A-Za-z0-9._-]+", head.strip())
    assert name is not None, requirement
    extra = re.search(r"""extra\s*==\s*["']([\w-]+)""", marker)
    return name[0].lower(), head.strip()[name.end() :].strip(" ()"), extra[1] if extra else ""


def _package(machine: Machine, name: str, wanted: str, extra: str) -> Finding:
    fix = f'pip install "{name}{wanted}"'
    version, cost = machine.version(name), _USES.get(name, "nothing runs")
    serious: Level = "warning" if name in _ADVISORY else "error"
    if version is None:
        level: Level = "note" if extra and name not in _FOR_TRAINING else "warning" if extra else "error"
        return Finding(name, level, "not installed", f"{cost}: {fix}")
    if _satisfies(version, wanted):
        return Finding(name, "ok", version)
    why = (
        "the parallel code was checked with that version alone; others may differ in silence"
        if extra
        else "too old or too new"
    )
    return Finding(name, serious, version, f"needs {name}{wanted} ({why}): {fix}")


def _satisfies(version: str, wanted: str) -> bool:
    """Whether `version` meets comma-separated ==, >=, < clauses; what comes after the numbers (+cpu, rc1) is ignored."""
    have = _numbers(version)
    for clause in filter(None, (part.strip() for part in wanted.split(","))):
        sign = re.match(r"[<>=!~]+", clause)
        assert sign is not None, clause
        other = _numbers(clause[sign.end() :])
        width = max(len(have), len(other))
        a, b = (x + (0,) * (width - len(x)) for x in (have, other))
        if not {"==": a == b, ">=": a >= b, "<=": a <= b, "<": a < b, ">": a > b}.get(sign[0], True):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"\s*(\d+(?:\.\d+)*)", version)
    return tuple(map(int, release[1].split("."))) if release else ()


def _devices(machine: Machine) -> list[Finding]:
    out = [Finding("CPU", "ok", f"{machine.cores()} cores for this process")]
    gpus, torch = machine.gpus(), machine.version("torch")
    if not gpus:
        advice = "runs go over gloo on the CPU: right for tests and small models, far too slow for large ones"
        return [*out, Finding("GPU", "note", "none", advice)]
    out += [Finding(f"GPU {i}", "ok", line) for i, line in enumerate(gpus)]
    if torch is not None and torch.endswith("+cpu"):
        advice = "this build of torch cannot use the GPU: install the CUDA build of torch"
        out.append(Finding("torch's build", "error", torch, advice))
    return out


def _optional(machine: Machine) -> list[Finding]:
    return [_flash_attention(machine), _apex(machine), _transformer_engine(machine)]


def _flash_attention(machine: Machine) -> Finding:
    version = machine.version("flash-attn") or machine.version("flash-attn-4")
    if version is not None and machine.folder("flash_attn") is not None:
        return Finding("flash-attn", "ok", version)
    advice = (
        "nothing breaks: attention uses the flash kernels inside torch; what is lost is the newest kernels for Hopper and "
        "Blackwell. Build it after torch with `pip install --no-build-isolation flash-attn`"
    )
    return Finding("flash-attn", "note", "not installed", advice)


_APEX_SOURCE = "build it from NVIDIA's source repository; the package called apex on the package index is not NVIDIA's"


def _apex(machine: Machine) -> Finding:
    """NVIDIA's has apex/normalization and the compiled module amp_C; the index's `apex` is a web toolkit."""
    folder, version = machine.folder("apex"), machine.version("apex")
    if folder is None and version is None:
        advice = f"torch's products add weight gradients up in its place: perhaps slower, equal results. {_APEX_SOURCE}"
        return Finding("NVIDIA Apex", "note", "not installed", advice)
    nvidia = folder is not None and (folder / "normalization").exists()
    if not nvidia:
        advice = f"run `pip uninstall apex`: this is a web toolkit that only shares the name; {_APEX_SOURCE}"
        return Finding(
            "NVIDIA Apex", "warning", f"a foreign package called apex, {version or 'of unknown version'}", advice
        )
    if machine.folder("amp_C") is None:
        advice = "its compiled parts (amp_C) are missing, so megatron-core will not use it; build it with --cpp_ext --cuda_ext"
        return Finding("NVIDIA Apex", "warning", f"{version or 'found'}, Python parts only", advice)
    return Finding("NVIDIA Apex", "ok", version or "found")


def _transformer_engine(machine: Machine) -> Finding:
    folder = machine.folder("transformer_engine")
    if folder is None:
        advice = (
            "nothing breaks: fp8 (train.fp8) is torchao's, norms are torch's. train.kernels.linears and norms may name it (te) "
            "once it is built: `pip install --no-build-isolation transformer-engine[pytorch]`"
        )
        return Finding("Transformer Engine", "note", "not installed", advice)
    version = machine.version("transformer-engine") or "found"
    if machine.folder("transformer_engine_torch") is None:
        advice = "its part for torch is missing, so it is unusable: pip install --no-build-isolation transformer-engine[pytorch]"
        return Finding("Transformer Engine", "warning", version, advice)
    return Finding("Transformer Engine", "ok", version)


def _slurm(machine: Machine) -> Finding:
    found = {name: machine.command(name) for name in ("sbatch", "srun")}
    missing = [name for name, path in found.items() if path is None]
    if not missing:
        return Finding("SLURM", "ok", ", ".join(str(path) for path in found.values()))
    if len(missing) == 1:
        return Finding("SLURM", "warning", f"{missing[0]} is not on PATH", "load the cluster's SLURM module")
    return Finding(
        "SLURM", "note", "sbatch and srun are not on PATH", "no jobs from here; start processes with torchrun"
    )


def as_table(findings: Sequence[Finding]) -> Table:
    """For a terminal."""
    table = Table(title="esolm doctor", title_justify="left")
    for heading in ("", "what", "found", "advice"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        cells = (finding.subject, finding.found, finding.advice)
        table.add_row(Text(finding.level, _COLOURS[finding.level]), *map(Text, cells))
    return table


def as_dict(findings: Sequence[Finding]) -> dict[str, Any]:
    """For JSON: the worst level, the exit status, and every finding."""
    worst = max((f.level for f in findings), key=list(_COLOURS).index, default="ok")
    return {"worst": worst, "exit_status": exit_status(findings), "findings": [asdict(f) for f in findings]}
