"""How good trained models are, one by one or beside each other: `esolm eval` and `esolm compare`."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from rich.markup import escape
from rich.progress import Progress, TextColumn
from rich.table import Table

from esolm_megatron.commands import Placed, options, show
from esolm_megatron.config import ConfigError
from esolm_megatron.errors import of_setting, require
from esolm_megatron.inference.request import Schedule
from esolm_megatron.terminal import Terminal


class TextOptions(Placed):
    """Which text is judged, and how."""

    data: str | None = None
    """Folder made by `esolm data prepare`; its validation split is used."""
    text: str | None = None
    """Text instead: a file (.txt, .jsonl, .parquet, ...), a folder or glob of them, or hf://; also told per word and per byte."""
    text_field: str = "text"
    """Field of `text` that holds the documents."""
    encoding: str = "utf-8"
    """Of files of `text` that are a document; all else is UTF-8."""
    zero_shot: str | None = None
    """`text` is this set of the reference, such as wikitext103 or ptb: its split, its field, made plain and joined as there."""
    num_sequences: int = Field(256, ge=1)
    """Sequences, from the start of the split or the text; generation: texts that are written."""
    seq_length: int | None = Field(None, ge=1)
    """Tokens in a sequence; null means the trained length."""
    stride: int | None = Field(None, ge=1)
    """Let windows over each document of `text` move on by so many tokens; those before are given. No nelbo then."""
    orders: int | None = Field(None, ge=0)
    """Orders drawn for each sequence, K of the importance-weighted bound; 4 by default, for questions 0 (left to right)."""
    alpha_0: float | None = Field(None, ge=0, le=1)
    """Share of tokens made by diffusion; null means the trained value."""
    batch_size: int = Field(8, ge=1)
    """Sequences in one pass."""
    seed: int = Field(0, ge=0)
    """Seed of noise, orders and texts."""
    out: str | None = None
    """Folder for report.json, pictures, and what is done so far: the same command goes on there after a kill."""


class EvalOptions(TextOptions):
    """Fields of `esolm eval`."""

    what: Literal["perplexity", "generation", "likelihood"] = "perplexity"
    """Bounds on given text; texts that it writes, judged; or how likely given answers to questions are."""
    steps: list[int] = Field([], description="generation: numbers of diffusion steps, [16,64]; by default one a token.")
    schedule: Schedule = "binomial"
    """generation: how many tokens each diffusion step makes."""
    temperature: float = Field(1.0, ge=0)
    """generation: sharpness of the draw."""
    top_p: float = Field(1.0, gt=0, le=1)
    """generation: nucleus that tokens are drawn from."""
    judge: str | None = None
    """generation: folder of the model that judges the texts: of `transformers`, or made by esolm convert."""
    judge_length: int | None = Field(None, ge=2)
    """generation: tokens that the judge sees at once; null means all it was trained with."""
    reference: str | None = None
    """generation: texts of people, as in `text`, as many as are written, to tell MAUVE (package mauve-text)."""
    questions: str | None = None
    """likelihood: a .jsonl of {"prompt": ..., "choices": [...], "answer": 0}."""


class CompareOptions(TextOptions):
    """Fields of `esolm compare`."""

    samples: int = Field(2, ge=0)
    """Texts that each model writes, of the same seeds; 0 for none."""
    length: int | None = Field(None, ge=1)
    """Tokens in each; null means the shortest trained length."""


_EVERY = {"what", "out", "num_sequences", "seq_length", "batch_size", "seed", *Placed.model_fields}
_USES = {
    "perplexity": {"data", "text", "text_field", "encoding", "zero_shot", "stride", "orders", "alpha_0", *_EVERY},
    "generation": {
        "steps",
        "schedule",
        "temperature",
        "top_p",
        "judge",
        "judge_length",
        "reference",
        "alpha_0",
        *_EVERY,
    },
    "likelihood": {"questions", "orders", *_EVERY} - {"seq_length", "num_sequences"},
}


@contextmanager
def model_folder(source: str) -> Iterator[Path]:
    """The inference folder that MODEL is, or RUN[@step] converted for as long as it is needed."""
    from checkpoints_conversion import export
    from esolm_megatron.checkpoint import Checkpoint, newest, step_folder

    path, at, step = source.rpartition("@")
    run, number = (Path(path), int(step)) if at and step.isdigit() else (Path(source), None)
    if (Path(source) / "config.json").is_file() or not (run / "checkpoints").is_dir():
        yield Path(source)
        return
    found = newest(run) if number is None else Checkpoint.open(step_folder(run, number))
    weights = "last" if found is not None and not list(found.names("ema")) else "ema"
    with tempfile.TemporaryDirectory() as folder:
        export.export_run(run, Path(folder) / "model", weights=weights, step=number)
        yield Path(folder) / "model"


def run_eval(args: argparse.Namespace) -> int:
    """What a model is worth, by one kind of number."""
    chosen = options(EvalOptions, args.overrides)
    unused = sorted(chosen.model_fields_set - _USES[chosen.what])
    if unused:
        raise ConfigError(
            f"{unused[0]}: has no meaning for what={chosen.what}; it takes {', '.join(sorted(_USES[chosen.what]))}"
        )
    if chosen.out is not None:  # before hours of work
        require(("matplotlib",), "out")
    with ExitStack() as stack:
        folder = stack.enter_context(model_folder(args.path))
        if (args.processes or 1) > 1 and "RANK" not in os.environ:
            from esolm_megatron.launch import run_local

            words = [word for word in args.overrides if not word.startswith("out=")]
            out = chosen.out or stack.enter_context(tempfile.TemporaryDirectory())
            words += [f"out={out}", *(["--json"] if args.json else [])]
            command = [sys.executable, "-m", "esolm_megatron", "eval", str(folder), *words]

            def failed(rank: int, code: int) -> None:
                after = (
                    "the same command goes on from what is done"
                    if chosen.out
                    else "with out=FOLDER, what is done is kept"
                )
                if code < 0:  # others have said why
                    print(f"esolm eval: process {rank} was killed by signal {-code}; {after}", file=sys.stderr)

            return run_local(command, args.processes, env={_ASKED: args.path}, on_failure=failed)
        kind = {"perplexity": _perplexity, "generation": _generation, "likelihood": _likelihood}[chosen.what]
        found = kind(chosen, folder, args.json)
        if found is None:
            return 0
        shown, tree, pictures = found
        tree = {"what": chosen.what, "model": os.environ.get(_ASKED, args.path), **tree}
        if chosen.out is not None:
            _leave(Path(chosen.out), tree, pictures)
        show(shown, lambda: tree, args.json)
    return 0


_ASKED = "ESOLM_EVALUATED"
"""In the environment of processes that share an evaluation: what the user named, where they are given its conversion."""
_Pictures = dict[str, Callable[[Path], None]]
"""Name -> what draws it there."""
_Found = tuple[Any, dict[str, Any], _Pictures]
"""What to show, the same as a tree for JSON, and pictures."""


def _leave(out: Path, tree: Mapping[str, Any], pictures: _Pictures) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    for name, draw in pictures.items():
        draw(out / name)


def _parts(job: Any, chosen: TextOptions, folder: Path, quiet: bool, **facts: str) -> Any:
    """All parts of a job, see `shares.shared`; None where another process tells the results. facts: that decide them."""
    from esolm_megatron.evaluation.shares import shared

    rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    settings = {
        **chosen.model_dump(exclude={"out", "device", "samples", "length"}),
        **facts,
        "weights": _weights_of(folder),
    }
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[speed]}", markup=False))
    with Progress(*columns, console=Terminal(stderr=True), transient=True, disable=quiet or rank > 0) as bar:
        task, begun, first = bar.add_task(f"{job.count} parts", total=job.count, speed=""), time.monotonic(), None

        def progress(done: int, count: int) -> None:
            nonlocal first
            first = done if first is None else first
            rate = (done - first) / count * job.tokens / max(time.monotonic() - begun, 1e-9)
            bar.update(task, completed=done, speed=f"{rate:.0f} tokens/s" if rate else "")

        out = None if chosen.out is None else Path(chosen.out)
        return shared(job, out, settings, rank=rank, size=size, progress=progress)


def _weights_of(folder: Path) -> dict[str, str]:
    """sha256 of the files of weights, by name: the same for every conversion of one checkpoint."""
    listed = json.loads((folder / "hashes.json").read_bytes()) if (folder / "hashes.json").is_file() else {}
    return {name: facts["sha256"] for name, facts in listed.items() if name.endswith(".safetensors")}


def _digest(*values: Any) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()


def _texts(name: str, setting: str, field: str = "text", encoding: str = "utf-8") -> Iterator[str]:
    from esolm_megatron.data.prepare.inputs import read_texts
    from esolm_megatron.data.prepare.text_field import TextField

    return read_texts(name, setting, TextField.of(field), encoding)


def _check_text(chosen: TextOptions) -> None:
    if (chosen.data is None) == (chosen.text is None):
        raise ConfigError("data and text: give one of them")
    for name in ("text_field", "encoding", "zero_shot", "stride"):
        if chosen.text is None and name in chosen.model_fields_set:
            raise ConfigError(f"{name} = {getattr(chosen, name)!r}: goes with text; prepared data has no documents")
    if chosen.zero_shot is not None and {"stride", "text_field", "encoding"} & chosen.model_fields_set:
        raise ConfigError(
            f"zero_shot = {chosen.zero_shot!r}: has its own field and rows; leave out stride, text_field and encoding"
        )
    if chosen.orders == 0:
        raise ConfigError("orders = 0: must be at least 1; left_to_right is told beside it")


def _bounds(chosen: TextOptions, folder: Path, quiet: bool) -> Any:
    """(evaluation, text rows or None, entropy of the tokens' frequencies); None where another process tells them."""
    import numpy as np

    from esolm_megatron.config import ObjectiveConfig
    from esolm_megatron.data.stream import ValidationSet
    from esolm_megatron.evaluation import TextRows, unigram_entropy, zero_shot
    from esolm_megatron.evaluation.bounds import Bounds, Rows
    from esolm_megatron.objective.esolm import document_numbers

    _check_text(chosen)
    texts = None
    if chosen.text is not None:
        texts = (
            zero_shot.documents(chosen.zero_shot, chosen.text)
            if chosen.zero_shot
            else _texts(chosen.text, "text", chosen.text_field, chosen.encoding)
        )
    model = chosen.load(str(folder), each=True)
    length, documents, whole = chosen.seq_length or model.config.seq_length, None, None
    if texts is not None:
        ends = model.tokenizer.eos_id if chosen.zero_shot else None
        whole = TextRows.of(
            texts, model.tokenizer.encode, length, chosen.num_sequences, stride=chosen.stride, ends=ends
        )
        some = slice(chosen.num_sequences)
        tokens, valid, scored = whole.tokens[some], whole.valid[some], whole.scored[some]
    else:
        with of_setting("data", chosen.data):
            data = ValidationSet(str(chosen.data), seq_length=length)
        rows = data.rows(np.arange(min(chosen.num_sequences, len(data))))
        tokens, valid, scored = rows.tokens, rows.valid, rows.valid
        documents = None if model.cross_document else document_numbers(rows.documents, rows.valid)
    alpha_0 = model.alpha_0 if chosen.alpha_0 is None else chosen.alpha_0
    all_rows = Rows.of([(tokens, valid)], model.config.mask_id, scored, documents)
    orders = 4 if chosen.orders is None else chosen.orders
    job = Bounds(model.model, all_rows, ObjectiveConfig(alpha_0=alpha_0), orders, chosen.seed, chosen.batch_size)
    parts = _parts(job, chosen, folder, quiet, rows=_digest(tokens.tobytes(), valid.tobytes(), scored.tobytes()))
    return None if parts is None else (job.result(parts), whole, unigram_entropy([(tokens, scored)]))


def _perplexity(chosen: EvalOptions, folder: Path, quiet: bool) -> _Found | None:
    from esolm_megatron.evaluation import report

    found = _bounds(chosen, folder, quiet)
    if found is None:
        return None
    evaluation, whole, unigram = found
    table = report.bounds_table(evaluation, whole)
    table.caption = f"{table.caption}\nentropy of the tokens' frequencies: {unigram:.3f} nats per token"
    tree = {**report.bounds_tree(evaluation, whole), "unigram_entropy": unigram}
    return table, tree, {"perplexity.png": partial(report.draw_bounds, {"model": evaluation})}


def _generation(chosen: EvalOptions, folder: Path, quiet: bool) -> _Found | None:
    from itertools import islice

    from esolm_megatron.evaluation import report
    from esolm_megatron.evaluation.generation import Generation
    from esolm_megatron.evaluation.judges import load_judge

    if any(count < 1 for count in chosen.steps):
        raise ConfigError(f"steps = {chosen.steps}: must be at least 1 each")
    if chosen.reference is not None and chosen.judge is None:
        raise ConfigError(
            "reference: MAUVE compares what the judge sees in both; give judge=FOLDER, a model of transformers"
        )
    if chosen.judge_length is not None and chosen.judge is None:
        raise ConfigError(f"judge_length = {chosen.judge_length}: goes with judge")
    if chosen.reference is not None:
        require(("mauve",), "reference")
    model = chosen.load(str(folder), each=True)
    judge = None if chosen.judge is None else load_judge(chosen.judge, chosen.judge_length, model.device)
    if judge is not None and chosen.reference is not None and not judge.sees:
        raise ConfigError(f"reference = {chosen.reference!r}: MAUVE needs a judge of transformers, found {judge.said}")
    people: list[str] = []
    if chosen.reference is not None:
        people = list(islice(_texts(chosen.reference, "reference"), chosen.num_sequences))
    length = chosen.seq_length or model.config.seq_length
    fields = {name: getattr(chosen, name) for name in ("alpha_0", "schedule", "temperature", "top_p", "seed")}
    job = Generation(
        model, judge, chosen.num_sequences, length, chosen.steps or [length], chosen.batch_size, fields, people
    )
    parts = _parts(job, chosen, folder, quiet, judge_is=judge.said if judge else "", people=_digest(people))
    if parts is None:
        return None
    written, said = job.result(parts), judge.said if judge else None
    tree = {"alpha_0": model.alpha_0 if chosen.alpha_0 is None else chosen.alpha_0, "length": length}
    pictures: _Pictures = {"generation.png": partial(report.draw_texts, {"model": written})}
    return report.texts_table(written, said), tree | report.texts_tree(written, said), pictures


def _likelihood(chosen: EvalOptions, folder: Path, quiet: bool) -> _Found | None:
    from esolm_megatron.evaluation import report
    from esolm_megatron.evaluation.choices import Choices, read_questions

    if chosen.questions is None:
        raise ConfigError("questions: give a .jsonl file of prompts and choices")
    questions = read_questions(chosen.questions)
    model = chosen.load(str(folder), each=True)
    job = Choices(model, questions, chosen.orders or 0, chosen.seed, chosen.batch_size)
    parts = _parts(job, chosen, folder, quiet, asked=_digest(questions))
    if parts is None:
        return None
    found = job.result(parts)
    return report.answers_table(found), asdict(found), {}


def run_compare(args: argparse.Namespace) -> int:
    """Several models or runs side by side: settings that differ, losses, bounds of one text, texts of the same seeds."""
    from esolm_megatron.evaluation import report

    words = [word for word in args.words if "=" not in word]
    chosen = options(CompareOptions, [word for word in args.words if "=" in word] + args.overrides)
    if len(words) < 2 or len(set(words)) < len(words):
        raise ConfigError(f"{' '.join(words)}: give two or more different models or runs")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("compare: is one process; start it by itself")
    if chosen.data is not None or chosen.text is not None:
        _check_text(chosen)
    if chosen.out is not None:
        require(("matplotlib",), "out")
    pictures: _Pictures = {}
    with ExitStack() as stack:
        folders = {word: stack.enter_context(model_folder(word)) for word in words}
        differences = _differences({word: _settings(word, folder) for word, folder in folders.items()})
        shown: list[Any] = [_side_by_side("settings that differ", words, differences)]
        losses = {word: found for word in words if (found := _losses(word))}
        ends = {word: {key: lines[-1].get(key) for key in ("step", "tokens", "loss")} for word, lines in losses.items()}
        if losses:
            pictures["loss.png"] = partial(report.draw_losses, losses)
        tree: dict[str, Any] = {"models": words, "differences": differences, "losses": ends}
        if chosen.data is not None or chosen.text is not None:
            evaluations = _bounds_of_each(chosen, folders, args.json)
            shown.append(_side_by_side("perplexity", words, _bound_cells(evaluations)))
            tree["perplexity"] = {w: {n: x.perplexity for n, x in e.estimates.items()} for w, e in evaluations.items()}
            pictures["perplexity.png"] = partial(report.draw_bounds, evaluations)
        tree["texts"] = _texts_of_each(chosen, folders) if chosen.samples else {}
    for number in range(chosen.samples):
        for word in words:
            shown.append(f"[bold]{escape(word)}, text {number}[/bold]\n{escape(tree['texts'][word][number])}\n")
    if chosen.out is not None:
        _leave(Path(chosen.out), tree, pictures)
    for result in shown if not args.json else ():
        Terminal().print(result)
    if args.json:
        show(None, lambda: tree, True)
    return 0


def _bounds_of_each(chosen: CompareOptions, folders: Mapping[str, Path], quiet: bool) -> dict[str, Any]:
    """Name -> evaluation; what is done lies in a numbered folder each, for names may end alike."""
    out = {}
    for number, (word, folder) in enumerate(folders.items()):
        mine = None if chosen.out is None else str(Path(chosen.out) / str(number))
        out[word] = _bounds(chosen.model_copy(update={"out": mine}), folder, quiet)[0]
    return out


def _bound_cells(evaluations: Mapping[str, Any]) -> dict[str, list[str]]:
    names = dict.fromkeys(name for e in evaluations.values() for name in e.estimates)
    each = [e.estimates for e in evaluations.values()]
    return {
        name: [f"{x[name].perplexity:.3f} +- {x[name].standard_error * x[name].perplexity:.3f}" for x in each]
        for name in names
    }


def _texts_of_each(chosen: CompareOptions, folders: Mapping[str, Path]) -> dict[str, list[str]]:
    from esolm_megatron.model.pretrained import read_config

    length = chosen.length or min(read_config(folder).model.seq_length for folder in folders.values())
    out = {}
    for word, folder in folders.items():
        model = chosen.load(str(folder))
        samples = model.sample(chosen.samples, length, alpha_0=chosen.alpha_0, seed=chosen.seed)
        out[word] = [model.tokenizer.decode(row) for row in samples[0].tolist()]
    return out


def _settings(word: str, folder: Path) -> dict[str, Any]:
    """Of a run its configuration, of a model its shape and alpha_0: field -> value."""
    from esolm_megatron.config.yaml_text import read_mapping
    from esolm_megatron.model.pretrained import read_config

    run = _run_of(word)
    if run is not None:
        nested = read_mapping(run / "config.yaml", "sections")
        flat = {f"{a}.{b}": value for a, x in nested.items() if isinstance(x, dict) for b, value in x.items()}
        return flat | {name: value for name, value in nested.items() if not isinstance(value, dict)}
    info = read_config(folder)
    return {f"model.{name}": value for name, value in info.model.model_dump().items()} | {
        "objective.alpha_0": info.alpha_0
    }


def _run_of(word: str) -> Path | None:
    path, at, step = word.rpartition("@")
    run = Path(path if at and step.isdigit() else word)
    return run if (run / "config.yaml").is_file() else None


def _losses(word: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, with the tokens seen so far."""
    from esolm_megatron.config.yaml_text import read_mapping
    from esolm_megatron.train.metrics import read

    run = _run_of(word)
    if run is None or not (run / "metrics.jsonl").is_file():
        return []
    tree = read_mapping(run / "config.yaml", "sections")
    each = tree["train"]["global_batch_size"] * tree["model"]["seq_length"]
    return [{**line, "tokens": line["step"] * each} for line in read(run / "metrics.jsonl")]


def _differences(trees: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Field -> each one's value, of fields that are not the same in all that have them; a model knows fewer than a run."""
    out = {}
    for name in dict.fromkeys(name for tree in trees.values() for name in tree):
        first, *others = [tree[name] for tree in trees.values() if name in tree]
        if any(value != first for value in others):
            out[name] = [tree.get(name, "") for tree in trees.values()]
    return out


def _side_by_side(title: str, words: list[str], rows: Mapping[str, list[Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("", *words):
        table.add_column(escape(heading), overflow="fold")
    for name, values in rows.items():
        table.add_row(escape(name), *(escape(str(value)) for value in values))
    return table
