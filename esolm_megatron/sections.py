"""What every section of the configuration is, and the sections of data and of long runs."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A frozen group of fields that refuses names it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


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
    """Steps between comparisons of all weights over the data-parallel replicas; 0 means never."""


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


class DataConfig(Section):
    """Which prepared tokens are read."""

    path: str
    """Folder made by `esolm data prepare`."""
    num_lanes: int = Field(16, ge=1)
    """Independent read positions that a batch is drawn from."""
    shuffle_window: int = Field(512, ge=1)
    """Sequences permuted together within a lane."""
    prefetch_batches: int = Field(4, ge=1)
    """Batches read ahead by a thread."""
    cross_document: bool = True
    """Attention crosses the boundaries of documents that share a row; false means that a token sees only its own."""
