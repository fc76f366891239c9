"""What trained models write and how they judge text: `esolm sample`, `esolm score`, `esolm serve`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from esolm_megatron.commands import Placed, options, show
from esolm_megatron.config import ConfigError
from esolm_megatron.errors import optional
from esolm_megatron.inference.request import Cache, Propose, SamplingParams
from esolm_megatron.terminal import Terminal


class Texts(Placed):
    """How many texts are written, and how long they are."""

    num_samples: int = Field(4, ge=1)
    """Texts to generate."""
    length: int | None = Field(None, ge=1)
    """Tokens in each; null means the trained length, or that of `infill`."""


class SampleOptions(SamplingParams, Texts):
    """Fields of `esolm sample`."""

    prompt: str | None = None
    """Text that each sample starts with."""
    infill: str | None = None
    """Text with holes: [[12]] is a hole of 12 tokens."""
    positions: list[int] | None = None
    """All positions, [3,0,1,2], as they are to be filled; in place of `order`."""
    own_schedules: bool = False
    """Draw a schedule for each text; false means that all share one."""
    stop: bool = False
    """End a text at its first end-of-text token, and leave out the work after it."""
    cache: Cache = "full"
    """int8 keeps keys and values in 8 bits; what that costs in likelihood is told."""
    seconds_per_pass: float = Field(0.0, ge=0)
    """With --watch: wait this long after each pass."""


class ScoreOptions(Placed):
    """Fields of `esolm score`."""

    text: str | None = None
    """The text to score."""
    file: str | None = None
    """Files instead, read as `esolm data prepare` reads: a line of a .jsonl is a text, in its field `text`; a .txt is one text."""
    encoding: str = "utf-8"
    """Of a .txt and other files that are a text."""
    prompt: str = ""
    """Text before it, which is given and not counted."""
    orders: int = Field(4, ge=1)
    """Orders drawn for each text."""
    kind: str = Field("generation", pattern="^(generation|random|left_to_right)$")
    """Orders as the model generates, all random, or the one from left to right."""
    alpha_0: float | None = Field(None, ge=0, le=1)
    """Share of random places in `generation` orders; null means the trained value."""
    batch_size: int = Field(8, ge=1)
    """Orders in one pass."""
    seed: int = Field(0, ge=0)
    """Seed of the orders."""


class ServeOptions(Placed):
    """Fields of `esolm serve`."""

    host: str = "127.0.0.1"
    """Address to listen at; the default is reached from this machine only. Anyone who reaches it may use it."""
    port: int = Field(8000, ge=0, le=65535)
    """Port; 0 takes a free one."""
    rows: int = Field(16, ge=1)
    """Texts written at once."""
    length: int | None = Field(None, ge=1)
    """Tokens of a text, prompt included; null means the trained length."""
    queue: int = Field(64, ge=0)
    """Texts that may wait; more are refused with status 429."""
    cache: Cache = "full"
    """int8 keeps keys and values in 8 bits, for more texts at once in the same memory."""
    propose: Propose = 1
    """Tokens that a request may propose at once and verify; memory for them is kept in each row."""
    places: int | None = Field(None, ge=1)
    """Memory for so many tokens of all texts together, prompts included; null means rows x length."""
    body: int = Field(1_000_000, ge=1)
    """Bytes of a request; larger ones are refused with status 413."""


def run_serve(args: argparse.Namespace) -> int:
    """Serve a model until a signal asks to end."""
    uvicorn = optional("uvicorn", "the server")
    serve = optional("esolm_megatron.inference.serve", "the server")
    chosen = options(ServeOptions, args.overrides)
    model = chosen.load(args.path)
    limits = serve.Limits(
        chosen.rows,
        chosen.length or model.config.seq_length,
        chosen.queue,
        chosen.body,
        chosen.cache,
        chosen.propose,
        chosen.places,
    )
    app = serve.build(model, limits, Path(args.path).resolve().name)
    signal.signal(signal.SIGTERM, lambda *_: None)  # which is raised again after the server has ended
    uvicorn.run(app, host=chosen.host, port=chosen.port, timeout_graceful_shutdown=5, log_level="info")
    return 0


def run_sample(args: argparse.Namespace) -> int:
    """Texts from a converted model."""
    if (args.processes or 1) > 1 and "RANK" not in os.environ:
        from esolm_megatron.launch import run_local

        words = [*args.overrides, *(["--json"] if args.json else []), *(["--watch"] if args.watch else [])]
        words += [f"--html={args.html}"] if args.html else []
        return run_local([sys.executable, "-m", "esolm_megatron", "sample", args.path, *words], args.processes)
    import torch

    from esolm_megatron.inference import loss_of_cache, parse_infill
    from esolm_megatron.inference.animation import Animation

    chosen = options(SampleOptions, args.overrides)
    model, shows = chosen.load(args.path, split=True), int(os.environ.get("RANK", 0)) == 0
    length, prompt, positions = chosen.length or model.config.seq_length, None, None
    if chosen.infill is not None and chosen.prompt is not None:
        raise ConfigError("prompt and infill: give one of them; infill may start with text")
    if chosen.infill is not None:
        ids, places, length = parse_infill(chosen.infill, model.tokenizer)
        prompt, positions = torch.tensor(ids, dtype=torch.int64), torch.tensor(places, dtype=torch.int64)
    elif chosen.prompt:
        prompt = torch.tensor(model.tokenizer.encode(chosen.prompt), dtype=torch.int64)
    given = [] if prompt is None else prompt.tolist()
    where = positions.tolist() if positions is not None else list(range(len(given)))
    trained = model.config.seq_length
    animation: Any = None
    shown: Any = nullcontext()
    if length > trained and shows:
        said = f"warning: length = {length}: positions from {trained} on were never trained, and what stands there may be worthless"
        Terminal(stderr=True, soft_wrap=True).print(said, highlight=False)
    if (args.watch or args.html) and shows:
        animation = Animation(chosen.num_samples, length, model.tokenizer.decode, dict(zip(where, given, strict=True)))
        shown = animation.live(chosen.seconds_per_pass) if args.watch else shown
    elif length > trained and shows:  # it may take minutes
        shown = animation = Filling(chosen.num_samples * (length - len(given)))
    with shown:
        fields = chosen.sampling()
        if chosen.positions is not None:
            fields["order"] = torch.tensor(chosen.positions)
        begun = time.monotonic()
        samples = model.sample(
            chosen.num_samples,
            length,
            prompt=prompt,
            prompt_positions=positions,
            own_schedules=chosen.own_schedules,
            stop_id=model.tokenizer.eos_id if chosen.stop else None,
            cache=chosen.cache,
            watch=animation,
            **fields,
        )
    seconds = time.monotonic() - begun
    lost = loss_of_cache(model.model, samples, len(given)) if chosen.cache == "int8" else None
    if not shows:
        return 0
    if args.html and isinstance(animation, Animation):
        animation.write_html(Path(args.html), f"{chosen.num_samples} samples of {Path(args.path).name}")
    made = samples[0].numel() - len(samples[0]) * len(given) - int(samples.saved.sum())
    shapes, recording = samples.recorded
    more = f"; of {seconds:.1f} s, {recording:.1f} went into recording {shapes} shapes of passes" if shapes else ""
    print(f"{made / seconds:.0f} tokens/s{more}", file=sys.stderr)
    if lost is not None and not args.json:
        print(
            f"keys and values in 8 bits: {lost:.2g} nats a token (log p with them - log p without, mean over the first 16 texts; "
            "below 0 by chance where tokens are few)",
            file=sys.stderr,
        )
    show_samples(
        samples, model.tokenizer.decode, args.json, {} if lost is None else {"int8_cache_nats_per_token": lost}
    )
    return 0


class Filling(Progress):
    """A progress bar of places that are filled, to be told of each pass."""

    def __init__(self, places: int):
        """places: that are to be filled."""
        super().__init__(*Progress.get_default_columns(), MofNCompleteColumn(), console=Terminal(stderr=True))
        self._task = self.add_task("tokens", total=places)

    def __call__(self, number: int, rows: Any, positions: Any, tokens: Any) -> None:
        """One pass is done."""
        self.update(self._task, advance=len(positions))


def show_samples(samples: Any, decode: Any, as_json: bool, more: dict[str, float]) -> None:
    """Print texts with their log-probabilities. more: facts that go with them in JSON."""
    tokens, log_probs = samples
    texts = [decode(row) for row in tokens.tolist()]
    totals = log_probs.sum(1).tolist()
    if as_json:
        out = [
            {"text": text, "tokens": row, "log_prob": total, "order": order, "saved": saved}
            for text, row, total, order, saved in zip(
                texts, tokens.tolist(), totals, samples.order.tolist(), samples.saved.tolist(), strict=True
            )
        ]
        print(json.dumps({"num_forward_passes": samples.num_forward_passes, "samples": out, **more}))
        return
    for i, (text, total) in enumerate(zip(texts, totals, strict=True)):
        made = tokens.shape[1] - int(samples.saved[i])
        Terminal().rule(f"sample {i}   log p = {total:.1f}   {samples.num_forward_passes} passes for {made} tokens")
        print(text)


def run_score(args: argparse.Namespace) -> int:
    """Exact log-likelihoods of texts."""
    from esolm_megatron.inference.scoring import score

    chosen = options(ScoreOptions, args.overrides)
    texts = texts_to_score(chosen)
    model = chosen.load(args.path)
    pairs = [model.tokenizer.encode_pair(chosen.prompt, text) for text in texts]
    results = [
        score(
            model,
            tokens,
            prompt,
            **chosen.model_dump(include={"orders", "kind", "alpha_0", "batch_size", "seed"}),
        )
        for prompt, tokens in pairs
    ]
    if args.json:
        print(json.dumps({"texts": [{"text": t, **asdict(r)} for t, r in zip(texts, results, strict=True)]}))
        return 0
    table = Table("text", "tokens", "mean log p", "log mean p", "nats per token", "perplexity")
    for text, r in zip(texts, results, strict=True):
        start = text[:30].replace("\n", " ")
        numbers = (
            f"{r.any_order:.2f}",
            f"{r.importance_weighted:.2f}",
            f"{r.nats_per_token:.4f}",
            f"{r.perplexity:.2f}",
        )
        table.add_row(start, str(r.num_tokens), *numbers)
    show(table, dict, False)
    return 0


def texts_to_score(chosen: ScoreOptions) -> list[str]:
    """The texts that `text` or `file` name.

    Raises:
        ConfigError: not exactly one of them is given, or the file has a line without a text.
    """
    if (chosen.text is None) == (chosen.file is None):
        raise ConfigError("text and file: give one of them")
    if chosen.text is not None:
        return [chosen.text]
    from esolm_megatron.data.prepare.inputs import read_texts

    texts = list(read_texts(str(chosen.file), "file", encoding=chosen.encoding))
    if not texts:
        raise ConfigError(f"file = {chosen.file!r}: has no text")
    return texts
