"""The sections of data and of long runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from esolm_megatron.config.section import Section
from esolm_megatron.errors import without_secrets


class PhaseConfig(Section):
    """What a run is trained with from some step on."""

    from_step: int = Field(ge=1)
    """Steps that are done when it begins."""
    set: dict[str, Any]
    """`section.field`: value, of those that --change may change."""


class GuardConfig(Section):
    """What is done about bad numbers and corrupted weights. Non-finite losses and gradient norms are always bad."""

    spike_factor: float = Field(20.0, ge=0)
    """A loss or gradient norm is bad above median + this x deviation of the good ones before it; 0 judges no spikes.
    The deviation is 1.4826 x the median absolute deviation, and at least 1 % of the median."""
    window: int = Field(256, ge=2)
    """Good steps that median and deviation are taken over."""
    min_history: int = Field(100, ge=2)
    """Good steps before spikes are judged."""
    rollback_after: int = Field(5, ge=1)
    """Bad batches in a row after which the run goes back to an earlier checkpoint."""
    rollback_skip_batches: int = Field(100, ge=0)
    """Batches before the first bad one that are left out too, as far as they come after that checkpoint."""
    max_rollbacks: int = Field(3, ge=0)
    """Rollbacks after which the run stops with a report instead."""
    skip_batches: tuple[int, ...] = ()
    """Numbers of batches that are never trained on; those that a resumed run is already past have no effect."""
    checksum_every_steps: int = Field(100, ge=0)
    """Steps between comparisons of all weights over data and context replicas and with master weights; 0 means never."""


class WatchdogConfig(Section):
    """When a run that no longer moves is ended, so that a scheduler can start it again."""

    enabled: bool = True
    """Watch each process."""
    step_factor: float = Field(10.0, gt=1)
    """A step may take this many times the median of the steps before it."""
    min_limit_s: float = Field(60.0, gt=0)
    """But never fewer seconds than this."""
    slow_limit_s: float = Field(1800.0, gt=0)
    """Seconds that anything else may take: start, first step, validation, saving, going back to a checkpoint."""


class SourceConfig(Section):
    """One source of a mixture."""

    path: str = Field(min_length=1)
    """Prepared tokens: as `data.path`."""
    weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Its share of the samples, relative to the other sources."""


class WeightChange(Section):
    """Weights that hold from a step on."""

    step: int = Field(ge=1)
    """The first batch, counted from 0, that is drawn with them."""
    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    """New weight by name of source; a source that is not named keeps its weight."""


class DataConfig(Section):
    """Which prepared tokens are read, and how."""

    path: str | None = Field(None, min_length=1)
    """Folder made by `esolm data prepare`, local, http(s)://, s3:// or pipe: with a command that writes the file {name}."""
    num_lanes: int = Field(16, ge=1)
    """Independent read positions that a batch is drawn from."""
    shuffle_window: int = Field(512, ge=1)
    """Sequences permuted together within a lane."""
    prefetch_batches: int = Field(4, ge=1)
    """Batches read ahead by a thread."""
    cross_document: bool = True
    """Attention crosses the boundaries of documents that share a row; false means that a token sees only its own."""
    sources: dict[str, SourceConfig] = Field({})
    """Instead of `data.path`: a mixture, {name: {path, weight}}."""
    weight_changes: tuple[WeightChange, ...] = ()
    """Steps from which the sources have other weights."""
    cache_dir: str | None = Field(None, min_length=1)
    """Folder on a local disk for shards of remote sources, shared by the processes of a node."""
    cache_gb: float = Field(100.0, gt=0)
    """Most that may lie in it, in 10^9 bytes; what was not used for longest is removed."""
    prefetch_shards: int = Field(8, ge=1)
    """Remote shards fetched before their first row is wanted."""
    retries: int = Field(5, ge=0)
    """Times that a failed download is tried again, after 0.5 s, then twice as long each time, give or take half."""
    timeout_s: float = Field(30.0, gt=0)
    """Seconds without a byte after which a download has failed."""
    min_mb_per_s: float = Field(1.0, gt=0)
    """Slowest download, in 10^6 bytes a second: one that is timeout_s behind this pace has failed."""
    on_corrupt: Literal["error", "skip"] = "error"
    """A row whose stored bytes are lost or wrong ends the run, or is left blank: it weighs nothing; events.jsonl lists it."""
    max_corrupt_rows: int | None = Field(None, ge=0)
    """With skip: more blank rows than this end the run. null: more than 1,000 and an eighth of the rows read so far."""


def data_problems(c: Any) -> Iterator[str]:
    """What does not fit together in the section of data."""
    d = c.data
    if d.path is None and not d.sources:
        yield "data.path: missing; give it a value"
    if d.path is not None and d.sources:
        yield f"data.path = {without_secrets(d.path)}: data.sources is given too; give one of them"
    if d.weight_changes and not d.sources:
        yield "data.weight_changes: needs data.sources"
    if d.sources and not any(source.weight for source in d.sources.values()):
        yield "data.sources: all weights are 0; give one of them a weight"
    weights = {name: source.weight for name, source in d.sources.items()}
    steps = [change.step for change in d.weight_changes]
    if steps != sorted(set(steps)):
        yield f"data.weight_changes: steps {steps} must rise"
    for change in d.weight_changes if d.sources else ():
        unknown = [name for name in change.weights if name not in weights]
        if unknown:
            yield f"data.weight_changes: step {change.step} names {unknown[0]!r}; data.sources has {', '.join(weights)}"
        weights |= change.weights
        if not any(weights.values()):
            yield f"data.weight_changes: from step {change.step} on all weights are 0"
    paths = [d.path, *(source.path for source in d.sources.values())]
    for path in (path for path in paths if path and is_remote(path)):
        said = without_secrets(path)
        if d.cache_dir is None:
            yield f"data.cache_dir = null: {said} is not on this machine; give a folder on a local disk for its shards"
        if path.startswith("pipe:") and "{name}" not in path:
            yield f"{said}: the command must have {{name}} where the file's name belongs"


def is_remote(path: str) -> bool:
    """Whether files of `path` are fetched, and not read where they are."""
    return path.startswith("pipe:") or "://" in path
