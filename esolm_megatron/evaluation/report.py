"""What an evaluation found, for people and for programs: tables, trees for JSON, and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from esolm_megatron.errors import optional
from esolm_megatron.evaluation.bounds import Curve, Evaluation
from esolm_megatron.evaluation.choices import Answered
from esolm_megatron.evaluation.generation import Written
from esolm_megatron.evaluation.text_rows import TextRows


def bounds_table(evaluation: Evaluation, text: TextRows | None = None) -> Table:
    """The estimates as a table for the terminal, what they are and notes below. text: that was evaluated, for words and bytes."""
    e = evaluation
    title = f"{e.num_tokens:,} tokens in {e.num_sequences:,} sequences, alpha_0 = {e.alpha_0:g}"
    out, below = (
        Table(title=title, caption_justify="left"),
        [f"{name}: {x.estimator}." for name, x in e.estimates.items()],
    )
    out.add_column("bound", no_wrap=True)
    for name in ("perplexity", "nats/token", *(() if text is None else ("per word", "bits/byte"))):
        out.add_column(name, justify="right")
    for name, x in e.estimates.items():
        nats = f"{x.nats_per_token:.4f} +- {x.standard_error:.4f}"
        units = [] if text is None else [f"{value:.4g}" for value in text.per_unit(x).values()]
        out.add_row(name, f"{x.perplexity:.3f}", nats, *units)
    if len(e.by_orders) > 1:
        bounds = ", ".join(f"K = {k}: {math.exp(nats):.3f}" for k, nats in e.by_orders.items())
        below.append(f"importance-weighted perplexity by orders: {bounds}.")
    if text is not None:
        below.append(
            f"per word: perplexity; a word is what white space separates. bits/byte: of UTF-8. By {text.num_words:,} words and "
            f"{text.num_bytes:,} bytes for {text.num_tokens:,} tokens, those of the documents that were read; {text.how}."
        )
    out.caption = "\n".join([*below, *e.notes])
    return out


def bounds_tree(evaluation: Evaluation, text: TextRows | None = None) -> dict[str, Any]:
    """The same as a tree for JSON; a standard error of one sequence is null."""
    out = asdict(evaluation)
    for name, x in evaluation.estimates.items():
        error = None if math.isnan(x.standard_error) else x.standard_error
        out[name].update(perplexity=x.perplexity, standard_error=error)
        units = {} if text is None else text.per_unit(x)
        out[name].update({unit: value if math.isfinite(value) else None for unit, value in units.items()})
    names = ("num_words", "num_bytes", "how")
    counts = {} if text is None else {name: getattr(text, name) for name in names}
    return {**out, **counts, "notes": list(evaluation.notes)}


def texts_table(found: Sequence[Written], judge: str | None) -> Table:
    """What was written in each number of steps."""
    told = "" if judge is None else f"perplexity: under {judge}. "
    out = Table(title=f"{found[0].num_samples:,} texts", caption_justify="left")
    out.caption = (
        f"{told}entropy: of a text's token frequencies, nats. repeated: phrases of 4 tokens that the text had before."
    )
    for name in ("steps", "passes", "perplexity", "entropy", "distinct 1/2/3", "repeated", "tokens/s", "MAUVE"):
        out.add_column(name, justify="right")
    for x in found:
        perplexity = "" if x.nats_per_token is None else f"{math.exp(x.nats_per_token):.2f}"
        shares = "/".join(f"{share:.2f}" for share in x.distinct.values())
        mauve = "" if x.mauve is None else f"{x.mauve:.3f}"
        numbers = (f"{x.entropy:.3f}", shares, f"{x.repetition:.3f}", f"{x.tokens_per_second:.0f}", mauve)
        out.add_row(str(x.steps), str(x.passes), perplexity, *numbers)
    return out


def texts_tree(found: Sequence[Written], judge: str | None) -> dict[str, Any]:
    """The same as a tree for JSON."""
    perplexities = [None if x.nats_per_token is None else math.exp(x.nats_per_token) for x in found]
    return {"judge": judge, "texts": [{**asdict(x), "perplexity": p} for x, p in zip(found, perplexities, strict=True)]}


def answers_table(found: Answered) -> Table:
    """How many questions were answered rightly."""
    out = Table(title=f"{found.num_questions:,} questions", caption_justify="left")
    out.caption = (
        f"log p of an answer after its prompt: {found.orders}. by byte: log p divided by the answer's UTF-8 bytes."
    )
    for name in ("accuracy", "by byte", "standard error"):
        out.add_column(name, justify="right")
    out.add_row(
        *("no answers" if x is None else f"{x:.4f}" for x in (found.accuracy, found.normalized, found.standard_error))
    )
    return out


def _figure(panels: int) -> tuple[Any, Any]:
    figure = optional("matplotlib.figure", "out").Figure(figsize=(5.2 * panels, 4), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _plot(axes: Any, curve: Curve, label: str) -> None:
    middles = [(a + b) / 2 for a, b in zip(curve.edges, curve.edges[1:], strict=False)]
    axes.plot(middles, [math.nan if x is None else x for x in curve.nats], ".-", label=label)


def draw_bounds(found: Mapping[str, Evaluation], picture: Path) -> None:
    """Perplexity by estimator, nats by place and by time, of one or several models by name."""
    figure, (bars, places, times) = _figure(3)
    names = list(dict.fromkeys(name for e in found.values() for name in e.estimates))
    wide = 0.8 / len(found)
    for number, (model, e) in enumerate(found.items()):
        said = f"{model}: " if len(found) > 1 else ""
        mine = [name for name in names if name in e.estimates]
        heights = [e.estimates[name].perplexity for name in mine]
        errors = [e.estimates[name].standard_error * height for name, height in zip(mine, heights, strict=True)]
        at = [names.index(name) + (number - (len(found) - 1) / 2) * wide for name in mine]
        bars.bar(at, heights, wide, yerr=errors, capsize=3, label=model)
        for name, curve in e.by_position.items():
            if e.alpha_0 or name == "left_to_right":
                _plot(places, curve, said + name)
        if e.by_time is not None:
            _plot(times, e.by_time, model)
    bars.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names], fontsize=8)
    bars.set(ylabel="perplexity", title="by estimator")
    places.set(xlabel="position", ylabel="nats per token", title="by position")
    times.set(xlabel="t", ylabel="nats per masked token", title="diffusion part, by time")
    _finish(figure, (bars, places, times), picture)


def draw_texts(found: Mapping[str, Sequence[Written]], picture: Path) -> None:
    """Quality and variety against time, a line for each model by name, a point for each number of steps."""
    judged = any(x.nats_per_token is not None for texts in found.values() for x in texts)
    figure, panels = _figure(1 + judged)
    for name, texts in found.items():
        times = [1e3 * x.seconds / x.num_samples for x in texts]
        columns = [("nats_per_token", math.exp)] * judged + [("entropy", float)]
        for axes, (field, shown) in zip(panels, columns, strict=True):
            heights = [math.nan if getattr(x, field) is None else shown(getattr(x, field)) for x in texts]
            axes.plot(times, heights, "o-", label=name)
            for x, y, text in zip(times, heights, texts, strict=True):
                axes.annotate(f"T = {text.steps}", (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
    titles = ["perplexity under the judge"] * judged + ["entropy of a text, nats"]
    every = [x.seconds / x.num_samples for texts in found.values() for x in texts]
    scale = "log" if max(every) > 10 * min(every) else "linear"  # a log scale of less has crowded numbers
    for axes, title in zip(panels, titles, strict=True):
        axes.set(xscale=scale, xlabel="ms a text", ylabel=title)
    _finish(figure, panels, picture)


def draw_losses(found: Mapping[str, Sequence[Mapping[str, Any]]], picture: Path) -> None:
    """Lines of several runs' metrics.jsonl by name: training loss and validation bound, over tokens."""
    figure, (axes,) = _figure(1)
    for number, (name, lines) in enumerate(found.items()):
        for key, style in (("loss", "-"), ("validation_nelbo", "o--")):
            points = [(x["tokens"], x[key]) for x in lines if x.get(key) is not None and "tokens" in x]
            if points:
                label = f"{name}: {'training loss' if key == 'loss' else 'validation bound'}"
                axes.plot(*zip(*points, strict=True), style, color=f"C{number}", label=label, ms=4, lw=1)
    axes.set(xlabel="tokens", ylabel="nats per token", title="loss")
    _finish(figure, (axes,), picture)


def _finish(figure: Any, panels: Sequence[Any], picture: Path) -> None:
    for axes in panels:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.savefig(picture, dpi=110)
