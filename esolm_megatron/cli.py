"""The command line: `esolm VERB PATH [section.field=value ...] [--json]`.

Each verb imports what it needs when it runs, so that planning and help start at once and without torch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import Field, ValidationError
from rich.console import Console

from esolm_megatron import __version__
from esolm_megatron.config import ConfigError, Section, UserError, load

Options = TypeVar("Options", bound=Section)


class SampleOptions(Section):
    """Fields of `esolm sample`."""

    num_samples: int = Field(4, ge=1)
    """Texts to generate."""
    length: int | None = Field(None, ge=1)
    """Tokens in each; null means the trained length, or that of `infill`."""
    steps: int | None = Field(None, ge=1)
    """Diffusion steps; null means one for each token."""
    alpha_0: float | None = Field(None, ge=0, le=1)
    """Share of tokens made by diffusion; null means the trained value."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus that tokens are drawn from."""
    temperature: float = Field(1.0, gt=0)
    """Sharpness of the draw; below 1 is sharper."""
    seed: int = Field(0, ge=0)
    """Seed of orders and tokens."""
    prompt: str | None = None
    """Text that each sample starts with."""
    infill: str | None = None
    """Text with holes: [[12]] is a hole of 12 tokens."""
    schedule: str = Field("binomial", pattern="^(binomial|uniform)$")
    """How many tokens each diffusion step makes."""


class EvalOptions(Section):
    """Fields of `esolm eval`."""

    data: str
    """Folder made by `esolm data prepare`; its validation split is used."""
    num_sequences: int = Field(256, ge=1)
    """Sequences, from the start of the split."""
    seq_length: int | None = Field(None, ge=1)
    """Tokens in a sequence; null means the trained length."""
    orders: int = Field(4, ge=1)
    """Orders drawn for each sequence: K of the importance-weighted bound."""
    batch_size: int = Field(8, ge=1)
    """Sequences in one pass."""
    seed: int = Field(0, ge=0)
    """Seed of noise and orders."""


class ConvertOptions(Section):
    """Fields of `esolm convert`."""

    weights: str = Field("ema", pattern="^(ema|last)$")
    """ema: the moving average. last: the weights of the step."""
    dtype: str | None = Field(None, pattern="^(fp32|bf16|fp16)$")
    """Type of the written weights; null means fp32, and for an import what the source has, without rounding."""
    step: int | None = Field(None, ge=0)
    """Which checkpoint of a run; null means the newest."""
    num_heads: int | None = Field(None, ge=1)
    """Heads of a reference checkpoint that does not say."""
    length: int | None = Field(None, ge=1)
    """Sequence length of a reference checkpoint that does not say."""
    alpha_0: float | None = Field(None, ge=0, le=1)
    """alpha_0 of a reference checkpoint that does not say."""
    tokenizer: str | None = None
    """Folder of the tokenizer that goes with a reference checkpoint."""


def options(kind: type[Options], overrides: Sequence[str]) -> Options:
    """`field=value` words as a checked group of fields; every problem at once."""
    values, problems = {}, []
    for word in overrides:
        name, separator, value = word.partition("=")
        if not separator:
            problems.append(f"{word!r}: an option is written field=value")
            continue
        text = kind.model_fields.get(name) is not None and "str" in str(kind.model_fields[name].annotation)
        values[name] = value.replace("\\n", "\n") if text and value != "null" else yaml.safe_load(value)
    try:
        checked = kind.model_validate(values)
    except ValidationError as error:
        known = ", ".join(kind.model_fields)
        for item in error.errors():
            name = ".".join(str(p) for p in item["loc"])
            hint = f"; known here: {known}" if item["type"] == "extra_forbidden" else ""
            problems.append(f"{name}: {item['msg']}{hint}")
        raise ConfigError("\n".join(problems)) from None
    if problems:
        raise ConfigError("\n".join(problems))
    return checked


def show(result: Any, as_dict: Callable[[], Any], as_json: bool) -> None:
    """Print a result for a person, or as one JSON document."""
    if as_json:
        print(json.dumps(as_dict(), indent=1, default=str))
    else:
        Console().print(result)


def run_plan(args: argparse.Namespace) -> int:
    """What the run will cost."""
    from esolm_megatron.plan import plan

    result = plan(load(args.path, args.overrides), args.processes, device=args.device, mfu=args.mfu)
    show(result, result.as_dict, args.json)
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    """What this machine has, or what all processes of a run can do together."""
    if args.cluster:
        return _doctor_cluster(args)
    from esolm_megatron import doctor

    findings = doctor.report()
    show(doctor.as_table(findings), lambda: doctor.as_dict(findings), args.json)
    return doctor.exit_status(findings)


def _doctor_cluster(args: argparse.Namespace) -> int:
    if (args.processes or 1) > 1 and "RANK" not in os.environ:
        from esolm_megatron.launch import run_local

        words = ["doctor", "--cluster", f"--folder={args.folder}", *(["--json"] if args.json else [])]
        return run_local([sys.executable, "-m", "esolm_megatron", *words], args.processes)
    from pathlib import Path

    from esolm_megatron.cluster import examine

    report = examine(Path(args.folder))
    if int(os.environ.get("RANK", 0)) == 0:
        show(report.as_table(), report.as_dict, args.json)
    return report.exit_status


def run_train(args: argparse.Namespace) -> int:
    """Train, in this process or in `--processes` of them."""
    from esolm_megatron.train.preflight import check_run

    config = load(args.path, args.overrides)
    check_run(config, int(os.environ.get("WORLD_SIZE", args.processes or 1)))
    if (args.processes or 1) > 1 and "RANK" not in os.environ:
        from esolm_megatron.launch import run_local

        return run_local([sys.executable, "-m", "esolm_megatron", "train", args.path, *args.overrides], args.processes)
    from esolm_megatron.train.trainer import train

    outcome = train(config)
    if int(os.environ.get("RANK", 0)) == 0:
        state = " ".join([outcome.ending.name.lower().replace("_", " "), *filter(None, [outcome.detail])])
        state += "; start it again to continue" if outcome.ending.restart else ""
        Console(stderr=True).print(f"{config.run_dir}: step {outcome.step} of {config.train.num_steps}, {state}")
    return int(outcome.ending)


def run_data(args: argparse.Namespace) -> int:
    """The actions of `esolm data`."""
    return {
        "prepare": _data_prepare,
        "verify": _data_verify,
        "show": _data_show,
        "train-tokenizer": _data_train_tokenizer,
        "corpus": _data_corpus,
    }[args.action](args)


def _data_prepare(args: argparse.Namespace) -> int:
    from esolm_megatron.data.prepare import load_prepare_config, prepare

    summary = prepare(load_prepare_config(args.path, args.overrides), progress=not args.json)
    show(str(summary), lambda: {"folder": summary.folder, "seconds": summary.seconds}, args.json)
    return 0


def _data_verify(args: argparse.Namespace) -> int:
    from esolm_megatron.data.verify import verify

    report = verify(args.path)
    show(
        "\n".join([f"{args.path}: {'sound' if report.ok else 'DAMAGED'}", *report.problems]),
        lambda: vars(report),
        args.json,
    )
    return 0 if report.ok else 1


def _data_show(args: argparse.Namespace) -> int:
    from esolm_megatron.data.verify import show as decoded

    class ShowOptions(Section):
        split: str = "train"
        rows: int = 4
        seq_length: int = 256

    texts = decoded(args.path, **options(ShowOptions, args.overrides).model_dump())
    if args.json:
        print(json.dumps(texts))
        return 0
    for i, text in enumerate(texts):
        Console().rule(f"row {i}")
        print(text)
    return 0


def _data_train_tokenizer(args: argparse.Namespace) -> int:
    from esolm_megatron.data.corpus import cut, find_files, read_documents
    from esolm_megatron.data.tokenizer import train_tokenizer

    class TokenizerOptions(Section):
        output: str
        vocab_size: int = Field(32000, ge=257)
        text_field: str = "text"

    chosen = options(TokenizerOptions, args.overrides)
    texts = (
        document[0]
        for file in find_files([args.path])
        for piece in cut(file, 1 << 26)
        for document in read_documents(piece, chosen.text_field)
        if document is not None
    )
    tokenizer = train_tokenizer(texts, chosen.vocab_size, chosen.output)
    show(
        f"{chosen.output}: {tokenizer.vocab_size} tokens",
        lambda: {"folder": chosen.output, "vocab_size": tokenizer.vocab_size},
        args.json,
    )
    return 0


def _data_corpus(args: argparse.Namespace) -> int:
    from esolm_megatron.data.corpus import write_corpus

    class CorpusOptions(Section):
        max_bytes: int | None = None

    size = write_corpus(args.path, options(CorpusOptions, args.overrides).max_bytes)
    show(f"{args.path}: {size:,} bytes of text", lambda: {"folder": args.path, "bytes": size}, args.json)
    return 0


def run_convert(args: argparse.Namespace) -> int:
    """Training run or foreign checkpoint -> inference folder."""
    import torch

    from checkpoints_conversion import export, reference

    chosen = options(ConvertOptions, args.overrides)
    dtype = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[chosen.dtype]
    if args.source == "reference":
        report: Any = reference.import_reference(
            args.path,
            args.out,
            use_ema=chosen.weights == "ema",
            num_heads=chosen.num_heads,
            length=chosen.length,
            alpha_0=chosen.alpha_0,
            tokenizer_folder=chosen.tokenizer,
            dtype=dtype,
        )
    else:
        dtype = dtype or torch.float32
        report = export.export_run(args.path, args.out, weights=chosen.weights, dtype=dtype, step=chosen.step)
    facts = {k: v for k, v in vars(report).items() if v is not None}
    show("\n".join(f"{k}: {v}" for k, v in facts.items()), lambda: facts, args.json)
    return 0


def run_eval(args: argparse.Namespace) -> int:
    """Bounds of a converted model on validation text."""
    import numpy as np

    from esolm_megatron import evaluate, load_pretrained
    from esolm_megatron.config import ObjectiveConfig
    from esolm_megatron.data.stream import ValidationSet

    chosen = options(EvalOptions, args.overrides)
    model = load_pretrained(args.path)
    data = ValidationSet(chosen.data, seq_length=chosen.seq_length or model.config.seq_length)
    count = min(chosen.num_sequences, len(data))
    rows = data.rows(np.arange(count))
    result = evaluate.evaluate(
        model.model,
        [(rows.tokens, rows.valid)],
        ObjectiveConfig(alpha_0=model.alpha_0),
        orders=chosen.orders,
        seed=chosen.seed,
        batch_size=chosen.batch_size,
    )
    unigram = evaluate.unigram_entropy([(rows.tokens, rows.valid)])
    facts = {**evaluate.as_dict(result), "unigram_entropy": unigram}
    show(evaluate.table(result), lambda: facts, args.json)
    if not args.json:
        Console().print(f"entropy of the tokens' frequencies: {unigram:.3f} nats per token")
    return 0


HOLE = re.compile(r"\[\[(\d+)\]\]")


def parse_infill(text: str, encode: Callable[[str], list[int]]) -> tuple[list[int], list[int], int]:
    """Token ids, their positions and the whole length of a text with [[n]] holes.

    Raises:
        ConfigError: there is no hole.
    """
    parts = HOLE.split(text)
    if len(parts) == 1:
        raise ConfigError(f"infill = {text!r}: has no hole; write [[12]] for 12 tokens to be filled in")
    ids: list[int] = []
    positions: list[int] = []
    length = 0
    for index, part in enumerate(parts):
        if index % 2:
            length += int(part)
            continue
        new = encode(part) if part else []
        ids += new
        positions += range(length, length + len(new))
        length += len(new)
    return ids, positions, length


def run_sample(args: argparse.Namespace) -> int:
    """Texts from a converted model."""
    import torch

    from esolm_megatron import load_pretrained

    chosen = options(SampleOptions, args.overrides)
    model = load_pretrained(args.path)
    length, prompt, positions = chosen.length or model.config.seq_length, None, None
    if chosen.infill is not None and chosen.prompt is not None:
        raise ConfigError("prompt and infill: give one of them; infill may start with text")
    if chosen.infill is not None:
        ids, places, length = parse_infill(chosen.infill, model.tokenizer.encode)
        prompt, positions = torch.tensor(ids, dtype=torch.int64), torch.tensor(places, dtype=torch.int64)
    elif chosen.prompt:
        prompt = torch.tensor(model.tokenizer.encode(chosen.prompt), dtype=torch.int64)
    with torch.inference_mode():
        samples = model.sample(
            chosen.num_samples,
            length,
            steps=chosen.steps,
            alpha_0=chosen.alpha_0,
            top_p=chosen.top_p,
            temperature=chosen.temperature,
            seed=chosen.seed,
            prompt=prompt,
            prompt_positions=positions,
            schedule=chosen.schedule,  # type: ignore[arg-type]
        )
    tokens, log_probs = samples
    texts = [model.tokenizer.decode(row) for row in tokens.tolist()]
    totals = log_probs.sum(1).tolist()
    if args.json:
        out = [
            {"text": text, "tokens": row, "log_prob": total, "order": order}
            for text, row, total, order in zip(texts, tokens.tolist(), totals, samples.order.tolist(), strict=True)
        ]
        print(json.dumps({"num_forward_passes": samples.num_forward_passes, "samples": out}))
        return 0
    for i, (text, total) in enumerate(zip(texts, totals, strict=True)):
        Console().rule(f"sample {i}   log p = {total:.1f}   {samples.num_forward_passes} passes for {length} tokens")
        print(text)
    return 0


def parser() -> argparse.ArgumentParser:
    """The grammar."""
    out = argparse.ArgumentParser(prog="esolm", description="Pretrain, evaluate and sample Esoteric Language Models.")
    out.add_argument("--version", action="version", version=f"esolm-megatron {__version__}")
    verbs = out.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text, description=text)
        made.add_argument("--json", action="store_true", help="print one JSON document")
        made.set_defaults(run=run, overrides=[])
        return made

    def fields(made: argparse.ArgumentParser, what: str) -> None:
        made.add_argument("overrides", nargs="*", metavar="field=value", help=what)

    for name, run, text in (
        ("plan", run_plan, "what a run will cost: parameters, memory, FLOPs, days"),
        ("train", run_train, "train, or continue, the run of a YAML file"),
    ):
        made = verb(name, run, text)
        made.add_argument("path", metavar="RUN.yaml")
        made.add_argument("--processes", type=int, default=None, metavar="N", help="processes on this machine")
        fields(made, "override section.field of the file")
        if name == "plan":
            made.add_argument("--device", default="H100", help="GPU that is planned for")
            made.add_argument("--mfu", type=float, default=0.4, help="share of its peak that is assumed")
    data = verb("data", run_data, "tokens: prepare, verify, show, train-tokenizer, corpus")
    data.add_argument("action", choices=["prepare", "verify", "show", "train-tokenizer", "corpus"])
    data.add_argument(
        "path", metavar="PATH", help="a YAML file (prepare), prepared data (verify, show), text, or a folder"
    )
    fields(data, "override fields")
    made = verb("eval", run_eval, "perplexity bounds of a converted model")
    made.add_argument("path", metavar="MODEL", help="folder made by esolm convert")
    fields(made, ", ".join(EvalOptions.model_fields))
    made = verb("convert", run_convert, "a training run, or a reference checkpoint, to the inference format")
    made.add_argument("path", metavar="RUN", help="run folder, or what --from says")
    made.add_argument("out", metavar="OUT", help="folder to write")
    made.add_argument("--from", dest="source", choices=["run", "reference"], default="run")
    fields(made, ", ".join(ConvertOptions.model_fields))
    made = verb("sample", run_sample, "text from a converted model")
    made.add_argument("path", metavar="MODEL", help="folder made by esolm convert")
    fields(made, ", ".join(SampleOptions.model_fields))
    made = verb("doctor", run_doctor, "what this machine has, and what each missing part costs")
    made.add_argument(
        "--cluster", action="store_true", help="try all processes of torchrun, srun or --processes together"
    )
    made.add_argument(
        "--processes", type=int, default=None, metavar="N", help="with --cluster: start N on this machine"
    )
    made.add_argument("--folder", default=".", metavar="DIR", help="with --cluster: where each rank tries to write")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0 done, 2 bad input, 1 anything else that was foreseen; train: see Ending."""
    grammar = parser()
    args, rest = grammar.parse_known_args(argv)
    for word in rest:  # field=value words that come after a flag
        if word.startswith("-") or "=" not in word or args.verb == "doctor":
            grammar.error(f"unrecognised: {word}")
        args.overrides = [*args.overrides, word]
    try:
        return args.run(args)
    except (UserError, ValueError, OSError) as error:  # what users can mend: said in one piece, without a traceback
        Console(stderr=True, soft_wrap=True).print(
            f"esolm {args.verb}: {error}", style="red", markup=False, highlight=False
        )
        return 2 if isinstance(error, ValueError) else 1


if __name__ == "__main__":
    sys.exit(main())
