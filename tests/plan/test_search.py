"""The search over layouts: it finds the fastest, says why the rest lost, and refuses where nothing fits."""

import json

import pytest
from rich.console import Console
from test_timing import CONFIGS, V

from esolm_megatron.cli import main
from esolm_megatron.config import ConfigError, dump, load
from esolm_megatron.plan import fastest_layouts, plan


def small(*words):
    return load(CONFIGS / "scale" / "7b.yaml", [V, "train.global_batch_size=64", *words])


def test_the_best_is_first_and_no_better_layout_is_missed():
    found = fastest_layouts(small(), 16)
    rates = [x.tokens_per_second for _, x in found.best]
    assert rates == sorted(rates, reverse=True)
    assert len(found.best) == 10
    for words, x in found.best:
        assert x.memory_per_rank < 0.9 * 80 * 2**30
        assert words["parallel.tensor_size"] <= 8
    mine = plan(small(), 16)
    assert rates[0] >= mine.tokens_per_second, "what the file has is among those tried"
    assert sum(found.lost.values()) + len(found.best) == found.tried
    assert {"do not fit", "slower"} <= found.lost.keys()
    again = [f"{name}={str(value).lower()}" for name, value in found.best[0][0].items()]
    again.append(f"parallel.sequence_parallel={str(found.best[0][0]['parallel.tensor_size'] > 1).lower()}")
    assert plan(small(*again), 16).tokens_per_second == pytest.approx(rates[0]), "its settings make it"


def test_where_nothing_fits_the_nearest_is_told():
    with pytest.raises(
        ConfigError, match=r"--gpus 1: no layout of eso-70b fits on H100; the nearest takes \d+ GiB a GPU"
    ):
        fastest_layouts(load(CONFIGS / "scale" / "70b.yaml", [V]), 1)


def test_the_command_line(tmp_path, capsys):
    path = str(CONFIGS / "scale" / "7b.yaml")
    assert (
        main(["plan", "search", path, V, "train.global_batch_size=64", "--gpus", "16", "--device", "H200", "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert (found["gpus"], found["device"], len(found["best"])) == (16, "H200", 10)
    assert main(["plan", "search", path, V]) == 2
    assert "plan search: takes --gpus N" in capsys.readouterr().err
    assert main(["plan", "search"]) == 2
    assert "give the run's YAML file" in capsys.readouterr().err
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(
        "partition: gpu\nnodes: 8\ngpus_per_node: 8\ngpu: H200\ntime_h: 24\nfabric:\n  network_gbytes: 25\n"
    )
    assert main(["plan", path, V, "--on", str(cluster), "--plot", str(tmp_path / "plan.png"), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["device"], planned["topology"]["world_size"]) == ("H200", 64)
    assert planned["times"]["step"] > 0
    assert "spans" not in planned["times"]
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    for words, said in (
        (["--plot", "x.pdf"], "must end in .png"),
        (["--plot", "x.png", "--mfu", "0.4"], "leave --mfu out"),
    ):
        assert main(["plan", path, V, *words]) == 2
        assert said in capsys.readouterr().err


def test_a_law_predicts_the_loss(tmp_path, capsys):
    law = {
        "scaling": {
            "law": {"floor": 1.5, "scale": 100.0, "power": 0.3},
            "tokens": 10**6,
            "sizes": [{"parameters": 1000}, {"parameters": 5000}],
        }
    }
    (tmp_path / "law.json").write_text(json.dumps(law))
    path = str(CONFIGS / "scale" / "7b.yaml")
    assert main(["plan", path, V, "--law", str(tmp_path / "law.json"), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    blocks = 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128)
    assert planned["loss"] == pytest.approx(1.5 + 100 * blocks**-0.3)
    (tmp_path / "law.json").write_text("{}")
    assert main(["plan", path, V, "--law", str(tmp_path / "law.json")]) == 2
    assert "is no file of tools/study.py" in capsys.readouterr().err
    assert main(["plan", path, V, "--law", str(tmp_path / "none.json")]) == 2


def test_what_is_shown_fits_a_terminal():
    console = Console(width=80, record=True)
    found = fastest_layouts(small(), 16)
    console.print(found)
    text = console.export_text()
    assert f"{found.best[0][1].tokens_per_second:,.0f}" in text, "nothing is cut at 80 columns"
    assert "layouts on 16 x H100" in text
    assert "do not fit" in text


def test_the_fastest_layout_is_written_as_a_configuration(tmp_path, capsys):
    """From another folder, with what it was searched with; and nothing is overwritten."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "run.yaml").write_text(dump(small()))
    command = ["plan", "search", str(tmp_path / "run.yaml"), "optim.lr=1e-4", "name=mine", "--gpus", "16", "--json"]
    command += ["--write", str(tmp_path / "recipes" / "run_16.yaml")]
    assert main(command) == 0
    (best, *_) = json.loads(capsys.readouterr().out)["best"]
    config = load(tmp_path / "recipes" / "run_16.yaml")
    assert config.optim.lr == 1e-4
    assert config.name == "mine-16"
    for name, value in best["settings"].items():
        section, field = name.split(".")
        assert getattr(getattr(config, section), field) == value
    assert plan(config, 16).tokens_per_second == best["tokens_per_second"]
    before = (tmp_path / "recipes" / "run_16.yaml").read_bytes()
    assert main(command) == 2
    assert "it is there; name another file" in capsys.readouterr().err
    assert (tmp_path / "recipes" / "run_16.yaml").read_bytes() == before
    command[-1] = str(tmp_path / "nowhere" / "run.yaml")
    assert main(command) == 2
    assert f"--write {command[-1]}: its folder is not there" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "run.yaml"), "--write", "x.yaml"]) == 2
    assert "it is for plan search" in capsys.readouterr().err
