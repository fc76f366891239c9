"""What a run will read of each source, before it starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from esolm_megatron.config import Config
from esolm_megatron.data.stream.mixture import Phase
from esolm_megatron.data.stream.token_stream import TokenStream
from esolm_megatron.errors import of_setting, optional, without_secrets

_POINTS = 400


@dataclass(frozen=True)
class SourceMix:
    """One source's part in a run. weights: its share from each of the phases' first batches on."""

    name: str
    path: str
    tokens: int
    weights: tuple[float, ...]
    samples: int
    tokens_read: int
    epochs: float


@dataclass(frozen=True)
class Mix:
    """What a run of `num_steps` steps reads. curves: epochs of each source after each of `steps`."""

    num_steps: int
    phases: tuple[int, ...]
    sources: tuple[SourceMix, ...]
    steps: tuple[int, ...]
    curves: dict[str, tuple[float, ...]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"num_steps": self.num_steps, "phases": self.phases, "sources": [asdict(s) for s in self.sources]}

    def as_table(self) -> Table:
        """For a person."""
        out = Table(title=f"{self.num_steps:,} steps")
        out.add_column("source")
        heads = [f"share from step {start:,}" for start in self.phases]
        for head in ("tokens", *heads, "samples", "tokens read", "epochs"):
            out.add_column(head, justify="right")
        for source in self.sources:
            shares = [f"{weight:.2%}" for weight in source.weights]
            out.add_row(
                source.name, f"{source.tokens:,}", *shares, f"{source.samples:,}", f"{source.tokens_read:,}", f"{source.epochs:.3f}"
            )  # fmt: skip
        return out

    def plot(self, file: str | Path) -> None:
        """Draw the shares and the epochs of each source over the run."""
        figure = optional("matplotlib.figure", f"plot = {str(file)!r}").Figure(figsize=(8, 5), layout="constrained")
        shares, epochs = figure.subplots(2, 1, sharex=True)
        ends = [*self.phases, self.num_steps]
        low = np.zeros(len(ends))
        for source in self.sources:
            high = low + np.array([*source.weights, source.weights[-1]])
            shares.fill_between(ends, low, high, step="post", label=source.name, alpha=0.8)
            low = high
            epochs.plot(self.steps, self.curves[source.name], label=source.name)
        shares.set(ylabel="share of samples", ylim=(0, 1))
        epochs.set(xlabel="step", ylabel="epochs read", xlim=(0, self.num_steps))
        epochs.grid(alpha=0.3)
        epochs.legend()
        with of_setting("plot", str(file)):
            figure.savefig(file, dpi=110)


def mix(config: Config) -> Mix:
    """What the run of `config` will read of each of its sources; batches that it leaves out are not known yet.

    Raises:
        DataError: a source is not there, or they do not go together.
    """
    num_steps = config.train.num_steps
    stream = TokenStream.of(config)
    phases: list[Phase] = [phase for phase in stream.mixture.phases if phase.start < num_steps]
    steps = sorted({*np.linspace(0, num_steps, _POINTS).astype(int).tolist(), *(phase.start for phase in phases)})
    counts, end = [stream.counts(step) for step in steps], stream.counts(num_steps)
    sources = tuple(
        SourceMix(
            name,
            without_secrets(source.path),
            source.reader.manifest.splits[stream.split].tokens,
            tuple(float(phase.weights[index]) for phase in phases),
            int(end[name]["samples"]),
            int(end[name]["tokens"]),
            end[name]["epochs"],
        )
        for index, (name, source) in enumerate(stream.sources.items())
    )
    stream.close()
    curves = {name: tuple(count[name]["epochs"] for count in counts) for name in end}
    return Mix(num_steps, tuple(phase.start for phase in phases), sources, tuple(steps), curves)
