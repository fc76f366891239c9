"""The study at its smallest: every part leaves what it found, a killed one goes on, and estimators bound what they should."""

import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, str(ROOT / "tools" / "study.py")]


@pytest.mark.end_to_end
def test_a_killed_study_goes_on_and_every_part_is_there(tmp_path):
    folder = tmp_path / "study"
    words = [*COMMAND, str(folder), "--scale", "tiny", "--device", "cpu"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = folder / "table-AR-0.json"
    while process.poll() is None and not first.exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (folder / "results.json").exists()
    made = first.stat().st_mtime_ns
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert first.stat().st_mtime_ns == made, "what is there is not made again"
    found = json.loads((folder / "results.json").read_text())
    assert list(found["table"]) == ["AR", "Eso-LM 0.125", "Eso-LM 0.25", "Eso-LM 0.5", "Eso-LM 1", "MDLM"]
    assert all(len(seeds) == 2 and all(2 < x["nelbo"] < 7 for x in seeds) for seeds in found["table"].values())
    assert all(x["nelbo"] == pytest.approx(x["any_order"]) for x in found["table"]["AR"]), "exact"
    for alpha_0, toy in found["toy"].items():
        weighted = [toy[f"importance_weighted, K = {k}"] for k in (100, 10, 1)]
        assert toy["exact"] < weighted[0] < weighted[1] < weighted[2], alpha_0
        assert weighted[2] == pytest.approx(toy["any_order"], abs=0.02), "one order is any_order, on average"
    assert set(found["gradients"]) == {"elbo", "low_var", "any_order", "any_order_bounds", "curves"}
    masked, whole = found["gradients"]["curves"].values()
    assert all(3 < nats < 8 for curve in (masked, whole) for nats in curve["nats"]), "per predicted token"
    assert len(masked["nats"]) == 2 * len(whole["nats"]) == 12
    assert masked["tokens_fed"][-1] == whole["tokens_fed"][-1] == 12 * 8 * 16, "equal arithmetic"
    scaling = found["scaling"]
    assert [x["width"] for x in scaling["sizes"]] == [8, 12, 16, 24, 32]
    assert scaling["tokens"] == 12 * 8 * 16
    law = scaling["law"]
    wanted = law["floor"] + law["scale"] * scaling["sizes"][-1]["parameters"] ** -law["power"]
    assert scaling["predicted"] == pytest.approx(wanted)
    assert {x["kind"] for x in found["pareto"]} == {"AR", "Eso-LM 0.25", "Eso-LM 1", "MDLM"}
    assert {x["length"] for x in found["latency"]} == {16, 32, 64, 128}
    assert (folder / "results.png").stat().st_size > 10_000
    text = (folder / "results.md").read_text()
    assert text in done.stdout
    assert text.count("\n|") > 30
    other = subprocess.run([*words[:3], "--scale", "small"], capture_output=True, text=True, check=False)
    assert "holds a study of another scale" in other.stderr
    assert other.returncode == 1


def test_the_published_table_is_that_of_the_published_numbers():
    found = json.loads((ROOT / "docs" / "study" / "medium.json").read_text())["table"]
    text = (ROOT / "docs" / "results.md").read_text()
    for kind, seeds in found.items():
        values = [math.exp(x["nelbo"]) for x in seeds]
        assert f"| {kind} | {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} |" in text


def test_a_law_is_found_again():
    spec = importlib.util.spec_from_file_location("study", COMMAND[1])
    study = sys.modules["study"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    sizes = [1000, 3000, 10000, 40000]
    law = study.fitted_law(sizes, [1.25 + 30 * n**-0.4 for n in sizes])
    assert law["floor"] == pytest.approx(1.25, abs=0.01)
    assert law["power"] == pytest.approx(0.4, abs=0.005)
    flat = study.fitted_law(sizes, [5 * n**-0.1 for n in sizes])
    assert flat["floor"] >= 0
    assert flat["floor"] + flat["scale"] * 1e5 ** -flat["power"] == pytest.approx(5 * 10**-0.5, rel=0.01)
