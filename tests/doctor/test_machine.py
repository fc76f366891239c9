"""Findings on made-up machines, and on this one."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from rich.console import Console

from esolm_megatron.doctor import as_dict, as_table, exit_status, report
from esolm_megatron.doctor.machine import Finding, Machine

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TRAIN = [f'{line}; extra == "train"' for line in PROJECT["optional-dependencies"]["train"]]
DEV = [f'{line}; extra == "dev"' for line in PROJECT["optional-dependencies"]["dev"]]

INSTALLED = {
    "numpy": "2.1.0", "pydantic": "2.10.1", "pyyaml": "6.0.2", "rich": "13.9", "safetensors": "0.5.3", "xxhash": "3.5.0",
    "tokenizers": "0.21.0", "torch": "2.11.0+cu130", "megatron-core": "0.16.1", "deepspeed": "0.19.8",
    "webdataset": "1.0.2", "wandb": "0.20.0", "matplotlib": "3.10.0", "transformers": "5.0.0",
    "tiktoken": "0.9.0",
}  # fmt: skip


class MadeUp(Machine):
    def __init__(self, installed=(), folders=(), commands=(), gpus=None, python=(3, 12, 4), known=True, **versions):
        self.installed = {**INSTALLED, **{k.replace("_", "-"): v for k, v in versions.items()}, **dict(installed)}
        self.folders, self.commands, self._gpus = dict(folders), set(commands), gpus
        self.python, self.known = python, known

    def version(self, distribution):
        return self.installed.get(distribution)

    def folder(self, module):
        return self.folders.get(module)

    def command(self, name):
        return f"/usr/bin/{name}" if name in self.commands else None

    def gpus(self):
        return self._gpus

    def requirements(self):
        return PROJECT["dependencies"] + TRAIN + DEV if self.known else None


def one(machine, subject):
    (found,) = [finding for finding in report(machine) if finding.subject == subject]
    return found


def test_a_good_machine_has_no_warnings(tmp_path):
    (tmp_path / "normalization").mkdir()
    names = ("apex", "amp_C", "flash_attn", "transformer_engine", "transformer_engine_torch")
    machine = MadeUp(
        {"flash-attn": "2.8.3", "apex": "0.1", "transformer-engine": "2.9"},
        folders=dict.fromkeys(names, tmp_path),
        commands=("sbatch", "srun"),
        gpus=["H200, 143771 MiB, 580.1"],
    )
    findings = report(machine)
    assert {finding.level for finding in findings} == {"ok"}
    assert exit_status(findings) == 0
    assert not any(finding.advice for finding in findings)


@pytest.mark.parametrize(
    ("name", "version", "level", "fix"),
    [
        ("torch", "2.7.1", "error", 'pip install "torch>=2.10"'),
        ("torch", None, "error", 'pip install "torch>=2.10"'),
        ("megatron-core", "0.17.0", "error", 'pip install "megatron-core==0.16.1"'),
        ("megatron-core", "0.16.0", "error", 'pip install "megatron-core==0.16.1"'),
        ("megatron-core", None, "warning", "no training"),
        ("deepspeed", "0.19.9", "error", 'pip install "deepspeed==0.19.8"'),
        ("deepspeed", None, "warning", 'pip install "deepspeed==0.19.8"'),
        ("webdataset", "0.2.100", "warning", 'pip install "webdataset==1.0.2"'),
        ("pydantic", "3.0", "error", "pydantic>=2.7,<3"),
        ("wandb", None, "note", "metrics.jsonl"),
        ("transformers", None, "note", "pip install transformers"),
    ],
)
def test_a_wrong_or_missing_package_is_named_with_the_fix(name, version, level, fix):
    machine = MadeUp()
    machine.installed[name] = version
    found = one(machine, name)
    assert found.level == level
    assert fix in found.advice or fix.replace("pydantic", "") in found.advice
    assert exit_status(report(machine)) == (level == "error")


@pytest.mark.parametrize("version", ["2.10.0", "2.10", "2.10.1", "2.13.0+cpu", "2.14.0.dev20260101", "3.0"])
def test_versions_compare_as_numbers(version):
    assert one(MadeUp(torch=version), "torch").level == "ok"


def test_requirements_are_written_with_quotes_and_spaces_too():
    machine = MadeUp(deepspeed="0.18.0")
    machine.requirements = lambda: ["deepspeed (==0.19.8) ; extra == 'train'", "ruff>=0.8; extra == 'dev'"]
    assert one(machine, "deepspeed").level == "error"
    assert not [finding for finding in report(machine) if finding.subject == "ruff"]


@pytest.mark.parametrize("python", [(3, 10, 9), (3, 13, 0)])
def test_a_python_without_wheels_is_an_error(python):
    found = one(MadeUp(python=python), "python")
    assert found.level == "error"
    assert "3.11 or 3.12" in found.advice
    assert one(MadeUp(python=(3, 11, 0)), "python").level == "ok"


def test_not_being_installed_is_said():
    found = one(MadeUp(known=False), "esolm-megatron")
    assert (found.level, "pip install -e" in found.advice) == ("warning", True)


def test_the_web_toolkit_called_apex_is_unmasked(tmp_path):
    (tmp_path / "handlers").mkdir()
    found = one(MadeUp({"apex": "0.9.10dev"}, folders={"apex": tmp_path}), "NVIDIA Apex")
    assert found.level == "warning"
    assert "pip uninstall apex" in found.advice
    assert "not NVIDIA's" in found.advice
    # metadata alone, without the module
    assert one(MadeUp({"apex": "0.9.10dev"}), "NVIDIA Apex").level == "warning"


def test_an_apex_without_its_compiled_parts_is_unusable(tmp_path):
    (tmp_path / "normalization").mkdir()
    found = one(MadeUp({"apex": "0.1"}, folders={"apex": tmp_path}), "NVIDIA Apex")
    assert (found.level, "amp_C" in found.advice) == ("warning", True)


def test_a_missing_apex_warns_of_the_one_on_the_index():
    found = one(MadeUp(), "NVIDIA Apex")
    assert found.level == "note"
    assert "not NVIDIA's" in found.advice
    assert "pip install apex" not in found.advice


def test_every_missing_optional_part_says_what_it_costs():
    subjects = ("flash-attn", "NVIDIA Apex", "Transformer Engine", "SLURM", "GPU")
    for found in (one(MadeUp(), subject) for subject in subjects):
        assert found.level == "note", found
        assert len(found.advice) > 20, found


def test_half_a_transformer_engine_is_unusable(tmp_path):
    found = one(MadeUp({"transformer-engine": "2.9"}, folders={"transformer_engine": tmp_path}), "Transformer Engine")
    assert found.level == "warning"


@pytest.mark.parametrize(("commands", "level"), [(("sbatch", "srun"), "ok"), (("srun",), "warning"), ((), "note")])
def test_slurm_needs_both_programs(commands, level):
    assert one(MadeUp(commands=commands), "SLURM").level == level


def test_a_cpu_build_of_torch_beside_a_gpu_is_an_error():
    gpus = ["NVIDIA H200, 143771 MiB, 580.1", "NVIDIA H200, 143771 MiB, 580.1"]
    assert one(MadeUp(gpus=gpus), "GPU 1").found == gpus[1]
    assert one(MadeUp(gpus=gpus, torch="2.13.0+cpu"), "torch's build").level == "error"


def test_an_nvidia_smi_that_fails_is_no_gpu(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Machine().gpus() is None
    program.write_text("#!/bin/sh\necho 'A100, 81920 MiB, 570.1'\n")
    assert Machine().gpus() == ["A100, 81920 MiB, 570.1"]


def test_a_real_foreign_apex_is_found_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "apex-0.9.10.dist-info").mkdir()
    (tmp_path / "apex-0.9.10.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = one(Machine(), "NVIDIA Apex")
    assert (found.level, "0.9.10" in found.found) == ("warning", True)


def test_table_and_json_show_every_finding():
    findings = [Finding("a", "ok", "1"), Finding("b", "warning", "x[y]", "do [this]"), Finding("c", "note", "")]
    tree = json.loads(json.dumps(as_dict(findings)))
    assert (tree["worst"], tree["exit_status"], len(tree["findings"])) == ("warning", 0, 3)
    console = Console(width=100)
    with console.capture() as capture:
        console.print(as_table(findings))
    assert re.search(r"warning.*b.*x\[y\].*do \[this\]", capture.get())
    assert as_dict([*findings, Finding("d", "error", "")])["exit_status"] == 1


def test_it_runs_where_heavy_packages_cannot_be_imported(tmp_path):
    for name in ("torch", "megatron", "deepspeed", "transformers", "webdataset"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from esolm_megatron.doctor import report; print(len(report()))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert int(answer.stdout) > 15
