"""The lm-evaluation-harness's own runner on tasks of local files, against scores and samples of our own."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import yaml
from parity import random_model

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.end_to_end

CHOICES = [
    {"question": "The sky is", "choices": [" blue", " a fish", " green"], "answer": 0},
    {"question": "Two and two is ", "choices": ["five", "four"], "answer": 1},
    {"question": "", "choices": ["Yes, it is", "No"], "answer": 1},
]
LONG = "A text of some words that is longer than the row of the model, so that windows must slide over it."
TEXTS = [{"text": LONG}, {"text": "b"}]
PROMPTS = [
    {"prompt": "def f(", "target": "x"},
    {"prompt": "import", "target": " os"},
    {"prompt": "def g(", "target": "y"},
]
TASKS = {
    "choice": (CHOICES, {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
                         "doc_to_target": "answer", "target_delimiter": "",
                         "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}),
    "rolling": (TEXTS, {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                        "metric_list": [{"metric": "byte_perplexity"}, {"metric": "word_perplexity"}]}),
    "writing": (PROMPTS, {"output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{target}}",
                          "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 8},
                          "metric_list": [{"metric": "exact_match"}]}),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    from esolm_megatron.data.tokenizer import load_tokenizer
    from esolm_megatron.model.pretrained import save_model

    top = tmp_path_factory.mktemp("harness")
    model = random_model(torch.float32, spread=0.6, vocab_size=258, seq_length=32)
    load_tokenizer("bytes").save(top / "tokenizer")
    save_model(top / "model", model.shape, 0.5, model.named_parameters(), tokenizer_folder=top / "tokenizer")
    (top / "tasks").mkdir()
    for name, (rows, fields) in TASKS.items():
        (top / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"data_files": {"test": str(top / f"{name}.jsonl")}}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **fields}
        (top / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return top


def run(place, tasks, *more, extra=""):
    command = [
        sys.executable, "-m", "esolm_megatron", "lm-eval", "run", "--model", "esolm", "--tasks", tasks, "--include_path",
        place / "tasks", "--model_args", f"pretrained={place / 'model'},dtype=fp64{extra}", "--output_path", place / "out",
        "--log_samples", *more,
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "home")}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = sorted(place.glob("out/**/results_*.json"))[-1:]
    samples = {}
    for task in tasks.split(","):
        (file,) = sorted(place.glob(f"out/**/samples_{task}_*.jsonl"))[-1:]
        samples[task] = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda x: x["doc_id"])
    return json.loads(results.read_text())["results"], samples


@pytest.fixture(scope="module")
def ours(place):
    from esolm_megatron import load_pretrained

    return load_pretrained(place / "model", torch.float64)


@pytest.fixture(scope="module")
def found(place):
    return run(place, "choice,rolling,writing", "--batch_size", "2")


def scored(model, prompt, text, **options):
    from esolm_megatron.inference.scoring import score

    tokenizer = model.tokenizer
    given, ids = tokenizer.encode_pair(prompt, text) if prompt else ([tokenizer.eos_id], tokenizer.encode(text))
    return score(model, ids, given, **options)


def test_multiple_choice_is_what_score_says(found, ours):
    results, samples = found
    right = 0
    for row, sample in zip(CHOICES, samples["choice"], strict=True):
        bare = row["question"].rstrip()
        texts = [row["question"][len(bare) :] + choice for choice in row["choices"]]
        mine = [scored(ours, bare, text, orders=1, kind="left_to_right").log_p[0] for text in texts]
        theirs = [float(answer[0][0]) for answer in sample["resps"]]
        assert theirs == pytest.approx(mine, abs=1e-6)
        right += mine.index(max(mine)) == row["answer"]
    assert results["choice"]["acc,none"] == pytest.approx(right / 3)


def test_rolling_windows_count_each_token_once(found, ours):
    results, samples = found
    eos, total, size = ours.tokenizer.eos_id, 0.0, 0
    for row, sample in zip(TEXTS, samples["rolling"], strict=True):
        ids, width, log_p = [eos, *ours.tokenizer.encode(row["text"])], 31, 0.0
        at = 1
        while at < len(
            ids
        ):  # the harness's windows: whole ones, and the last one with as much context as there is room for
            end = min(at + width, len(ids))
            first = 0 if at == 1 else max(end - width - 1, 0)
            context = ids[first:at] if at + width > len(ids) and at > 1 else ids[at - 1 : at]
            order = torch.arange(len(context) + end - at)[None]
            tokens = torch.tensor([[*context, *ids[at:end]]])
            log_p += ours.log_likelihood(tokens, order, order >= len(context)).item()
            at = end
        assert float(sample["resps"][0][0]) == pytest.approx(log_p, abs=1e-6)
        total, size = total + log_p, size + len(row["text"].encode())
    assert results["rolling"]["byte_perplexity,none"] == pytest.approx(math.exp(-total / size), rel=1e-6)


def test_texts_are_the_sampler_s_and_end_at_stops(found, ours):
    _, samples = found
    for number, (row, sample) in enumerate(zip(PROMPTS, samples["writing"], strict=True)):
        prompt = torch.tensor([ours.tokenizer.encode(row["prompt"])])
        made = ours.sample(
            1, prompt.shape[1] + 8, prompt=prompt, temperature=0.0, stop_id=ours.tokenizer.eos_id, first_row=number
        )[0][0]
        ids = made[prompt.shape[1] :].tolist()
        ids = ids[: ids.index(ours.tokenizer.eos_id)] if ours.tokenizer.eos_id in ids else ids
        text = ours.tokenizer.decode_later(ids)
        assert sample["resps"][0][0] == text.partition("\n")[0].partition("e")[0]


def test_random_orders_are_averaged(place, ours):
    _, samples = run(place, "choice", extra=",orders=64,alpha_0=1.0")
    answer = samples["choice"][0]["resps"][0][0]
    mine = scored(ours, "The sky is", " blue", orders=256, kind="random")
    left = scored(ours, "The sky is", " blue", orders=1, kind="left_to_right").log_p[0]
    assert float(answer[0]) == pytest.approx(mine.importance_weighted, abs=0.5)
    assert abs(float(answer[0]) - left) > 1e-3


def test_bad_words_are_refused(place):
    for extra, said in (("orders=-1", "orders = -1"), ("pretrained=nowhere", "nowhere")):
        words = f"pretrained={place / 'model'},{extra}"
        command = [sys.executable, "-m", "esolm_megatron", "lm-eval", "run", "--model", "esolm", "--tasks", "choice",
                   "--include_path", str(place / "tasks"), "--model_args", words]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert said in done.stderr
