"""Plans of generation: how many places each pass fills, which places those are, and the prompt before them.

All are functions of their arguments and of random numbers keyed by (seed, row): the same plan comes from every split of
the rows into batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esolm_megatron.inference.request import Cache, Draw, Order, Proposing, SampleRequest, Schedule, most_proposed
from esolm_megatron.objective.noise import alpha, uniforms, words
from esolm_megatron.objective.order import random_order


def binomial_schedule(num_places: int, alpha_0: float, steps: int, *key: int | str, epsilon: float = 1e-3) -> list[int]:
    """Places that each diffusion step fills, empty steps left out; what is missing to `num_places` is sequential.

    With time falling from 1 to 0 in `steps` equal steps, a place still masked at t is filled on the way to s with
    probability (alpha(s) - alpha(t)) / (1 - alpha(t)). Products of what survives telescope, so a place's step is found
    from one uniform number. At alpha_0 = 1 nothing is left over.
    """

    def filled_by(step: NDArray[np.int64]) -> NDArray[np.float64]:
        start, now = (alpha(1 - n / steps, alpha_0, epsilon) for n in (np.zeros(1, np.int64), step + 1))
        return (now - start) / (1 - start)

    chances = uniforms(words(num_places, *key, "schedule"))
    low, high = np.zeros(num_places, np.int64), np.full(num_places, steps)
    while (low < high).any():  # by halves, for steps may be many more than places
        middle = (low + high) // 2
        later = (low < high) & (filled_by(middle) <= chances)
        low, high = np.where(later, middle + 1, low), np.where(later | (low >= high), high, middle)
    return [int(k) for k in np.unique(low[low < steps], return_counts=True)[1]]


def first_hitting_schedule(num_places: int, alpha_0: float, *key: int | str, epsilon: float = 1e-3) -> list[int]:
    """One place for each pass of the diffusion part: `binomial_schedule` in the limit of infinitely many steps."""
    start, end = alpha(np.array([1.0, 0.0]), alpha_0, epsilon)
    return [1] * int((uniforms(words(num_places, *key, "schedule")) < (end - start) / (1 - start)).sum())


def uniform_schedule(num_places: int, alpha_0: float, steps: int) -> list[int]:
    """round(alpha_0 num_places) places over `steps` diffusion steps, or one a step if they are fewer than the steps.

    Sizes differ by one at most, larger ones first; what is missing to `num_places` is sequential.
    """
    count = round(alpha_0 * num_places)
    return [len(part) for part in np.array_split(np.arange(count), max(min(steps, count), 1)) if len(part)]


def draw_orders(
    prompt_positions: NDArray[np.int64], length: int, ks: Sequence[int], order: Order, rows: range, *key: int | str
) -> NDArray[np.int64]:
    """Generation orders (B, L): prompt positions (B, P) as given, diffusion places as `order` says, the rest from the left.

    ks: places of the diffusion steps. rows: B ids, which with `key` name the random numbers.
    """
    free = np.ones((len(rows), length), bool)
    np.put_along_axis(free, prompt_positions, False, axis=1)
    num_free = length - prompt_positions.shape[1]
    from_left = np.argsort(~free, axis=1, kind="stable")[:, :num_free]
    if order == "left_to_right":
        return np.concatenate([prompt_positions, from_left], axis=1)
    raw = np.stack([words(length, *key, "sampling order", row) for row in rows])
    shuffled = random_order(np.take_along_axis(raw, from_left, 1))
    diffusion, rest = np.split(shuffled, [sum(ks)], axis=1)
    if order == "block_distant":
        diffusion = np.sort(diffusion, axis=1)
        diffusion = np.concatenate([diffusion[:, step :: len(ks)] for step in range(len(ks))] or [diffusion], axis=1)
    places = np.concatenate([diffusion, np.sort(rest, axis=1)], axis=1)
    return np.concatenate([prompt_positions, np.take_along_axis(from_left, places, 1)], axis=1)


@dataclass(frozen=True)
class RowPlan:
    """What is decided about a row before its first pass.

    given: (P,) ids of the prompt, the first P of the order. order: (L,) positions. ks: places of each pass. raw: (L,)
    int64 random words, one for each place. draw: how its tokens are drawn. stop_id: see `sample`. proposing: None for tokens
    that are not proposed first.
    """

    given: NDArray[np.int64]
    order: NDArray[np.int64]
    ks: list[int]
    raw: NDArray[np.int64]
    draw: Draw
    stop_id: int | None
    proposing: Proposing | None = None


def plan_rows(request: SampleRequest, mask_id: int) -> list[RowPlan]:
    """The plan of each row that is asked for.

    Raises:
        ValueError: a field out of its range, said with the fix.
    """
    _check(request, mask_id)
    count, length, seed = request.num_samples, request.length, request.seed
    given, positions = _check_prompt(request.prompt, request.prompt_positions, count, length, mask_id)
    order = request.order
    wanted = None if isinstance(order, str) else _given_order(order, positions, count, length)
    num_free = length - given.shape[1]

    def sizes(*key: int | str) -> list[int]:
        if request.schedule == "uniform":
            return uniform_schedule(num_free, request.alpha_0, request.steps)
        if request.schedule == "first_hitting":
            return first_hitting_schedule(num_free, request.alpha_0, *key)
        return binomial_schedule(num_free, request.alpha_0, request.steps, *key)

    shared = None if request.own_schedules else sizes(seed)
    plans = []
    for i, row in enumerate(request.rows):
        ks = sizes(seed, "row", row) if shared is None else shared
        if wanted is None:
            places = draw_orders(positions[i : i + 1], length, ks, cast(Order, order), range(row, row + 1), seed)[0]
        else:
            places = wanted[i]
        raw = words(length, seed, "token", row).view(np.int64)
        proposing = None
        if request.propose != 1:
            propose = request.propose if isinstance(request.propose, str) else min(request.propose, max(num_free, 1))
            more = words(num_free * 2 * most_proposed(propose), seed, "proposals", row).view(np.int64)
            proposing = Proposing(propose, request.passes, more.reshape(num_free, 2 * most_proposed(propose)))
        ks = ks + [1] * (num_free - sum(ks))
        plans.append(RowPlan(given[i], places, ks, raw, request.draw, request.stop_id, proposing))
    return plans


def _check(request: SampleRequest, mask_id: int) -> None:
    for name in ("num_samples", "length", "steps"):
        count = getattr(request, name)
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
            raise ValueError(f"{name} = {count!r}: must be a whole number of at least 1")
    if not 0 <= request.alpha_0 <= 1:
        raise ValueError(f"alpha_0 = {request.alpha_0}: must lie in 0 (left to right only) to 1 (diffusion only)")
    named = request.order if isinstance(request.order, str) else "random"
    kinds = {"schedule": (request.schedule, Schedule), "order": (named, Order), "cache": (request.cache, Cache)}
    for name, (value, kind) in kinds.items():
        if value not in (known := get_args(kind)):
            raise ValueError(f"{name} = {value!r}: must be one of {', '.join(known)}")
    if named == "block_distant" and request.schedule != "uniform":
        raise ValueError(
            f"schedule = {request.schedule!r}: order='block_distant' needs steps of one size; use schedule='uniform'"
        )
    propose, passes = request.propose, request.passes
    if not (propose == "auto" or (isinstance(propose, int) and propose >= 1)) or passes not in (1, 2):
        raise ValueError(
            f"propose = {propose}, passes = {passes}: propose at least 1 token, or 'auto', in 1 or 2 passes"
        )
    if propose != 1 and request.schedule != "first_hitting":
        raise ValueError(
            f"schedule = {request.schedule!r}: verified proposals have the distribution of one token a pass; use "
            "schedule='first_hitting', or propose=1"
        )
    if propose != 1 and request.repetition_penalty != 1:
        raise ValueError(f"propose = {propose}: cannot be combined with repetition_penalty; use propose=1")
    if request.stop_id is not None and not 0 <= request.stop_id < mask_id:
        raise ValueError(
            f"stop_id = {request.stop_id}: must be an id of 0 to {mask_id - 1}, or None to fill every place"
        )


def _given_order(order: Tensor, prompt: NDArray[np.int64], num_samples: int, length: int) -> NDArray[np.int64]:
    """The caller's orders (B, L), with the prompt's positions (B, P) moved to the front."""
    found = _integer_rows("order", order, num_samples)
    if found.shape[1] != length or (np.sort(found, axis=1) != np.arange(length)).any():
        raise ValueError(f"order: each row must hold every position 0 to {length - 1} once")
    free = ~(found[:, :, None] == prompt[:, None]).any(-1)
    return np.concatenate([prompt, found[free].reshape(num_samples, -1)], axis=1)


def _check_prompt(
    prompt: Tensor | None, prompt_positions: Tensor | None, num_samples: int, length: int, mask_id: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Prompt ids and positions, each (B, P) int64; P = 0 without a prompt."""
    if prompt is None:
        if prompt_positions is not None:
            raise ValueError("prompt_positions: given without a prompt; give both, or neither")
        return np.empty((num_samples, 0), np.int64), np.empty((num_samples, 0), np.int64)
    ids = _integer_rows("prompt", prompt, num_samples)
    if prompt_positions is None:
        prompt_positions = torch.arange(ids.shape[1])
    positions = _integer_rows("prompt_positions", prompt_positions, num_samples)
    if ids.shape != positions.shape:
        raise ValueError(
            f"prompt_positions: {positions.shape[1]} positions for {ids.shape[1]} prompt tokens; give one for each token"
        )
    if ids.size and not 0 <= ids.min() <= ids.max() < mask_id:
        raise ValueError(f"prompt: ids must lie in 0 to {mask_id - 1}, found {ids.min()} to {ids.max()}")
    if positions.size and not 0 <= positions.min() <= positions.max() < length:
        raise ValueError(
            f"prompt_positions: must lie in 0 to {length - 1}, found {positions.min()} to {positions.max()}; "
            "shorten the prompt or raise length"
        )
    in_order = np.sort(positions, axis=1)
    if (in_order[:, 1:] == in_order[:, :-1]).any():
        raise ValueError("prompt_positions: a position is given twice in one row; give each prompt token its own")
    return ids, positions


def _integer_rows(name: str, values: Tensor, num_samples: int) -> NDArray[np.int64]:
    array = torch.as_tensor(values).detach().cpu()
    if array.numel() and (array.is_floating_point() or array.is_complex() or array.dtype == torch.bool):
        raise ValueError(f"{name}: must hold integers, found {array.dtype}")
    if array.dim() == 1:
        array = array.expand(num_samples, -1)
    if array.dim() != 2 or len(array) != num_samples:
        raise ValueError(f"{name}: shape {tuple(array.shape)} must be (P,) or (num_samples = {num_samples}, P)")
    return array.to(torch.int64).numpy().copy()
