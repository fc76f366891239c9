"""What accelerators and the wires between them do: peaks from data sheets, shares of them from measurements."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from esolm_megatron.config import ConfigError, Section


@dataclass(frozen=True)
class Device:
    """A kind of accelerator: peak of dense bf16 matrix products, memory, and what of the peaks is reached.

    tbytes: memory's TB/s. link_gbytes: GB/s that a GPU sends to others of its node. fp8: peak of fp8 products as a multiple of
    that of bf16, 1 without them. products, attention (forward, backward), copies: shares of a peak that are reached, products by
    wide matrices; at a width of `narrow` it is half of that.
    measured: where these come from.
    """

    peak_tflops: float
    memory_gib: float
    tbytes: float
    link_gbytes: float
    fp8: float
    products: float
    attention: tuple[float, float]
    copies: float
    narrow: int
    measured: str


_H200 = "one H200, docs/gpu/h200-2026-11-26.json: a large product, cuDNN's attention, a copy; `narrow` by its steps"
_HOPPER = (0.80, (0.54, 0.42), 0.90, 700)
DEVICES = {
    "A100": Device(
        312, 80, 2.0, 300, 1, 0.80, (0.60, 0.50), 0.85, 400, "assumed, from published figures of its libraries"
    ),
    "H100": Device(989, 80, 3.35, 450, 2, *_HOPPER, _H200 + ", taken for its sister"),
    "H200": Device(989, 139, 4.8, 450, 2, *_HOPPER, _H200),
    "B200": Device(2250, 178, 8.0, 900, 2, *_HOPPER, _H200 + ", assumed of its successor"),
}
"""Peaks from the makers' data sheets (SXM boards); memory as a job sees it."""


def device_named(name: str) -> Device:
    """The device.

    Raises:
        ConfigError: it is not in the table.
    """
    if name not in DEVICES:
        raise ConfigError(f"device = {name!r}: not in the table; use one of {', '.join(DEVICES)} and give peak_tflops")
    return DEVICES[name]


class Fabric(Section):
    """What connects the GPUs of a cluster, and how often its nodes fail."""

    gpus_per_node: int = Field(8, ge=1)
    """GPUs that reach each other by NVLink."""
    link_gbytes: float | None = Field(None, gt=0)
    """GB/s that a GPU sends to others of its node; null means the device's."""
    network_gbytes: float = Field(50.0, gt=0)
    """GB/s that a GPU sends to other nodes; 50 is one 400 Gb/s port for each GPU."""
    latency_us: float = Field(15.0, ge=0)
    """Start of a collective, and of each message between nodes."""
    reached: float = Field(0.8, gt=0, le=1)
    """Share of these that collectives reach."""
    node_mtbf_days: float = Field(500.0, gt=0)
    """Mean days between failures of one node; 500 is a failure every 2.7 hours at 4,500 nodes (arXiv 2407.21783, 5.2)."""
    restart_s: float = Field(600.0, ge=0)
    """From a failure until the run trains again."""
    host_gbytes: float = Field(20.0, gt=0)
    """GB/s from a GPU to its host's memory: a checkpoint stops the run for its copy, and is written beside it."""
    storage_gbytes: float = Field(1.0, gt=0)
    """GB/s that each node writes to the file system."""
