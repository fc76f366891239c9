"""The whole path through the command line: text, shards, TP x PP x ZeRO training, export, bounds, text again; and bad input."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from esolm_megatron import load_pretrained
from esolm_megatron.cli import main
from esolm_megatron.config import ConfigError
from esolm_megatron.data.tokenizer import load_tokenizer
from esolm_megatron.inference import parse_infill

pytestmark = pytest.mark.end_to_end
SOURCE = Path(__file__).parents[1] / "esolm_megatron"
RUN = {
    "name": "small",
    "model": {
        "num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "seq_length": 64, "norm": "rmsnorm",
        "activation": "swiglu", "mlp_bias": False, "output_bias": False, "tied_embeddings": True, "qk_norm": True,
    },
    "objective": {"alpha_0": 0.25},
    "train": {
        "num_steps": 40, "global_batch_size": 8, "micro_batch_size": 4, "precision": "fp32", "log_every_steps": 5,
        "device": "cpu",
    },
    "optim": {"lr": 1e-2, "warmup_steps": 4, "ema_decay": 0.8},
    "parallel": {"tensor_size": 2, "pipeline_size": 2, "sequence_parallel": True},
    "evaluate": {"every_steps": 20, "num_sequences": 8},
    "log": {"wandb": "offline"},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with tokenizer, tokens, a run on 4 processes and its export."""
    top = tmp_path_factory.mktemp("cli")
    (top / "prepare.yaml").write_text(yaml.safe_dump({"inputs": [str(SOURCE)], "output": str(top / "tokens")}))
    options = [f"tokenizer={top}/tokenizer", "validation_fraction=0.2", "block_tokens=4096", "num_processes=1"]
    assert main(["data", "train-tokenizer", str(SOURCE), f"output={top}/tokenizer", "vocab_size=400"]) == 0
    assert main(["data", "prepare", str(top / "prepare.yaml"), *options]) == 0
    (top / "run.yaml").write_text(yaml.safe_dump(RUN | {"runs_dir": str(top), "data": {"path": str(top / "tokens")}}))
    train(top)
    assert main(["convert", str(top / "small"), str(top / "model")]) == 0
    return top


def train(top, *words):
    command = [sys.executable, "-m", "esolm_megatron", "train", str(top / "run.yaml"), "--processes", "4", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def answer(capsys, *words):
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_training_learns_and_reports(folder):
    lines = [json.loads(x) for x in (folder / "small" / "metrics.jsonl").read_text().splitlines()]
    losses = [x["loss"] for x in lines if "loss" in x]
    assert losses[-1] < losses[0] - 1
    assert all(x["tokens_per_s"] > 0 and 0 < x["mfu"] < 1 for x in lines if "loss" in x)


def test_evaluation_agrees_with_training(folder, capsys):
    found = answer(capsys, "eval", folder / "model", f"data={folder}/tokens", "num_sequences=8", "orders=3")
    lines = [json.loads(x) for x in (folder / "small" / "metrics.jsonl").read_text().splitlines()]
    trained = [x["validation_nelbo"] for x in lines if "validation_nelbo" in x][-1]
    nelbo = found["nelbo"]
    assert abs(nelbo["nats_per_token"] - trained) < 5 * nelbo["standard_error"] + 0.05
    assert found["importance_weighted"]["nats_per_token"] <= found["any_order"]["nats_per_token"]
    assert found["unigram_entropy"] > 3


def test_texts_are_evaluated_as_they_are(folder, tmp_path, capsys):
    """A line is scored as `esolm score` scores it; bytes and words count, and the field may be named."""
    texts = ["def one(x):", "été = 1"]
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    found = answer(capsys, "eval", folder / "model", f"text={lines}", "text_field=body", "orders=1")
    scores = [
        answer(capsys, "score", folder / "model", f"text={text}", "kind=left_to_right")["texts"][0] for text in texts
    ]
    nats = -sum(sum(score["log_p"]) / len(score["log_p"]) for score in scores)
    left = found["left_to_right"]
    assert found["num_tokens"] == sum(score["num_tokens"] for score in scores)
    assert left["nats_per_token"] * found["num_tokens"] == pytest.approx(nats, rel=1e-5)
    assert left["bits_per_byte"] == pytest.approx(nats / np.log(2) / len("".join(texts).encode()), rel=1e-5)
    assert left["word_perplexity"] == pytest.approx(np.exp(nats / 5), rel=1e-4)
    whole = gzip.compress("".join(json.dumps({"text": str(i) * 99}) + "\n" for i in range(9999)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    for verb in (
        ("eval", f"text={tmp_path}/cut.jsonl.gz", "num_sequences=99999"),
        ("score", f"file={tmp_path}/cut.jsonl.gz"),
    ):
        assert main([verb[0], str(folder / "model"), *verb[1:]]) == 2
        assert "cut.jsonl.gz': cannot be read to its end" in capsys.readouterr().err
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    for verb, name in (("eval", "text"), ("score", "file")):
        words = [verb, str(folder / "model"), f"{name}={tmp_path}/latin.txt"]
        assert main(words) == 2
        assert "set encoding" in capsys.readouterr().err
        assert main([*words, "encoding=latin-1"]) == 0
        assert main([*words, "encoding=latin-99"]) == 2
        assert "encoding = 'latin-99': unknown encoding" in capsys.readouterr().err
    lines.write_text(json.dumps({"body": 3}) + "\n")
    assert main(["eval", str(folder / "model"), f"text={lines}", "text_field=body"]) == 2
    assert "body" in capsys.readouterr().err


def test_a_run_is_judged_as_its_export_is(folder, capsys):
    words = (f"data={folder}/tokens", "num_sequences=9", "batch_size=4", "orders=2")
    theirs = answer(capsys, "eval", folder / "model", *words)
    assert list((folder / "small" / "checkpoints").iterdir())
    for run in (folder / "small", f"{folder}/small@40"):
        mine = answer(capsys, "eval", run, *words)
        assert mine.pop("model") == str(run)
        assert mine == {k: v for k, v in theirs.items() if k != "model"}
    command = [
        sys.executable,
        "-m",
        "esolm_megatron",
        "eval",
        str(folder / "small"),
        *words,
        "--processes",
        "2",
        "--json",
    ]
    shared = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert shared == theirs | {"model": str(folder / "small")}, "by the name that was given"
    again = answer(capsys, "eval", folder / "model", *words, "alpha_0=0")
    assert again["nelbo"]["nats_per_token"] == pytest.approx(theirs["left_to_right"]["nats_per_token"], rel=1e-6)


def test_processes_share_an_evaluation_and_a_killed_one_goes_on(folder, tmp_path, capsys):
    words = [f"data={folder}/tokens", "num_sequences=24", "batch_size=1", "orders=40", f"out={tmp_path}/out"]
    theirs = answer(capsys, "eval", folder / "model", *words[:-1])
    command = [
        sys.executable,
        "-m",
        "esolm_megatron",
        "eval",
        str(folder / "model"),
        *words,
        "--processes",
        "2",
        "--json",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = tmp_path / "out" / "parts"
    while process.poll() is None and len(list(parts.glob("*.json"))) < 5:
        time.sleep(0.02)
    process.kill()
    process.wait()
    time.sleep(0.5)  # until the kernel has killed its ranks
    done = {p: p.stat().st_mtime_ns for p in parts.glob("*.json")}
    assert 5 <= len(done) < 24
    assert not (tmp_path / "out" / "report.json").exists()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and len(children.read_text().split()) < 2:
        time.sleep(0.02)
    os.kill(int(children.read_text().split()[1]), signal.SIGKILL)
    assert "esolm eval: process 1 was killed by signal 9; the same command goes on" in process.communicate()[1]
    assert process.returncode == 137
    assert {p: p.stat().st_mtime_ns for p in done} == done
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert {p: p.stat().st_mtime_ns for p in done} == done, "what was done is not done again"
    assert json.loads(again.stdout) == theirs == json.loads((tmp_path / "out" / "report.json").read_text())
    assert (tmp_path / "out" / "perplexity.png").stat().st_size > 10_000
    assert main(["eval", str(folder / "model"), *words, "seed=5"]) == 2
    assert "holds an evaluation with seed = 0, now 5" in capsys.readouterr().err


def test_written_texts_are_judged(folder, tmp_path, capsys):
    words = [
        "what=generation",
        "num_sequences=6",
        "batch_size=4",
        "seq_length=32",
        "steps=[4,32]",
        f"out={tmp_path}/out",
    ]
    found = answer(capsys, "eval", folder / "model", *words, f"judge={folder}/model", "temperature=0.8")
    few, many = found["texts"]
    assert (few["steps"], many["steps"], few["num_samples"]) == (4, 32, 6)
    assert few["passes"] < many["passes"]
    assert all(
        1 < x["perplexity"] < 400 and 0 < x["entropy"] < 4 and x["tokens_per_second"] > 0 for x in found["texts"]
    )
    assert "left to right" in found["judge"]
    assert (tmp_path / "out" / "generation.png").stat().st_size > 10_000
    assert main(["eval", str(folder / "model"), *words[:-1]]) == 0
    assert "tokens/s" in capsys.readouterr().out, "and without a judge"


def test_questions_are_answered(folder, tmp_path, capsys):
    lines = [{"prompt": "import", "choices": [" os\n", " qzx"], "answer": 0}, {"choices": ["def", "fed"], "answer": 0}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = answer(capsys, "eval", folder / "model", "what=likelihood", f"questions={tmp_path}/q.jsonl")
    scored = answer(capsys, "score", folder / "model", r"text= os\n", "prompt=import", "kind=left_to_right")
    assert found["log_p"][0][0] == pytest.approx(scored["texts"][0]["importance_weighted"], abs=1e-5)
    assert found["accuracy"] == 1
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "import ", "choices": ["os"]}))
    assert main(["eval", str(folder / "model"), "what=likelihood", f"questions={tmp_path}/q.jsonl"]) == 2
    assert "questions, the 1. one: prompt and text: one token is" in capsys.readouterr().err


def test_models_and_runs_side_by_side(folder, tmp_path, capsys):
    assert main(["convert", str(folder / "small"), str(tmp_path / "last"), "weights=last"]) == 0
    words = [str(folder / "small"), str(tmp_path / "last")]
    fields = [f"data={folder}/tokens", "num_sequences=8", "orders=2", "samples=1", "length=16", f"out={tmp_path}/out"]
    found = answer(capsys, "compare", *words, *fields)
    assert found["models"] == words
    last = json.loads((folder / "small" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert found["losses"][words[0]]["step"] == last
    assert found["losses"][words[0]]["tokens"] == last * 8 * 64
    bounds = [found["perplexity"][word]["left_to_right"] for word in words]
    assert bounds[0] != bounds[1]
    whole = answer(capsys, "eval", tmp_path / "last", *fields[:3])
    assert bounds[1] == pytest.approx(whole["left_to_right"]["perplexity"], rel=1e-6)
    assert all(len(texts) == 1 for texts in found["texts"].values())
    model = load_pretrained(tmp_path / "last")
    assert found["texts"][words[1]] == [model.tokenizer.decode(model.sample(1, 16)[0][0].tolist())]
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"report.json", "loss.png", "perplexity.png"}
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "last").symlink_to(folder / "model")  # of the same name
    both = answer(
        capsys, "compare", tmp_path / "last", tmp_path / "copy" / "last", *fields[:-1], f"out={tmp_path}/both"
    )
    assert [x["left_to_right"] for x in both["perplexity"].values()] == pytest.approx(bounds[::-1])
    assert main(["compare", *words, "samples=0"]) == 0
    shown = capsys.readouterr().out
    assert "settings that differ" in shown
    other = yaml.safe_load((folder / "small" / "config.yaml").read_text())
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    other["optim"]["lr"] = 7e-3
    (tmp_path / "other" / "config.yaml").write_text(yaml.safe_dump(other))
    (tmp_path / "other" / "checkpoints").rmdir()
    (tmp_path / "other" / "checkpoints").symlink_to(folder / "small" / "checkpoints")
    found = answer(capsys, "compare", words[0], tmp_path / "other", "samples=0")
    assert found["differences"] == {"optim.lr": [0.01, 0.007]}


def test_samples_have_exact_log_probabilities(folder, capsys):
    made = answer(capsys, "sample", folder / "model", "num_samples=3", "prompt=def ", "alpha_0=0.5", "seed=4")
    model = load_pretrained(folder / "model", dtype=torch.float64)
    prompt = model.tokenizer.encode("def ")
    for sample in made["samples"]:
        assert sample["text"].startswith("def ")
        assert sample["tokens"][: len(prompt)] == prompt
    again = model.sample(3, 64, alpha_0=0.5, seed=4, prompt=torch.tensor(prompt), schedule="uniform")
    scored = torch.ones(3, 64, dtype=torch.bool)
    scored[:, : len(prompt)] = False
    exact = model.log_likelihood(again[0], again.order, scored=scored)
    assert torch.allclose(exact, again[1].sum(1), atol=1e-9)


def test_a_cache_of_8_bits_says_what_it_costs(folder, capsys):
    words = ("sample", folder / "model", "num_samples=2", "prompt=def ", "alpha_0=0.5", "stop=true", "cache=int8")
    lost = answer(capsys, *words)["int8_cache_nats_per_token"]
    assert 0 < abs(lost) < 0.05
    assert main([str(word) for word in words]) == 0
    assert f"keys and values in 8 bits: {lost:.2g} nats a token" in capsys.readouterr().err
    assert "int8_cache_nats_per_token" not in answer(capsys, *words[:-1])


def test_infilling_keeps_the_text_around_the_hole(folder, capsys):
    made = answer(capsys, "sample", folder / "model", "num_samples=2", r"infill=import os\n[[5]]\nimport sys\n")
    for sample in made["samples"]:
        assert sample["text"].startswith("import os\n")
        assert sample["text"].endswith("\nimport sys\n")
    assert made["num_forward_passes"] >= 5


def test_parse_infill():
    ids, positions, length = parse_infill("ab[[3]]c[[2]]", load_tokenizer("bytes"))
    assert (ids, positions, length) == ([97, 98, 99], [0, 1, 5], 8)
    with pytest.raises(ConfigError, match="no hole"):
        parse_infill("abc", load_tokenizer("bytes"))


def test_training_again_continues_the_same_wandb_run(folder):
    first = (folder / "small" / "wandb_id").read_text()
    train(folder, "train.num_steps=42")
    assert (folder / "small" / "wandb_id").read_text() == first
    logs = {p.name.split("-")[-1] for p in (folder / "small" / "wandb").glob("offline-run-*")}
    assert logs == {first}
    steps = [json.loads(x)["step"] for x in (folder / "small" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 42


def test_both_weights_convert_and_differ(folder, capsys):
    report = answer(capsys, "convert", folder / "small", folder / "last", "weights=last", "dtype=bf16", "step=40")
    assert report["step"] == 40
    assert 0 < report["max_difference"] < report["tolerance"], "bf16 rounds"
    ema, last = (load_pretrained(folder / name).model.state_dict() for name in ("model", "last"))
    assert not torch.equal(ema["final_norm.weight"], last["final_norm.weight"])


def test_a_fresh_process_can_load_without_megatron(folder):
    code = (
        "import sys\nfor name in ('megatron', 'deepspeed'): sys.modules[name] = None\n"
        "from esolm_megatron import load_pretrained\n"
        f"m = load_pretrained({str(folder / 'model')!r})\n"
        "t, p = m.sample(2, 16, steps=4)\nassert t.shape == p.shape == (2, 16)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_plan_and_doctor(capsys):
    plan = answer(capsys, "plan", "configs/scale/7b.yaml")
    assert 6e9 < plan["parameters"] < 8e9
    assert {"torch", "megatron-core", "GPU", "SLURM"} <= {x["subject"] for x in answer(capsys, "doctor")["findings"]}


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["plan", "nowhere.yaml"], 2, "nowhere.yaml: cannot be read"),
        (["train", "{run}", "optim.lr=-1", "model.num_headz=3"], 2, "did you mean model.num_heads"),
        (["train", "{run}", "data.path={top}/none"], 1, "none"),
        (["train", "{run}", "--processes", "3"], 2, "multiple of parallel.tensor_size x pipeline_size"),
        (["train", "{run}", "optim.lr=0.5", "--processes", "4"], 2, "optim.lr: was 0.01, now 0.5"),
        (["eval", "{top}/model"], 2, "data and text: give one of them"),
        (["eval", "{top}/model", "data={top}/tokens", "text=x.txt"], 2, "data and text: give one of them"),
        (["eval", "{top}/model", "data={top}/tokens", "text_field=body"], 2, "text_field = 'body': goes with text"),
        (["eval", "{top}/model", "text=-"], 2, "standard input is not read here"),
        (["eval", "{top}/model", "text={top}/nothing"], 2, "nothing': no file there that ends in"),
        (["eval", "{top}/tokens", "data={top}/tokens"], 2, "config.json"),
        (["eval", "{top}/small@7", "data={top}/tokens"], 1, "step_00000007"),
        (["eval", "{top}/model", "data={top}/tokens", "steps=[4]"], 2, "steps: has no meaning for what=perplexity"),
        (["eval", "{top}/model", "data={top}/tokens", "stride=4"], 2, "stride = 4: goes with text"),
        (["eval", "{top}/model", "data={top}/tokens", "orders=0"], 2, "orders = 0: must be at least 1"),
        (["eval", "{top}/model", "text={run}", "zero_shot=ptb", "stride=4"], 2, "zero_shot = 'ptb': has its own field"),
        (["eval", "{top}/model", "text={top}", "zero_shot=pbt"], 2, "zero_shot = 'pbt': must be one of wikitext2"),
        (["eval", "{top}/model", "what=generation", "steps=[0]"], 2, "steps = [0]: must be at least 1 each"),
        (["eval", "{top}/model", "what=generation", "judge={top}/x"], 2, "is no folder; download the model first"),
        (["eval", "{top}/model", "what=generation", "reference=x.txt"], 2, "give judge=FOLDER"),
        (["eval", "{top}/model", "what=generation", "judge={top}/model", "judge_length=99"], 2, "must be 2 to 64"),
        (
            ["eval", "{top}/model", "what=generation", "judge={top}/model", "reference={run}"],
            2,
            "needs a judge of transformers",
        ),
        (["eval", "{top}/model", "what=likelihood"], 2, "questions: give a .jsonl"),
        (["eval", "{top}/model", "what=likelihood", "questions={run}"], 2, "run.yaml', line 1:"),
        (["compare", "{top}/model"], 2, "give two or more different models or runs"),
        (["sample", "{top}/model", "top_q=0.5"], 2, "known here: device, dtype, weights, num_samples"),
        (["sample", "{top}/model", "prompt=a", "infill=b[[2]]"], 2, "give one of them"),
        (["sample", "{top}/model", "length=2", "prompt=import os.path as something"], 2, "length"),
        (["convert", "{top}/small", "{top}/model"], 2, "model"),
        (["convert", "{top}/tokens", "{top}/new"], 2, "no checkpoint"),
        (["convert", "{run}", "{top}/new", "--from", "reference"], 2, "run.yaml"),
        (["data", "prepare", "{top}/prepare.yaml", "inputs=[{top}/none]"], 2, "none"),
        (
            ["data", "prepare", "{top}/prepare.yaml", "block_tokens=8192", "tokenizer={top}/tokenizer"],
            2,
            "block_tokens",
        ),
        (["data", "show", "{top}/none"], 1, "prepare the data"),
    ],
)
def test_bad_input_is_refused_in_one_piece(folder, capsys, words, status, message):
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    words = [w.format(top=folder, run=folder / "run.yaml") for w in words]
    assert main(words) == status
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before, "nothing was written"


def test_shards_are_plain_webdataset(folder):
    import webdataset

    (shard, *_) = sorted(str(p) for p in (folder / "tokens" / "shards").glob("train*.tar"))
    sample = next(iter(webdataset.WebDataset(shard, shardshuffle=False).decode()))
    assert sample["tokens.npy"].dtype == np.uint16


def test_brackets_in_names_are_printed_as_they_are(folder, tmp_path, capsys):
    out = tmp_path / "m[/x] [red]"
    capsys.readouterr()
    assert main(["convert", str(folder / "small"), str(out)]) == 0
    assert "[/x] [red]" in capsys.readouterr().out.replace("\n", "")
    assert main(["plan", str(folder / "run.yaml"), "runs_dir=m[x]"]) == 0
    assert main(["sample", str(out), "length=8", "num_samples=1", "prompt=[/b]"]) == 0
    assert "[/b]" in capsys.readouterr().out
    assert main(["score", str(out), "text=[/b] and [x]"]) == 0
    assert "[/b] and [x]" in capsys.readouterr().out
    assert main(["train", str(folder / "run.yaml"), "data.path=n[/o]"]) == 1
    assert "n[/o]" in capsys.readouterr().err


def test_a_length_that_was_never_trained_is_said(folder, capsys):
    assert (
        main(["sample", str(folder / "model"), "length=70", "num_samples=2", "prompt=import", "alpha_0=1", "steps=3"])
        == 0
    )
    said = capsys.readouterr().err
    assert "warning: length = 70: positions from 64 on were never trained" in said
    total = 2 * (70 - len(load_pretrained(folder / "model").tokenizer.encode("import")))
    assert f"{total}/{total}" in said.replace(" ", "")
    assert main(["sample", str(folder / "model"), "length=8", "num_samples=1"]) == 0
    assert "warning" not in capsys.readouterr().err


def test_a_run_folder_has_one_writer(folder):
    """The second process is refused at once; a killed one's folder is taken over with a word."""
    words = [
        "name=twice",
        "parallel.tensor_size=1",
        "parallel.pipeline_size=1",
        "parallel.sequence_parallel=false",
        "log.wandb=off",
    ]
    command = [sys.executable, "-m", "esolm_megatron", "train", str(folder / "run.yaml"), *words]
    first = subprocess.Popen([*command, "train.num_steps=100000"], stderr=subprocess.DEVNULL)
    run = folder / "twice"
    try:
        end = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists():
            assert time.monotonic() < end
            time.sleep(0.1)
        before = sorted(p.name for p in run.iterdir())
        second = subprocess.run(
            [*command, "train.num_steps=5"], capture_output=True, text=True, check=False, timeout=60
        )
        assert second.returncode == 1
        assert re.search(
            rf"{run}: process {first.pid} on \S+ writes this run since \S+ \S+, with a sign of life", second.stderr
        )
        assert len(second.stderr.splitlines()) == 1
        assert sorted(p.name for p in run.iterdir()) == before
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    third = subprocess.run([*command, "train.num_steps=5"], capture_output=True, text=True, check=False, timeout=60)
    assert third.returncode == 0, third.stderr
    assert f"process {first.pid} on " in third.stderr
    assert "left this run without a word; taken over" in third.stderr
    assert not (run / "writer.json").exists()
    fourth = subprocess.run(
        [*command, "train.num_steps=7", "--change", "optim.lr=1e-3", "--processes", "1"],
        capture_output=True,
        check=False,
    )
    assert fourth.returncode == 0, fourth.stderr
    (line,) = (run / "changes.jsonl").read_text().splitlines()
    assert json.loads(line)["set"] == {"optim.lr": [1e-2, 1e-3]}
    assert [json.loads(x)["lr"] for x in (run / "metrics.jsonl").read_text().splitlines() if '"lr"' in x][-1] == 1e-3


def test_text_is_utf8_under_any_locale(folder, tmp_path):
    """Words, names of files and what is printed, where Python was told of ASCII."""
    (tmp_path / "été.txt").write_text("Straße 東京", encoding="utf-8")
    env = os.environ | {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = ["score", str(folder / "model"), "prompt=über", f"file={tmp_path}/été.txt", "orders=1", "--json"]
    command = [sys.executable, "-m", "esolm_megatron", *words]
    odd = subprocess.run(command, capture_output=True, env=env, check=False)
    assert odd.returncode == 0, odd.stderr
    assert odd.stderr.decode().splitlines()[0] == "esolm: the locale says ascii; text is UTF-8 here"
    plain = subprocess.run(command, capture_output=True, check=True)
    assert odd.stdout == plain.stdout
    assert json.loads(plain.stdout)["texts"][0]["text"] == "Straße 東京"
