"""All layouts of a run on so many GPUs, and the fastest of those that fit. No torch."""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table
from rich.text import Text

from esolm_megatron.config import Config, ConfigError, with_values
from esolm_megatron.config.yaml_text import value_of
from esolm_megatron.errors import of_setting
from esolm_megatron.plan.cost import DoesNotFit, Plan, plan
from esolm_megatron.plan.devices import Fabric, device_named
from esolm_megatron.plan.memory import GIB

KEPT_FREE = 0.1
"""Share of a device's memory for what is not planned: the libraries' own, fragments."""


_SHORT = {
    "parallel.tensor_size": "TP", "parallel.pipeline_size": "PP", "parallel.virtual_pipeline_size": "chunks",
    "parallel.context_size": "CP", "train.micro_batch_size": "rows", "parallel.recompute": "recompute",
}  # fmt: skip
"""What a layout sets, as the table calls it."""


@dataclass(frozen=True)
class Found:
    """The layouts of a search. best: fastest first, with the settings that make them. lost: why others are not among them."""

    gpus: int
    device: str
    tried: int
    best: list[tuple[dict[str, Any], Plan]]
    lost: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        best = [
            {
                "settings": words,
                **{name: getattr(x, name) for name in ("tokens_per_second", "mfu", "days", "memory_per_rank")},
            }
            for words, x in self.best
        ]
        return {"gpus": self.gpus, "device": self.device, "tried": self.tried, "lost": self.lost, "best": best}

    def __rich__(self) -> Group:
        title = f"layouts on {self.gpus} x {self.device}, fastest first; TP, PP, CP: tensor, pipeline, context ranks"
        table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
        for name in (*_SHORT.values(), "tokens/s", "MFU", "days", "GiB", "bubble"):
            table.add_column(name, justify="right", no_wrap=True)
        for words, x in self.best:
            assert x.times is not None
            cells = (f"{x.tokens_per_second:,.0f}", f"{x.mfu:.1%}", f"{x.days:.3g}", f"{x.memory_per_rank / GIB:.1f}")
            table.add_row(*(str(words[name]) for name in _SHORT), *cells, f"{x.times.bubble / x.times.step:.1%}")
        lost = ", ".join(f"{count:,} {why}" for why, count in self.lost.items())
        return Group(table, Text(f"{self.tried:,} layouts: {lost}"))


def fastest_layouts(
    config: Config, gpus: int, *, device: str = "H100", fabric: Fabric | None = None, most: int = 10
) -> Found:
    """The fastest layouts of `config` on `gpus` devices, the batch and all else than `parallel` staying as they are.

    Tried: tensor ranks within a node, pipeline stages and their chunks, context ranks, sequences of a micro-batch, and what
    is computed again; of layouts that differ in the last alone, that which keeps most and fits.

    Raises:
        ConfigError: none fits; says what is nearest. Or the device is not in the table.
    """
    fabric, room = fabric or Fabric(), device_named(device).memory_gib * (1 - KEPT_FREE) * GIB
    found: list[tuple[dict[str, Any], Plan]] = []
    lost, tried, nearest, kinds = Counter[str](), 0, math.inf, ("none", "selective", "full")
    for words in _layouts(config, gpus, fabric):
        for skipped, recompute in enumerate(kinds):
            tried += 1
            choice = {**words, "parallel.recompute": recompute}
            try:
                x = plan(_with(config, choice), gpus, device=device, fabric=fabric, most_bytes=room)
            except ConfigError:
                lost["break a rule of the configuration"] += 1
                break
            except DoesNotFit as error:
                lost["do not fit"] += 1
                nearest = min(nearest, error.taken)
                continue
            found.append((choice, x))
            lost["compute again what would fit"] += len(kinds) - 1 - skipped
            break
    if not found:
        near = "" if nearest == math.inf else f"; the nearest takes {nearest / GIB:.0f} GiB a GPU"
        raise ConfigError(
            f"--gpus {gpus}: no layout of {config.name} fits on {device}{near}; use more of them, or larger ones"
        )
    found.sort(key=lambda each: -each[1].tokens_per_second)
    lost["slower"] = max(0, len(found) - most)
    return Found(
        gpus,
        device,
        tried + lost["compute again what would fit"],
        found[:most],
        {why: n for why, n in lost.items() if n},
    )


def _layouts(config: Config, gpus: int, fabric: Fabric) -> Iterator[dict[str, Any]]:
    m, t = config.model, config.train
    twos = [2**n for n in range(12)]
    for tensor, stages, context in itertools.product(twos, range(1, m.num_layers + 1), twos):
        replica = tensor * stages * context
        if (
            tensor > fabric.gpus_per_node
            or context > 8
            or stages > 64
            or gpus % replica
            or m.num_heads % (tensor * context)
        ):
            continue
        replicas = gpus // replica
        for rows, chunks in itertools.product(twos[:6], (1, 2, 3, 4, 6, 8)):
            if (
                t.global_batch_size % (rows * replicas)
                or (stages == 1 and chunks > 1)
                or m.num_layers < stages * chunks
            ):
                continue
            if chunks > 1 and t.global_batch_size // (rows * replicas) % stages:
                continue
            yield {
                "parallel.tensor_size": tensor,
                "parallel.pipeline_size": stages,
                "parallel.context_size": context,
                "parallel.virtual_pipeline_size": chunks,
                "train.micro_batch_size": rows,
            }


def _with(config: Config, words: dict[str, Any]) -> Config:
    return with_values(config, **_sections(words))


def _sections(words: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All that a layout decides, section by section."""
    parallel = {name.split(".")[1]: value for name, value in words.items() if name.startswith("parallel.")}
    parallel |= {"sequence_parallel": parallel["tensor_size"] > 1, "layers_per_stage": None}
    if parallel["pipeline_size"] == 1:
        parallel |= {"deallocate_pipeline_outputs": False}
    return {"parallel": parallel, "train": {"micro_batch_size": words["train.micro_batch_size"]}}


def write_recipe(found: Found, base: str, overrides: list[str], file: str) -> None:
    """Write the fastest layout as a configuration that goes on from the file `base`, with what it was searched with.

    Raises:
        ConfigError: the file cannot be written.
    """
    words, x = found.best[0]
    grid, path = x.topology, Path(file)
    tree: dict[str, Any] = {}
    for override in overrides:
        *parents, last = override.partition("=")[0].split(".")
        reduce(lambda node, name: node.setdefault(name, {}), parents, tree)[last] = value_of(override, Config)
    for section, values in _sections(words).items():
        tree.setdefault(section, {}).update(values)
    context = f" x CP {grid.context_size}" if grid.context_size > 1 else ""
    text = (
        f"# The fastest layout of {Path(base).name} that `esolm plan search` found.\n"
        f"# For {found.gpus} x {found.device} (TP {grid.tensor_size} x PP {grid.pipeline_size}{context} x DP {grid.data_size}).\n\n"
    )
    tree.pop("name", None)  # which the plan has
    tree = {"base": os.path.relpath(base, path.parent), "name": f"{x.name}-{found.gpus}", **tree}
    with of_setting("--write", file):
        path.write_text(text + yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
