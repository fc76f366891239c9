"""What is done with trained models: `esolm convert` and `esolm eval`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import Any

from pydantic import Field
from rich.markup import escape
from rich.progress import Progress

from esolm_megatron.commands import Placed, options, show
from esolm_megatron.config import ConfigError, Section
from esolm_megatron.errors import of_setting, optional
from esolm_megatron.terminal import Terminal


class EvalOptions(Placed):
    """Fields of `esolm eval`."""

    data: str | None = None
    """Folder made by `esolm data prepare`; its validation split is used."""
    text: str | None = None
    """Text instead: a file (.txt, .jsonl, .parquet, ...), a folder or glob of them, or hf://; also told per word and per byte."""
    text_field: str = "text"
    """Field of `text` that holds the documents."""
    num_sequences: int = Field(256, ge=1)
    """Sequences, from the start of the split or the text."""
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
    """Sequence length of an import; null means what the checkpoint says."""
    alpha_0: float | None = Field(None, ge=0, le=1)
    """alpha_0 of a reference checkpoint that does not say."""
    vocab_size: int | None = Field(None, ge=2)
    """Ids to keep of an autoregressive checkpoint, the mask included; null means all."""
    tokenizer: str | None = None
    """Folder of the tokenizer that goes with an import; null means the one beside it, where there is one."""


_CONVERT_USES = {
    "run": {"weights", "dtype", "step"},
    "reference": {"weights", "dtype", "num_heads", "length", "alpha_0", "tokenizer"},
    "transformers": {"dtype", "length", "vocab_size", "tokenizer"},
}


def run_convert(args: argparse.Namespace) -> int:
    """Any of our formats and foreign ones into another; or, with --check, only a look at an inference folder's hashes."""
    from esolm_megatron.model.pretrained import check_hashes

    chosen = options(ConvertOptions, args.overrides)
    if args.check:
        if args.out is not None or chosen.model_fields_set:
            raise ConfigError("--check: takes a MODEL folder and nothing else")
        files = check_hashes(args.path)
        show(f"{len(files)} files are as they were written", lambda: {"files": files}, args.json)
        return 0
    if args.out is None or "=" in args.out:
        raise ConfigError("OUT is missing: give the folder to write, or --check")
    source, uses = args.source or "run", _CONVERT_USES.get(args.source or "run", set())
    if args.to != "model":
        if args.source is not None:
            raise ConfigError(f"--from {source} --to {args.to}: convert to an inference folder first, then that one")
        uses = set()
    unused = sorted(chosen.model_fields_set - uses)
    if unused:
        known = f"; it takes {', '.join(sorted(uses))}" if uses else ""
        raise ConfigError(f"{unused[0]}: has no meaning for a conversion from {source} to {args.to}{known}")
    with Progress(console=Terminal(stderr=True), transient=True, disable=args.json) as bar:
        task = bar.add_task(escape(f"to {args.out}"), total=None)  # the default columns read markup

        def progress(_: str, number: int, total: int) -> None:
            bar.update(task, completed=number, total=total)

        report = _converted(args, source, chosen, progress)
    facts = {k: v for k, v in vars(report).items() if v is not None}
    show("\n".join(f"{k}: {v}" for k, v in facts.items()), lambda: facts, args.json)
    return 0


def _converted(
    args: argparse.Namespace, source: str, chosen: ConvertOptions, progress: Callable[[str, int, int], None]
) -> Any:
    import torch

    from checkpoints_conversion import autoregressive, export, reference, to_reference, training

    dtype = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[chosen.dtype]
    if args.to == "training":
        return training.start_run(args.path, args.out, progress=progress)
    if args.to == "reference":
        return to_reference.export_reference(args.path, args.out)
    if source == "reference":
        return reference.import_reference(
            args.path,
            args.out,
            use_ema=chosen.weights == "ema",
            num_heads=chosen.num_heads,
            length=chosen.length,
            alpha_0=chosen.alpha_0,
            tokenizer_folder=chosen.tokenizer,
            dtype=dtype,
            progress=progress,
        )
    if source == "transformers":
        return autoregressive.import_autoregressive(
            args.path,
            args.out,
            length=chosen.length,
            vocab_size=chosen.vocab_size,
            tokenizer_folder=chosen.tokenizer,
            dtype=dtype,
            progress=progress,
        )
    dtype = dtype or torch.float32
    return export.export_run(
        args.path, args.out, weights=chosen.weights, dtype=dtype, step=chosen.step, progress=progress
    )


def run_harness(args: argparse.Namespace) -> int:
    """The harness's own command line, which knows the model `esolm`."""
    harness = optional("lm_eval.__main__", "lm-eval")
    importlib.import_module("esolm_megatron.inference.harness")
    sys.argv = ["lm_eval", *args.words]
    harness.cli_evaluate()
    return 0


def run_eval(args: argparse.Namespace) -> int:
    """Bounds of a converted model on validation text."""
    import numpy as np

    from esolm_megatron import evaluate
    from esolm_megatron.config import ObjectiveConfig
    from esolm_megatron.data.prepare.inputs import read_texts
    from esolm_megatron.data.prepare.text_field import TextField
    from esolm_megatron.data.stream import ValidationSet
    from esolm_megatron.objective.esolm import document_numbers

    chosen = options(EvalOptions, args.overrides)
    if (chosen.data is None) == (chosen.text is None):
        raise ConfigError("data and text: give one of them")
    if chosen.text is None and "text_field" in chosen.model_fields_set:
        raise ConfigError(f"text_field = {chosen.text_field!r}: goes with text; prepared data has no fields")
    texts = None if chosen.text is None else read_texts(chosen.text, "text", TextField.of(chosen.text_field))
    model = chosen.load(args.path)
    length, documents, whole = chosen.seq_length or model.config.seq_length, None, None
    if texts is not None:
        whole = evaluate.TextRows.of(texts, model.tokenizer.encode, length, chosen.num_sequences)
        tokens, valid = whole.tokens[: chosen.num_sequences], whole.valid[: chosen.num_sequences]
    else:
        with of_setting("data", chosen.data):
            data = ValidationSet(str(chosen.data), seq_length=length)
        rows = data.rows(np.arange(min(chosen.num_sequences, len(data))))
        tokens, valid = rows.tokens, rows.valid
        documents = None if model.cross_document else document_numbers(rows.documents, rows.valid)
    result = evaluate.evaluate(
        model.model,
        [(tokens, valid)],
        ObjectiveConfig(alpha_0=model.alpha_0),
        orders=chosen.orders,
        seed=chosen.seed,
        batch_size=chosen.batch_size,
        documents=documents,
    )
    unigram = evaluate.unigram_entropy([(tokens, valid)])
    facts = {**evaluate.as_dict(result, whole), "unigram_entropy": unigram}
    show(evaluate.table(result, whole), lambda: facts, args.json)
    if not args.json:
        Terminal().print(f"entropy of the tokens' frequencies: {unigram:.3f} nats per token")
    return 0
