"""The tool that kills a run finds nothing lost; the published table comes from it, with more kills."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "chaos.py"
KINDS = {"one rank", "all", "save", "load", "full disk", "shard server"}


@pytest.mark.slow
@pytest.mark.parametrize("layouts", [[], ["--layouts"]], ids=["one layout", "several layouts"])
def test_one_trouble_of_each_kind(tmp_path, layouts):
    out = tmp_path / "chaos"
    done = subprocess.run(
        [sys.executable, str(TOOL), "--kills", "6", "--out", str(out), *layouts],
        check=False, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    assert {t["kind"] for t in report["troubles"]} == KINDS
    assert report["difference"] == 0 or layouts
    assert report["losses_first"] < 1e-5
    assert "| shard server | 1 |" in (out / "table.md").read_text()
