"""What is done with trained models: `esolm convert`, and the lm-evaluation-harness."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import Any

from pydantic import Field
from rich.markup import escape
from rich.progress import Progress

from esolm_megatron.commands import options, show
from esolm_megatron.config import ConfigError, Section
from esolm_megatron.errors import optional
from esolm_megatron.terminal import Terminal


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
