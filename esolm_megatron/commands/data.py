"""`esolm data`: prepare, verify, show, mix, train-tokenizer, corpus."""

from __future__ import annotations

import argparse
import json

from pydantic import Field

from esolm_megatron.commands import options, show
from esolm_megatron.config import ConfigError, Section
from esolm_megatron.terminal import Terminal


def run(args: argparse.Namespace) -> int:
    """The actions of `esolm data`."""
    return {
        "prepare": _data_prepare,
        "verify": _data_verify,
        "show": _data_show,
        "train-tokenizer": _data_train_tokenizer,
        "corpus": _data_corpus,
        "mix": _data_mix,
    }[args.action](args)


def _data_prepare(args: argparse.Namespace) -> int:
    from esolm_megatron.data.prepare import load_prepare_config, prepare

    summary = prepare(load_prepare_config(args.path, args.overrides), progress=not args.json)
    show(str(summary), summary.as_dict, args.json)
    return 0


def _data_verify(args: argparse.Namespace) -> int:
    from esolm_megatron.data.verify import verify

    class VerifyOptions(Section):
        plot: str | None = None

    report = verify(args.path, **options(VerifyOptions, args.overrides).model_dump())
    show(
        "\n".join([f"{args.path}: {'sound' if report.ok else 'DAMAGED'}", *report.problems, str(report)]),
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

    rows = decoded(args.path, **options(ShowOptions, args.overrides).model_dump())
    if args.json:
        print(json.dumps([vars(row) for row in rows]))
        return 0
    console = Terminal()
    for number, row in enumerate(rows):
        console.rule(f"row {number}", characters="=")
        for place, part in enumerate(row.parts):
            if place or not row.continues:
                console.rule("a document starts", align="left", style="dim")
            print(part)
    return 0


def _data_train_tokenizer(args: argparse.Namespace) -> int:
    from esolm_megatron.data.prepare.inputs import Bad, check_input, cut, find_inputs, read_documents
    from esolm_megatron.data.prepare.text_field import TextField
    from esolm_megatron.data.tokenizer import train_tokenizer

    class TokenizerOptions(Section):
        output: str
        vocab_size: int = Field(32000, ge=257)
        text_field: str | tuple[str, ...] = "text"

    chosen = options(TokenizerOptions, args.overrides)
    where = TextField.of(chosen.text_field)
    files = find_inputs([args.path], "PATH").files
    for file in files:
        check_input(file, where)
    texts = (
        document[0]
        for file in files
        for piece in cut(file, 1 << 26, where)
        for document in read_documents(piece, where)
        if not isinstance(document, Bad)
    )
    size = train_tokenizer(texts, chosen.vocab_size, chosen.output).vocab_size
    show(f"{chosen.output}: {size} tokens", lambda: {"folder": chosen.output, "vocab_size": size}, args.json)
    return 0


def _data_corpus(args: argparse.Namespace) -> int:
    from esolm_megatron.data.corpus import write_corpus

    class CorpusOptions(Section):
        max_bytes: int | None = None

    if args.path.startswith("output="):  # as the actions beside this one have it; it would be the folder's name
        raise ConfigError(f"{args.path}: give the folder alone: esolm data corpus {args.path.removeprefix('output=')}")
    size = write_corpus(args.path, options(CorpusOptions, args.overrides).max_bytes)
    show(f"{args.path}: {size:,} bytes of text", lambda: {"folder": args.path, "bytes": size}, args.json)
    return 0


def _data_mix(args: argparse.Namespace) -> int:
    from esolm_megatron.config import load
    from esolm_megatron.data.stream.mix_report import mix

    pictures = [word.partition("=")[2] for word in args.overrides if word.startswith("plot=")]
    report = mix(load(args.path, [word for word in args.overrides if not word.startswith("plot=")]))
    for file in pictures:
        report.plot(file)
    show(report.as_table(), report.as_dict, args.json)
    return 0
