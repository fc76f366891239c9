"""Every extra, in an environment that has nothing else: what the docs promise with it works, and what needs more names it.

For each row of the table a new virtual environment gets the wheel of this checkout with that extra, and the commands run in
another folder, with another HOME. torch, which all of them need, is installed once and its files are hard links in the others
(the same files as an installation's; a minute and 700 MB less for each). Rows for other Pythons than this one are slow.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path

import pytest
import torch
from conversion.test_export import BASE, make_run
from parity import random_model

from checkpoints_conversion import hub
from esolm_megatron.config.tree import ModelConfig
from esolm_megatron.data.tokenizer import load_tokenizer
from esolm_megatron.errors import EXTRAS
from esolm_megatron.model.pretrained import save_model

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TORCH = "torch==2.13.0"

SMALL = (
    "model.num_layers=1 model.hidden_size=16 model.num_heads=2 model.seq_length=32 model.vocab_size=null "
    "train.num_steps=2 train.global_batch_size=8 train.micro_batch_size=2 train.precision=fp32 train.device=cpu "
    "optim.warmup_steps=0 data.path=tokens runs_dir=runs name=small evaluate.num_sequences=4 evaluate.every_steps=1"
)
BUCKET = f"data mix run.yaml {SMALL} data.path=s3://bucket/tokens data.cache_dir=cache data.retries=0 data.timeout_s=5"
PREPARE = "data prepare prepare.yaml output={} tokenizer=bytes validation_fraction=0.3 num_processes=1 inputs=[{}]"
README = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
MAUVE = """
import random
from esolm_megatron.evaluation.generation import mauve_of
ours, theirs = ([[random.random() for _ in range(4)] for _ in range(40)] for _ in range(2))
assert 0 <= mauve_of(ours, theirs) <= 1
"""
TRANSFORMERS = """
import torch, esolm_megatron.huggingface
from transformers import AutoModelForMaskedLM, AutoTokenizer
model, tokenizer = AutoModelForMaskedLM.from_pretrained("model"), AutoTokenizer.from_pretrained("model")
ids = tokenizer("Some", return_tensors="pt").input_ids
assert model(ids).logits.shape == (1, 4, model.config.vocab)
"""

TASK = """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: few.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
"""
LOW = "model.num_layers=3 train.precision=bf16 train.fp8=tensorwise"

PROMISED = {
    "": [
        "--version", "--help", "plan run.yaml --processes 2 --device H100", "doctor",
        "data corpus corpus max_bytes=60000", "data train-tokenizer corpus output=learnt vocab_size=300",
        PREPARE.format("again", "text*.txt"), PREPARE.format("lines", "lines.jsonl"), PREPARE.format("packed", "lines.jsonl.gz"),
        "data verify again", "data show again", f"data mix run.yaml {SMALL}",
        "convert run out", "convert out --check", "convert out back --to training", "convert out theirs --to reference",
        "convert llama imported --from transformers length=16",
        "eval out data=tokens num_sequences=2 orders=1", "sample out num_samples=1 length=16 steps=2 --html page.html",
        "sample out length=16 schedule=first_hitting propose=2", "score out prompt=a text=b", "python",
    ],
    "train": [f"train run.yaml {SMALL}", f"train run.yaml --processes 2 {SMALL} name=two", "convert runs/small out",
              f"launch run.yaml --on cluster.yaml --local {SMALL} name=launched", "jobs runs", "sample out length=8 steps=2"],
    "data": [PREPARE.format("p", "lines.parquet"), PREPARE.format("z", "lines.jsonl.zst"), PREPARE.format("h", "hf://saved"),
             f"data mix run.yaml plot=mix.png {SMALL}", "data verify tokens plot=tokens.png"],
    "fp8": [f"train run.yaml {SMALL} {LOW} name=low"],
    "hf": ["transformers"],
    "mauve": ["transformers", "mauve"],
    "eval": ["lm-eval run --model esolm --model_args pretrained=model --device cpu --tasks rolling --include_path tasks"],
    "serve": ["serve"],
    "s3": ["s3"],
    "slurm": [f"launch run.yaml --on cluster.yaml --dry-run {SMALL}"],
    "dev": [],
}  # fmt: skip
"""Extra ("" for none) -> words of `esolm`, or the name of a program below. dev is what these tests themselves run in."""

REFUSED = {
    f"train run.yaml {SMALL}": "train",
    f"train run.yaml --processes 2 {SMALL}": "train",
    f"train run.yaml {SMALL} {LOW}": "fp8",
    PREPARE.format("p", "lines.parquet"): "data",
    PREPARE.format("z", "lines.jsonl.zst"): "data",
    PREPARE.format("h", "hf://saved"): "data",
    "data verify tokens plot=tokens.png": "data",
    f"data mix run.yaml plot=mix.png {SMALL}": "data",
    "data prepare prepare.yaml output=o tokenizer=older inputs=[text.txt]": "hf",
    "serve model port=0": "serve",
    "lm-eval ls tasks": "eval",
    "eval model what=generation num_sequences=1 judge=model reference=text.txt": "mauve",
    "eval model data=tokens out=o": "data",
    "compare model older out=o": "data",
    "plan run.yaml --plot plan.png": "data",
    BUCKET: "s3",
    f"launch run.yaml --on cluster.yaml --dry-run {SMALL}": "slurm",
}
"""What needs more than nothing -> the extra that it must name."""


def test_every_extra_has_a_row_and_every_row_an_extra():
    assert set(PROMISED) == {"", *PROJECT["optional-dependencies"]}
    assert set(EXTRAS) | {"", "dev"} == set(PROMISED)
    assert set(REFUSED.values()) == set(EXTRAS)
    for extra, packages in EXTRAS.items():
        declared = {re.split(r"[\[>=<;]", line)[0] for line in PROJECT["optional-dependencies"][extra]}
        names = {"megatron": "megatron-core", "prometheus_client": "prometheus-client", "lm_eval": "lm-eval"}
        names |= {"mauve": "mauve-text"}
        assert {names.get(package, package) for package in packages} <= declared, extra
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    named = {
        x
        for p in pages
        for found in re.findall(r"(?:esolm-megatron|'\.)\[([\w,]+)\]", p.read_text())
        for x in found.split(",")
    }
    assert named <= set(PROMISED)
    assert named >= {"train", "data", "hf", "serve", "s3", "slurm"}


def pythons():
    """This one, and others from 3.11 to 3.12 that are found."""
    here = f"3.{sys.version_info.minor}"
    yield pytest.param(sys.executable, id=here)
    for version in {"3.11", "3.12"} - {here}:
        found = shutil.which(f"python{version}")
        if found and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
            yield pytest.param(found, id=version, marks=pytest.mark.slow)


def run(command, **options):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)


def installed(python, *words):
    """Run pip for an environment; where no index answers, the test cannot be made."""
    done = run([sys.executable, "-m", "pip", "--python", python, "install", "-q", *words], timeout=1500)
    if done.returncode and re.search(r"Could not find a version|Temporary failure|Connection|timed out", done.stderr):
        if os.environ.get("CI"):
            pytest.fail(done.stderr[-2000:])
        pytest.skip(f"no package index: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module", params=pythons())
def base(request, tmp_path_factory):
    """A Python of an environment that has torch and nothing else, and the wheel of this checkout."""
    folder = tmp_path_factory.mktemp("base")
    source = folder / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__", "docs", "tests")
    )
    done = run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source], timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = folder.glob("esolm_megatron-*.whl")
    python = new_environment(request.param, folder / "venv")
    installed(python, TORCH)
    yield python, wheel
    shutil.rmtree(folder)  # gigabytes, which pytest would keep for three runs


def new_environment(python, folder):
    done = run([python, "-m", "venv", "--without-pip", folder])
    assert done.returncode == 0, done.stderr
    return folder / "bin" / "python"


def packages_of(python):
    (found,) = python.parents[1].glob("lib/python*/site-packages")
    return found


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """What the commands are given: text in several forms, tokens, a run, models."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    folder = tmp_path_factory.mktemp("material")
    text = "\n\n".join(p.read_text() for p in sorted((ROOT / "docs").glob("*.md"))[:4])
    (folder / "text.txt").write_text(text)
    for number in range(20):  # a text file is one document, and one alone could fall to either split
        (folder / f"text{number}.txt").write_text("\n\n".join(text.split("\n\n")[number::20]))
    documents = [{"text": part} for part in text.split("\n\n") if part]
    lines = "".join(json.dumps(x) + "\n" for x in documents).encode()
    (folder / "lines.jsonl").write_bytes(lines)
    import gzip

    (folder / "lines.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "lines.jsonl.zst").write_bytes(zstandard.compress(lines))
    pq.write_table(pa.Table.from_pylist(documents), folder / "lines.parquet")
    datasets.Dataset.from_list(documents).save_to_disk(folder / "saved")
    (folder / "prepare.yaml").write_text("seed: 1\n")
    shutil.copy(ROOT / "configs/debug/tiny.yaml", folder / "run.yaml")
    shutil.copy(ROOT / "slurm/clusters/debug.yaml", folder / "cluster.yaml")
    (folder / "few.jsonl").write_bytes(b"".join(lines.splitlines(keepends=True)[:4]))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "rolling.yaml").write_text(TASK)
    (folder / "older").mkdir()
    (folder / "older" / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    make_run(folder / "run", vocab_size=258)
    shape = BASE | {"vocab_size": 258, "seq_length": 64}
    config = ModelConfig.model_validate(shape)
    load_tokenizer("bytes").save(folder / "run" / "tokenizer")
    save_model(
        folder / "model", config, 0.5, random_model(torch.float32, **shape).named_parameters(),
        tokenizer_folder=folder / "run" / "tokenizer", extra=hub.files(config, 0.5, {}, folder / "run" / "tokenizer"),
        extra_config=hub.config_fields(config),
    )  # fmt: skip
    write_llama(folder / "llama")
    return folder


def write_llama(folder):
    import transformers

    shape = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).save_pretrained(folder)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Place:
    """A folder of its own, where a row's commands run."""

    def __init__(self, folder, python, material):
        shutil.copytree(material, folder)
        self.folder, self.python = folder, python
        (folder / "home").mkdir()
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "ESOLM", "TRITON", "XDG"))
        }
        self.environment = kept | {"HOME": str(folder / "home"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self.environment["PATH"] = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        self.esolm = python.parent / "esolm"

    def run(self, *command, **options):
        return run(command, cwd=self.folder, env=self.environment, timeout=300, **options)

    def check(self, promise):
        if promise == "python":
            done = self.run(self.python, "-c", README.replace("runs/quickstart/model", "model"))
        elif promise == "transformers":
            done = self.run(self.python, "-c", TRANSFORMERS)
        elif promise == "mauve":
            done = self.run(self.python, "-c", MAUVE)
        elif promise == "serve":
            return self.check_server()
        elif promise == "s3":
            return self.check_bucket()
        else:
            done = self.run(self.esolm, *promise.split())
        assert done.returncode == 0, f"esolm {promise}\n{done.stderr[-2500:]}{done.stdout[-500:]}"
        assert "Traceback" not in done.stderr, done.stderr[-2500:]

    def check_bucket(self):
        """A bucket that is not there: what is wrong is the network, not the environment."""
        settings = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}
        self.environment |= settings | {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        done = self.run(self.esolm, *BUCKET.split())
        assert done.returncode in (1, 2)
        assert "s3fs" not in done.stderr
        assert "Traceback" not in done.stderr, done.stderr

    def check_server(self):
        port = free_port()
        words = [self.esolm, "serve", "model", f"port={port}"]
        server = subprocess.Popen(
            list(map(str, words)), cwd=self.folder, env=self.environment, stderr=subprocess.PIPE, text=True
        )
        try:
            body = json.dumps({"prompt": "a", "max_tokens": 4}).encode()
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
            )
            for _ in range(240):
                try:
                    answer = json.load(urllib.request.urlopen(request, timeout=30))
                    break
                except OSError:
                    assert server.poll() is None, server.stderr.read()
                    time.sleep(0.25)
            assert len(answer["choices"]) == 1
        finally:
            server.terminate()
            server.wait(20)
            server.stderr.close()


@pytest.mark.end_to_end
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("extra", [extra for extra in PROMISED if extra != "dev"], ids=lambda extra: extra or "none")
def test_an_environment_with_this_extra_alone_keeps_its_promises(base, material, tmp_path, extra, request):
    python, wheel = base
    request.addfinalizer(lambda: shutil.rmtree(tmp_path / "venv"))
    own = new_environment(python.resolve(), tmp_path / "venv")
    shutil.copytree(packages_of(python), packages_of(own), dirs_exist_ok=True, copy_function=os.link)
    installed(own, f"{wheel}[{extra}]" if extra else wheel)
    place = Place(tmp_path / "place", own, material)
    done = place.run(place.esolm, *PREPARE.format("tokens", "lines.jsonl").split())
    assert done.returncode == 0, done.stderr[-3000:]
    for promise in PROMISED[extra]:
        place.check(promise)
    if extra:
        return
    for words, needed in REFUSED.items():
        done = place.run(place.esolm, *words.split())
        assert done.returncode == 2, f"esolm {words}: {done.returncode}\n{done.stderr[-2000:]}"
        said = done.stderr.strip().splitlines()
        assert sum(f"esolm-megatron[{needed}]" in line for line in said) == 1, f"esolm {words}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        assert len(said) <= 2, f"esolm {words}\n{done.stderr}"  # a file's name may head it
