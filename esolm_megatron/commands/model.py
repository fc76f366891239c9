"""What is done with trained models: `esolm convert` and `esolm eval`."""

from __future__ import annotations

import argparse
from typing import Any

from pydantic import Field
from rich.console import Console

from esolm_megatron.commands import options, show
from esolm_megatron.config import Section


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
