"""Boxes of whole tensors: what a rank holds of each, and the check that all ranks together hold every element once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema", "momentum_buffer")


class CheckpointError(OSError):
    """A checkpoint that cannot be written or used; what a caller does about a full disk, it does about this."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that was whole once: a file is missing, cut short or changed."""


@dataclass(frozen=True)
class Piece:
    """A box of a whole tensor: `tensor` starts at `offset` in the tensor `name`, which has `whole_shape`.

    kind: one of KINDS. Any number of dimensions, none included; the three shapes have the same number.
    """

    kind: str
    name: str
    whole_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor


def check_piece(piece: Piece) -> None:
    """Raise CheckpointError unless a piece lies inside its tensor and is of a known kind."""
    what, shape = f"{piece.kind} {piece.name}", tuple(piece.tensor.shape)
    if piece.kind not in KINDS:
        raise CheckpointError(f"{what}: unknown kind {piece.kind!r}; use one of {', '.join(KINDS)}")
    if not piece.tensor.is_floating_point():
        raise CheckpointError(f"{what}: {piece.tensor.dtype} is no floating type; put whole numbers into the manifest")
    if not len(shape) == len(piece.offset) == len(piece.whole_shape):
        raise CheckpointError(
            f"{what}: shape {shape}, offset {piece.offset}, whole {piece.whole_shape} differ in length"
        )
    for size, start, whole in zip(shape, piece.offset, piece.whole_shape, strict=True):
        if start < 0 or start + size > whole:
            raise CheckpointError(
                f"{what}: a box of {shape} at {piece.offset} reaches out of the whole {piece.whole_shape}"
            )


@dataclass
class Box:
    """Where a saved box is: under `key` in `file`, at `offset` in its tensor."""

    file: str
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass
class Indexed:
    """A whole tensor, and for each kind the boxes that hold it."""

    shape: tuple[int, ...]
    kinds: dict[str, list[Box]]


def add_boxes(index: dict[str, Indexed], listing: Mapping[str, Any]) -> None:
    """Add what a rank listed to the index; raises CheckpointError if ranks differ on a tensor's shape."""
    for item in listing["boxes"]:
        name, whole = item["name"], tuple(item["whole_shape"])
        tensor = index.setdefault(name, Indexed(whole, {}))
        if tensor.shape != whole:
            raise CheckpointError(
                f"{name}: {listing['file']} says its whole shape is {whole}, another rank {tensor.shape}"
            )
        box = Box(listing["file"], item["key"], tuple(item["offset"]), tuple(item["shape"]))
        tensor.kinds.setdefault(item["kind"], []).append(box)


def bounds(boxes: Sequence[Box]) -> tuple[np.ndarray, np.ndarray]:
    """First and one-past-last indices of each box, (boxes, dimensions)."""
    size = (len(boxes), len(boxes[0].shape))
    starts = np.array([box.offset for box in boxes], np.int64).reshape(size)
    return starts, starts + np.array([box.shape for box in boxes], np.int64).reshape(size)


def check_cover(name: str, whole: tuple[int, ...], boxes: Sequence[Box]) -> None:
    """Raise CheckpointError unless the boxes hold each element of the whole exactly once."""
    starts, ends = bounds(boxes)
    for first in range(0, len(boxes), 256):
        rows = slice(first, first + 256)
        meet: np.ndarray = np.all((starts[rows, None] < ends[None]) & (ends[rows, None] > starts[None]), axis=-1)
        meet[np.arange(len(meet)), first + np.arange(len(meet))] = False
        if meet.any():
            i, j = (int(n) for n in np.argwhere(meet)[0])
            a, b = boxes[first + i], boxes[j]
            raise CheckpointError(
                f"{name}: overlap of the box of {a.shape} at {a.offset} in {a.file} "
                f"and that of {b.shape} at {b.offset} in {b.file}"
            )
    held, wanted = int((ends - starts).prod(-1).sum()), math.prod(whole)
    if held != wanted:
        raise CheckpointError(f"{name}: gap: the boxes of all ranks hold {held} of the {wanted} elements of {whole}")


def slices(first: Iterable[int], last: Iterable[int]) -> tuple[slice, ...]:
    """Slices from the first to one past the last index of each dimension."""
    return tuple(slice(int(a), int(b)) for a, b in zip(first, last, strict=True))
