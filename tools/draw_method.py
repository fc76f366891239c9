"""Draws docs/method.png: the method on one sentence, from the functions that train and sample.

    python tools/draw_method.py [PICTURE.png]

Orders, masks and packed rows come from objective.esolm, sampling from decoding.decoder. What sees what is measured: with
queries and keys of zero every visible key gets the same weight, and values that name their token show which those are.
"""

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import torch

from esolm_megatron.config import ModelConfig, ObjectiveConfig
from esolm_megatron.inference.decoding.decoder import decode
from esolm_megatron.inference.decoding.scheduler import binomial_schedule
from esolm_megatron.inference.decoding.scheduler import draw_orders as sampling_orders
from esolm_megatron.model.layers import PlainLinears
from esolm_megatron.objective.esolm import draw_diffusion, draw_sequential, pack

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch, Rectangle

PICTURE = Path(__file__).parent.parent / "docs" / "method.png"
FACTS = "esolm facts"
"""Name of the text in the picture that holds the hash of what was drawn; tests/test_docs.py compares it."""

WORDS = ["we", "read", "old", "books", "at", "night"]
LENGTH, MASK = len(WORDS), len(WORDS)
CAPACITY = 4
SEEDS = {"diffusion": 28, "sequential": 23, "sampling": 20}  # chosen by eye: three masks, orders unlike the sentence's

CLEAN, MASKED, CACHED, FAINT, INK = "#2f6fb0", "#e08a1e", "#a9c6e3", "#e4e7eb", "#22272e"


def packed_row(kind: str) -> dict:
    """A row on the diffusion or the sequential loss: labels of its tokens, what each predicts, and what sees what."""
    tokens, valid, rows = np.arange(LENGTH)[None], np.ones((1, LENGTH), bool), np.zeros(1, np.int64)
    key = (SEEDS[kind], 0)
    if kind == "diffusion":
        drawn = draw_diffusion(tokens, valid, rows, 1, ObjectiveConfig(alpha_0=1.0), *key)
        batch = pack(drawn, [], MASK, *key)
    else:
        drawn = draw_sequential(tokens, valid, rows, 0.5, CAPACITY, *key)
        batch = pack(None, [(drawn, CAPACITY, 1)], MASK, *key)
    count = batch.layout.num_tokens
    zeros, names = torch.zeros(count, 1, count), torch.eye(count)[:, None]
    sees = batch.attend(0, zeros, zeros, names)[:, 0] > 0
    return {
        "order": drawn.order[0].tolist(),
        "fed": batch.tokens.tolist(),
        "positions": batch.positions.tolist(),
        "predicts": dict(zip(batch.places.tolist(), batch.targets.tolist(), strict=True)),
        "sees": sees.int().tolist(),
    }


class Network(SimpleNamespace):
    """What `decode` needs of a network; `answer` is called in its place."""

    def __call__(self, *args, **options):
        """The answer."""
        return self.answer(*args, **options)

    def parameters(self):
        """None."""
        return iter(())

    def logits(self, hidden):
        """What was answered."""
        return hidden


def sampled() -> dict:
    """Each pass of a sampler with two diffusion steps: what it feeds, and which cached and fed keys each token sees."""
    seed, rows = SEEDS["sampling"], range(1)
    steps = binomial_schedule(LENGTH, 0.5, 2, seed)
    order = sampling_orders(np.empty((1, 0), np.int64), LENGTH, steps, "random", rows, seed)
    steps = steps + [1] * (LENGTH - sum(steps))
    shape = ModelConfig(num_layers=1, hidden_size=2 * LENGTH, num_heads=1, vocab_size=LENGTH + 1, seq_length=LENGTH)
    place = {position: k for k, position in enumerate(order[0].tolist())}
    passes = []

    def network(tokens, positions, cache, last, head):
        slot = torch.tensor([place[p] for p in positions.tolist()])
        is_mask = tokens == MASK
        names = torch.eye(2 * LENGTH)[slot + LENGTH * is_mask][:, None]  # clean tokens, then masks
        zeros = torch.zeros_like(names)
        sees = cache(0, zeros, zeros, names)[:, 0] > 0
        passes.append({"slots": slot.tolist(), "masks": is_mask.int().tolist(), "sees": sees.int().tolist()})
        return torch.zeros(len(last.fed), LENGTH + 1)

    weights = SimpleNamespace(weight=torch.zeros(1))
    model = Network(shape=shape, embedding=weights, linears=PlainLinears(), answer=network)
    fed = torch.full((1, LENGTH), MASK)
    answers = torch.from_numpy(order)
    decode(model, fed, answers, steps, lambda logits, rows, places: answers[rows, places])
    assert torch.equal(fed, answers)
    return {"order": order[0].tolist(), "steps": steps, "passes": passes}


def facts() -> dict:
    """Everything that the picture shows and that the code decides."""
    return {"diffusion": packed_row("diffusion"), "sequential": packed_row("sequential"), "sampling": sampled()}


def digest(drawn: dict) -> str:
    """Hash of `facts()`."""
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()


def cell(axes, column: float, row: int, colour: str) -> None:
    """A unit square; rows count downwards."""
    axes.add_patch(Rectangle((column, -row - 1), 1, 1, facecolor=colour, edgecolor="white", lw=1.5))


def label(axes, x: float, y: float, text: str, colour: str = INK, **options) -> None:
    """A text in the picture's own size."""
    axes.text(x, y, text, color=colour, **{"fontsize": 9, "va": "center", **options})


def frame(axes, title: str, caption: str, width: float, height: float, top: float = 2.2) -> None:
    """Limits, title and caption of one panel."""
    axes.set(xlim=(-2.4, width), ylim=(-height, top), aspect="equal", anchor="N")
    axes.axis("off")
    axes.set_title(title, color=INK, fontsize=11, fontweight="bold", loc="left", pad=4)
    label(axes, -2.4, -height, caption, fontsize=8.8, va="top", linespacing=1.45)


def draw_row(axes, row: dict, title: str, caption: str, *, two_streams: bool) -> None:
    """The visibility matrix of a packed row."""
    fed, count = row["fed"], len(row["fed"])
    gap = [0.6 if two_streams and i >= LENGTH else 0.0 for i in range(count)]
    names = ["M" if token == MASK else WORDS[token] for token in fed]
    for i in range(count):
        colour = MASKED if fed[i] == MASK else CLEAN
        y = -i - 0.5 - gap[i]
        label(axes, -0.2, y, f"{names[i]} @{row['positions'][i]}", colour, ha="right")
        label(
            axes,
            i + 0.5 + gap[i],
            0.2,
            f"{names[i]} @{row['positions'][i]}",
            colour,
            rotation=60,
            va="bottom",
            ha="left",
        )
        for j in range(count):
            shade = (MASKED if fed[j] == MASK else CLEAN) if row["sees"][i][j] else FAINT
            cell(axes, j + gap[j], i + gap[i], shade)
        if i in row["predicts"]:
            label(axes, count + gap[-1] + 0.2, y, f"→ {WORDS[row['predicts'][i]]}", INK)
    if two_streams:
        middle = LENGTH / 2
        label(axes, middle, 2.5, "clean stream", CLEAN, ha="center", fontweight="bold")
        label(axes, LENGTH + 0.9 + (count - LENGTH) / 2, 2.5, "mask stream", MASKED, ha="center", fontweight="bold")
    frame(axes, title, caption, count + gap[-1] + 2.6, count + gap[-1] + 0.6, top=3.0)


def draw_sampling(axes, drawn: dict, title: str, caption: str) -> None:
    """Every pass of the sampler: one line for each fed token, one column for each place of the order."""
    for k, position in enumerate(drawn["order"]):
        label(axes, k + 0.5, 0.2, f"{WORDS[position]} @{position}", INK, rotation=60, va="bottom", ha="left")
    y = 0.0
    for number, one in enumerate(drawn["passes"], 1):
        start = y
        for slot, masked, sees in zip(one["slots"], one["masks"], one["sees"], strict=True):
            for k in range(LENGTH):
                shade = FAINT
                if sees[k]:
                    shade = CLEAN if k in clean_now(one) else CACHED
                if sees[LENGTH + k]:
                    shade = MASKED
                cell(axes, k, y, shade)
            position = drawn["order"][slot]
            name = f"M @{position}" if masked else f"{WORDS[position]} @{position}"
            label(axes, -0.2, -y - 0.5, name, MASKED if masked else CLEAN, ha="right")
            if masked:
                label(axes, LENGTH + 0.2, -y - 0.5, f"→ {WORDS[position]}")
            y += 1
        label(axes, LENGTH + 2.5, -(start + y) / 2, f"pass {number}", "#6b7480")
        y += 0.35
    frame(axes, title, caption, LENGTH + 4.2, y + 0.3, top=3.0)


def clean_now(one: dict) -> set[int]:
    """Slots whose clean tokens this pass feeds; other clean ones are cached."""
    return {slot for slot, masked in zip(one["slots"], one["masks"], strict=True) if not masked}


def draw(path: Path) -> None:
    """Write the picture."""
    drawn = facts()
    figure, panels = plt.subplots(1, 3, figsize=(12.6, 6.3), width_ratios=[1.0, 1.4, 1.05], facecolor="white")
    draw_row(
        panels[0], drawn["diffusion"], "1  Training, diffusion row",
        "Clean tokens first, then masks,\neach in random order; plain causal\n"
        "attention over that order. M predicts\nthe token at its own position (@).",
        two_streams=False,
    )  # fmt: skip
    draw_row(
        panels[1], drawn["sequential"], "2  Training, sequential row",
        f"Clean tokens in random order, then masked ones left to right.\nThe mask stream holds the last {CAPACITY} places of "
        "the order: a fixed\nnumber. Each mask sees the true tokens before its place, and\nitself. One that carries no "
        "loss has no arrow.",
        two_streams=True,
    )  # fmt: skip
    diffusion = sum(1 for k in drawn["sampling"]["steps"] if k > 1)
    draw_sampling(
        panels[2], drawn["sampling"], "3  Sampling with a KV cache",
        f"The first {diffusion} passes fill several places at once,\nthe rest one each, left to right. A pass feeds\n"
        "the tokens of the one before, and masks;\nmasks are never cached.",
    )  # fmt: skip
    names = (
        (CLEAN, "sees a clean token"),
        (CACHED, "sees a cached one"),
        (MASKED, "sees a mask"),
        (FAINT, "does not see"),
    )
    figure.legend(
        handles=[Patch(color=colour, label=name) for colour, name in names], ncols=4, loc="lower center",
        frameon=False, fontsize=9.5, labelcolor=INK,
    )  # fmt: skip
    figure.subplots_adjust(left=0.01, right=0.995, top=0.945, bottom=0.075, wspace=0.02)
    figure.savefig(path, dpi=100, metadata={FACTS: digest(drawn), "Software": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
