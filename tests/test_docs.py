"""What the documentation says can be done: its commands run, its links lead somewhere, its names exist.

The commands of docs/quickstart.md, then those of the other files, run from top to bottom in one temporary folder that looks
like the repository, made cheap by the words in `SMALLER`. A command that is not run must be in `NOT_RUN`, with the reason.
"""

import ast
import importlib.util
import io
import os
import re
import shlex
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
from ranks import CONTEXT

from esolm_megatron.cli import parser
from esolm_megatron.config import Config, Section, load, world_problems

ROOT = Path(__file__).parent.parent
FIRST = ROOT / "docs" / "quickstart.md"
PAGES = [FIRST, ROOT / "README.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if p != FIRST)]

INSTALLS = "installs packages"
GPUS = "needs GPUs; its configuration is checked"
NOT_RUN = {
    "bash tools/quickstart.sh": "minutes of training; its stages are run here one by one",
    "bash tools/quickstart.sh --runs runs/longer train.num_steps=2000": "minutes of training",
    "bash tools/test.sh": "runs these tests",
    "pip install torch": INSTALLS,
    **dict.fromkeys(
        [
            "bash tools/gpu_check.sh",
            "bash tools/gpu_check.sh tests train",
            "bash tools/gpu_check.sh step sample --bars",
            "bash tools/gpu_check.sh --wheels wheels",
        ],
        "needs a GPU; tests/test_gpu_check.py runs it on a CPU",
    ),
    "esolm lm-eval run --model esolm --model_args pretrained=runs/quickstart/model --tasks TASK --include_path FOLDER": (
        "tests/inference/test_harness.py runs it on tasks of its own"
    ),
    "esolm plan check configs/debug/tiny_tp2_pp2.yaml --gpus 32": "a minute; tests/simulation runs it on fewer ranks",
    "python tools/study.py runs/study --scale medium --parts scaling": "an hour; tests/test_study.py runs the smallest",
    "python tools/study.py runs/study --scale medium": "hours; tests/test_study.py runs the smallest",
    "bash tools/gpu_check.sh --device cpu --size tiny": "tests/test_gpu_check.py runs it",
    "pip install -e '.[train]'": INSTALLS,
    "pip install -e '.[train,slurm]'": INSTALLS,
    **dict.fromkeys(
        [
            'sinfo -o "%R %D %l %c %m %G"',
            "scontrol show partition",
            "srun --partition gpu --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 bash -c 'hostname; nvidia-smi -L | wc -l'",
            "esolm launch configs/debug/tiny.yaml --on slurm/clusters/debug.yaml train.micro_batch_size=4 --dry-run",
            "esolm launch configs/debug/tiny.yaml --on slurm/clusters/debug.yaml train.micro_batch_size=4",
            "esolm launch configs/scale/7b.yaml --on slurm/clusters/example.yaml data.path=runs/data/mine/tokens",
            "esolm jobs runs --watch",
            "esolm jobs runs",
            "esolm jobs logs runs/NAME",
            "esolm jobs stop runs/NAME",
            "esolm jobs requeue runs/NAME",
        ],
        "needs SLURM; tests/slurm runs each kind of it",
    ),
    "pip install -e '.[serve]'": INSTALLS,
    "pip install -e '.[eval]'": INSTALLS,
    "esolm serve runs/quickstart/model port=8000 rows=16": "runs until a signal; tests/inference/test_serve.py starts one",
    "esolm convert reference.ckpt imported --from reference num_heads=12 length=1024": (
        "needs a checkpoint of the reference; tests/conversion makes and imports one"
    ),
    "esolm convert llama runs/from_llama --from transformers length=1024": (
        "needs a checkpoint of another project; tests/conversion makes and imports such"
    ),
    "torchrun --nproc-per-node 8 -m esolm_megatron train configs/paper/124m_alpha1.yaml data.path=runs/data/mine/tokens "
    "model.vocab_size=null": GPUS,
}  # fmt: skip

SMALLER = {
    "data corpus": "max_bytes=300000",
    "data train-tokenizer": "vocab_size=600",
    "data prepare": "num_processes=1 validation_fraction=0.2",
    "train": (
        "model.num_layers=2 model.hidden_size=32 model.num_heads=2 model.num_kv_heads=null model.seq_length=64 "
        "train.num_steps=2 train.global_batch_size=4 train.micro_batch_size=4 train.precision=fp32 train.device=cpu "
        "optim.schedule=constant optim.warmup_steps=0 evaluate.num_sequences=3"
    ),
    "eval": "num_sequences=3 orders=2",
    "sample": "num_samples=1",
}
"""Words added to a command of that verb, and of that action of `data`. `--processes` is left out: it is checked, not run."""


class Command(NamedTuple):
    page: str
    text: str
    expected: tuple[str, ...] | None
    """Lines that a command which fails must say; None for one that must work."""

    @property
    def words(self):
        return shlex.split(self.text, comments=True)

    @property
    def esolm_words(self):
        """Arguments of the command line, also where torchrun or srun starts it; None for another program."""
        words = self.words
        for start in ("esolm", "esolm_megatron"):
            if start in words:
                return words[words.index(start) + 1 :]
        return None

    @property
    def num_processes(self):
        words, count = self.words, 1
        for flag in ("--processes", "--gpus", "--nnodes", "--nproc-per-node"):
            count *= int(words[words.index(flag) + 1]) if flag in words else 1
        return count

    @property
    def small_words(self):
        words = list(self.esolm_words)
        if "--processes" in words and words[0] == "train":
            place = words.index("--processes")
            del words[place : place + 2]
        name = " ".join(words[:2]) if words[0] == "data" else words[0]
        if any(word.startswith("what=") for word in words):  # small as it is
            return words
        return words if self.expected else [*words, *SMALLER.get(name, "").split()]


def blocks(page, language):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def commands_of(page):
    name = page.relative_to(ROOT).as_posix()
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if shlex.split(line, comments=True):
                yield Command(name, line.strip(), None)
    for block in blocks(page, "console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            first, *rest = part.splitlines()
            yield Command(name, first.strip(), tuple(rest))


COMMANDS = [command for page in PAGES for command in commands_of(page)]
RUN = [command for command in COMMANDS if command.text not in NOT_RUN]
PYTHON = [(page.relative_to(ROOT).as_posix(), block) for page in PAGES for block in blocks(page, "python")]


def test_the_pages_have_commands():
    assert {page.name for page in PAGES} >= {"README.md", "quickstart.md", "method.md", "decisions.md", "benchmarks.md"}
    assert sum(c.expected is None for c in RUN) > 15
    assert sum(c.expected is not None for c in RUN) > 4
    assert PYTHON


def test_a_command_is_run_or_says_why_not():
    for command in RUN:
        assert command.words[0] == "esolm", f"{command.page}: {command.text}\n  neither run nor in NOT_RUN"
    assert set(NOT_RUN) == {c.text for c in COMMANDS} - {c.text for c in RUN}, "an entry of NOT_RUN is in no page"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.esolm_words], ids=lambda c: f"{c.page}: {c.text}")
def test_a_command_is_grammar_and_its_run_fits_its_processes(command):
    args, rest = parser().parse_known_args(command.esolm_words)
    assert all("=" in word and not word.startswith("-") for word in rest)
    if args.verb in ("train", "plan") and command.expected is None and getattr(args, "on", None) is None:
        path, *words = [args.path, *args.overrides, *rest]
        if path in ("search", "check"):  # which look for the layout, or simulate some ranks of it
            assert load(ROOT / words[0], words[1:])
            return
        config = load(ROOT / path, words)
        assert world_problems(config, command.num_processes, config.train.device) == []


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.esolm_words], ids=lambda c: c.text)
def test_scripts_and_fields_of_other_commands_exist(command):
    for word in command.words[1:]:
        if word.endswith(".sh"):
            assert (ROOT / word).is_file()
        elif re.match(r"\w+\.\w+=", word):
            assert word.partition("=")[0] in FIELDS


def in_child(file, folder, words, code):
    """Run a command line, or Python code, in a folder; its status and all it says go to `file`."""
    out, status = io.StringIO(), 0
    os.chdir(folder)
    with redirect_stdout(out), redirect_stderr(out):
        try:
            if code:
                exec(compile(code, "documentation", "exec"), {"__name__": "__main__"})
            else:
                from esolm_megatron.cli import main

                status = main(words)
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            import traceback

            out.write(traceback.format_exc())
            status = -1
    Path(file).write_text(f"{status}\n{out.getvalue()}")
    os._exit(0)  # what training started outlives it


def said(folder, file, words=(), code=""):
    """(status, output) of a command line or of Python code, run in a process that has torch imported already."""
    process = CONTEXT.Process(target=in_child, args=(str(file), str(folder), list(words), code))
    process.start()
    process.join(30)
    if process.is_alive():
        process.kill()
    if not file.exists():
        return -1, "it hung or died"
    status, _, text = file.read_text().partition("\n")
    return int(status), text


@pytest.fixture(scope="session")
def walk(tmp_path_factory):
    """The temporary repository, and (status, output) of each command in it, in the order of the pages."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("configs", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "esolm_megatron", folder / "my_text", ignore=shutil.ignore_patterns("__pycache__"))
    outputs = tmp_path_factory.mktemp("outputs")
    answers = {}
    for number, command in enumerate(RUN):
        answers[command] = said(folder, outputs / str(number), command.small_words)
    return folder, answers


@pytest.mark.end_to_end
@pytest.mark.parametrize("command", RUN, ids=lambda c: f"{c.page}: {c.text}")
def test_a_command_does_what_its_page_says(walk, command):
    status, text = walk[1][command]
    if command.expected is None:
        assert status == 0, text
        return
    assert status in (1, 2), text
    one_line = " ".join(text.split())
    for line in command.expected:
        assert " ".join(line.split()) in one_line, text


@pytest.mark.end_to_end
@pytest.mark.parametrize(("page", "code"), PYTHON, ids=lambda x: x[:20])
def test_python_in_a_page_runs(walk, tmp_path, page, code):
    status, text = said(walk[0], tmp_path / "said", code=code)
    assert status == 0, text


@pytest.mark.end_to_end
def test_the_folders_in_the_readme_are_those_that_the_commands_leave(walk):
    (tree,) = [block for block in blocks(ROOT / "README.md", "") if block.startswith("runs/")]
    assert {"model/", "metrics.jsonl", "checkpoints/step_*/"} <= set(tree.split())
    at = {}
    for line in tree.splitlines():
        indent, names = len(line) - len(line.lstrip()), re.split(r" {3,}", line.strip())[0].split()
        at = {k: v for k, v in at.items() if k < indent}
        parent = at[max(at)] if at else walk[0]
        for name in names:
            if name not in ("samples.txt", "summary.json"):  # written by tools/quickstart.py itself
                assert list(parent.glob(name.rstrip("/"))), f"{parent / name} is not there"
        at[indent] = parent / names[0].rstrip("/")


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_quickstart_runs_what_its_page_walks_through(tmp_path, monkeypatch):
    class Enough(Exception):
        pass

    def stop(*args, **kwargs):
        raise Enough

    quickstart, found = tool("quickstart"), []
    monkeypatch.setattr(quickstart.Stages, "run", lambda self, name, *words, **options: found.append(list(words)))
    monkeypatch.setattr(quickstart, "write_samples", stop)
    monkeypatch.setattr(sys, "argv", ["quickstart.py"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Enough):
        quickstart.main()
    documented = [sorted(w.replace("\\n", "\n") for w in c.words[1:]) for c in commands_of(FIRST) if c.expected is None]
    found = [sorted(words) for words in found]
    assert len(found) >= 8
    assert [words for words in documented if words in found] == found


LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_files_and_headings():
    checked = 0
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        for link in LINK.findall(page.read_text()):
            if link.startswith("https://"):
                continue
            path, _, heading = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not heading or heading in anchors(target), f"{page.name}: {link}"
            checked += 1
    assert checked > 10


def names_in(path):
    """Functions and classes of a module, methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            found |= {f"{node.name}.{x.name}" for x in ast.walk(node) if isinstance(x, ast.FunctionDef)}
    return found


def test_named_functions_exist():
    named = [
        (page, file, name)
        for page in PAGES
        for file, name in re.findall(r"`([\w/]+\.py):([\w.]+)`", page.read_text())
    ]  # fmt: skip
    assert len(named) > 40
    for page, file, name in named:
        path = next((p for p in (ROOT / "esolm_megatron" / file, ROOT / file) if p.is_file()), None)
        assert path is not None, f"{page.name}: {file}"
        assert name in names_in(path), f"{page.name}: {file}:{name}"


def test_named_files_exist():
    files = {
        (page, name)
        for page in [*PAGES, ROOT / "CHANGELOG.md"]
        for name in re.findall(r"`((?:\w+/)+\w+\.(?:py|sh|yaml|md))[:`]", page.read_text())
    }
    assert len(files) > 10
    for page, name in files:
        assert (ROOT / name).is_file() or (ROOT / "esolm_megatron" / name).is_file(), f"{page.name}: {name}"


SECTIONS = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
FIELDS = {f"{name}.{field}" for name, section in SECTIONS.items() for field in section.model_fields}
FILES = ("py", "yaml", "json", "jsonl", "safetensors", "md", "png")


def test_named_fields_exist():
    named = [
        (page, f"{section}.{field}")
        for page in [*PAGES, ROOT / "CHANGELOG.md"]
        for section, field in re.findall(r"`(\w+)\.(\w+)(?:=[^`]*)?`", page.read_text())
        if section in SECTIONS and field not in FILES
    ]
    assert len(named) > 8
    for page, name in named:
        assert name in FIELDS, f"{page.name}: {name}"


def test_the_picture_shows_what_the_code_does(tmp_path):
    from PIL import Image

    drawing = tool("draw_method")
    assert drawing.PICTURE.stat().st_size < 200_000
    drawn = drawing.facts()
    with Image.open(drawing.PICTURE) as picture:
        assert picture.info.get(drawing.FACTS) == drawing.digest(drawn), "run python tools/draw_method.py again"
    assert drawn["diffusion"]["sees"] == [[int(j <= i) for j in range(6)] for i in range(6)]
    strict = [[int(j < drawing.LENGTH - drawing.CAPACITY + i) for j in range(6)] for i in range(drawing.CAPACITY)]
    assert [row[:6] for row in drawn["sequential"]["sees"][6:]] == strict
    drawing.draw(tmp_path / "again.png")
    assert (tmp_path / "again.png").stat().st_size > 50_000


def test_names_that_pages_gave_before_the_rooms_still_import():
    from esolm_megatron import inference, load_pretrained, sample, score
    from esolm_megatron.data.corpus import write_corpus
    from esolm_megatron.inference import scoring

    assert (sample.Sampler, sample.sample, score.score) == (inference.Sampler, inference.sample, scoring.score)
    assert callable(load_pretrained)
    assert callable(write_corpus)
