"""KV-cached sampling: schedules, orders, exact draws, and the log-probability of what was drawn.

The phases are pure functions. A schedule says how many places each step fills, an order says which, `decode` runs the
network over the steps, and `draw_tokens` picks tokens. Random numbers are keyed by (seed, row, place): the same sample
comes from every split of the rows into batches.

Shapes: B rows, L places, S steps, M masks of a step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from esolm_megatron.model.cache import KVCache
from esolm_megatron.model.transformer import EsoLM
from esolm_megatron.objective.likelihood import check_rows
from esolm_megatron.objective.noise import alpha, uniforms, words
from esolm_megatron.objective.order import random_order

Schedule = Literal["binomial", "uniform"]
"""binomial: the ancestral sampler of the paper. uniform: equally many places in each diffusion step."""
Order = Literal["random", "left_to_right", "block_distant"]
"""Places of the diffusion steps: random, from the left, or random ones of which a step takes those farthest apart."""
Choose = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits (M, V), rows (M,), places (M,)) -> (M,) int64 tokens to put there."""


_BLOCK = 256


class Samples(tuple[Tensor, Tensor]):
    """(tokens (B, L) int64, log_probs (B, L)), with how they were made.

    log_probs: log-probability of each drawn token under the untempered model (temperature and top_p aside), given what
    its step saw; 0 at prompt positions. A row's sum is the exact log p of the row under its order and this schedule.
    order: (B, L) int64, the position generated k-th, the prompt's first. ks: places filled by each step.
    """

    order: Tensor
    ks: list[int]

    def __new__(cls, tokens: Tensor, log_probs: Tensor, order: Tensor, ks: Sequence[int]) -> Samples:
        """The two tensors as the tuple, the rest as attributes."""
        samples = super().__new__(cls, (tokens, log_probs))
        samples.order, samples.ks = order, list(ks)
        return samples

    def __getnewargs__(self) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        return self[0], self[1], self.order, self.ks

    @property
    def num_forward_passes(self) -> int:
        """Passes through the network, each over a few places of every row."""
        return len(self.ks)


def binomial_schedule(num_places: int, alpha_0: float, steps: int, *key: int | str, epsilon: float = 1e-3) -> list[int]:
    """Places that each diffusion step fills, empty steps left out; what is missing to `num_places` is sequential.

    With time falling from 1 to 0 in `steps` equal steps, a place still masked at t is filled on the way to s with
    probability (alpha(s) - alpha(t)) / (1 - alpha(t)). Products of what survives telescope, so a place's step is found
    from one uniform number. At alpha_0 = 1 nothing is left over.
    """
    clean = alpha(1 - np.arange(steps + 1) / steps, alpha_0, epsilon)
    filled_by = (clean[1:] - clean[0]) / (1 - clean[0])
    step = np.searchsorted(filled_by, uniforms(words(num_places, *key, "schedule")), side="right")
    counts = np.bincount(step, minlength=steps + 1)[:steps]
    return [int(k) for k in counts if k]


def uniform_schedule(num_places: int, alpha_0: float, steps: int) -> list[int]:
    """round(alpha_0 num_places) places over `steps` diffusion steps, or one a step if they are fewer than the steps.

    Sizes differ by one at most, larger ones first; what is missing to `num_places` is sequential.
    """
    return [len(part) for part in np.array_split(np.arange(round(alpha_0 * num_places)), steps) if len(part)]


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


@torch.inference_mode()
def decode(model: EsoLM, fed: Tensor, order: Tensor, ks: ArrayLike, choose: Choose, *, num_given: int = 0) -> None:
    """Fill `fed` in place, step by step, through the KV cache.

    fed: (B, L) int64 *in the generation order*; its first `num_given` places are known, the others are overwritten by
    what `choose` returns. order: (B, L). ks: (S,), or (B, S) for a schedule of its own in each row, places per step.
    """
    counts = torch.from_numpy(np.array(np.broadcast_to(ks, (len(fed), np.shape(ks)[-1])), dtype=np.int64))
    batch, length = fed.shape
    cache = KVCache(model.shape, batch, length, model.embedding.weight.dtype, fed.device)
    num_tokens = torch.full((batch,), num_given)
    for num_masks in counts[:, counts.any(0)].unbind(1):
        last = num_tokens + num_masks
        num_fed = int(last.max())
        slots = cache.begin_step(num_fed)
        index = torch.arange(num_fed)
        is_mask = (index >= num_tokens[:, None]) & (index < last[:, None])
        rows, columns = is_mask.nonzero(as_tuple=True)
        places = slots[rows, columns]
        device = fed.device
        slots = slots.clamp(max=length - 1).to(device)  # padding may be any token
        tokens = fed.gather(1, slots).masked_fill_(is_mask.to(device), model.shape.mask_id)
        logits = model(
            tokens.flatten(),
            order.gather(1, slots).flatten(),
            cache,
            places=(rows * num_fed + columns).to(device),
        )
        rows, places = rows.to(device), places.to(device)
        fed[rows, places] = choose(logits, rows, places)
        cache.end_step(num_tokens)
        num_tokens = num_masks


def draw_tokens(logits: Tensor, raw: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Tokens (M,) drawn from softmax(logits / temperature), and log-probabilities (M,) of them at temperature 1.

    logits: (M, V) fp32 or fp64. raw: (M,) int64 random words, one for each draw. temperature 0 takes the likeliest token.
    top_p: draw from the smallest set of likeliest tokens that holds this probability, after the temperature; of
    equally likely tokens all or none belong to it.
    """
    highest = logits.amax(-1, keepdim=True)
    vocab = logits.shape[1]
    weights = logits.new_zeros(len(logits), -(-vocab // _BLOCK), _BLOCK)
    flat = weights.flatten(1)[:, :vocab]
    if temperature == 0:
        flat.copy_(logits == highest)
    else:
        torch.sub(logits, highest, out=flat)
        flat.div_(temperature).exp_() if temperature != 1 else flat.exp_()
    by_block = _cumulative(weights)
    total = by_block[:, -1]
    tokens = _inverse_cdf(weights, by_block, raw)
    if top_p < 1:
        _into_nucleus(tokens, weights, raw, total * top_p)
    tokens.clamp_(max=vocab - 1)  # only logits that are no numbers get there
    normaliser = (highest[:, 0].double() + total.log()).to(logits.dtype)
    if temperature != 1:
        normaliser = logits.logsumexp(-1)
    return tokens, logits.gather(1, tokens[:, None])[:, 0] - normaliser


def _cumulative(weights: Tensor) -> Tensor:
    """Running sums over the blocks (M, blocks) fp64; within a block the weights' own type is precise enough."""
    return weights.sum(-1).double().cumsum(-1)


def _inverse_cdf(weights: Tensor, by_block: Tensor, raw: Tensor) -> Tensor:
    """Index (M,) drawn in proportion to `weights` (M, blocks, width): first its block, then the token in it.

    by_block: their running sums. An index of weight zero is never drawn.
    """
    uniform = ((raw >> 11) & ((1 << 53) - 1)).double() * 2.0**-53
    target = uniform * by_block[:, -1]
    block = _first_above(by_block, target)
    before = by_block.gather(1, (block - 1).clamp(min=0)[:, None])[:, 0].masked_fill(block == 0, 0.0)
    within = weights[torch.arange(len(block), device=block.device), block].double().cumsum(-1)
    return block * weights.shape[2] + _first_above(within, target - before)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """First place (M,) where a cumulative sum (M, K) exceeds the target; rounding never lets it pass the last increase."""
    total = cumulative[:, -1]
    target = torch.minimum(target.clamp(min=0), torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp(max=cumulative.shape[1] - 1)


def _into_nucleus(tokens: Tensor, weights: Tensor, raw: Tensor, enough: Tensor) -> None:
    """Draw `tokens` (M,) again, in place, where they are not among the likeliest that together weigh `enough` (M,).

    A token is outside if strictly likelier ones weigh enough already; then the next draw is among those likelier ones,
    which hold the whole nucleus. So what is accepted has the distribution restricted to the nucleus, exactly, and
    nothing is sorted.
    """
    left, drawn = torch.arange(len(tokens), device=tokens.device), tokens
    while True:
        chosen = weights.flatten(1).gather(1, drawn[:, None])[..., None]
        likelier = torch.where(weights > chosen, weights, 0)
        by_block = _cumulative(likelier)
        outside = by_block[:, -1] >= enough
        if not outside.any():
            return
        left, enough, raw = left[outside], enough[outside], _next_words(raw[outside])
        weights = likelier[outside]
        drawn = _inverse_cdf(weights, by_block[outside], raw)
        tokens[left] = drawn


def _next_words(raw: Tensor) -> Tensor:
    """The random word (M,) int64 after each word: one step of splitmix64, whose shifts must not keep the sign."""
    x = raw + (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))


def sample(
    model: EsoLM,
    num_samples: int,
    length: int,
    *,
    alpha_0: float,
    steps: int,
    top_p: float = 1.0,
    temperature: float = 1.0,
    seed: int = 0,
    prompt: Tensor | None = None,
    prompt_positions: Tensor | None = None,
    schedule: Schedule = "binomial",
    order: Order = "random",
    first_row: int = 0,
) -> Samples:
    """Sequences drawn from the model, with their log-probabilities.

    steps: diffusion steps T; the 1 - alpha_0 of the places that they leave are filled from the left, one a step.
    prompt: (P,) or (B, P) ids at `prompt_positions`, (P,) or (B, P), by default the first P; it comes first in the
    order, as given. order "left_to_right" fills the diffusion steps' places from the left too. first_row: id of the
    first sample, for batches that together are one call. Tokens and numbers are on the model's device.

    Raises:
        ValueError: an argument out of its range, said with the fix; or logits that are not numbers.
    """
    _check_numbers(num_samples, length, alpha_0, steps, top_p, temperature, schedule, order)
    given, positions = _check_prompt(prompt, prompt_positions, num_samples, length, model.shape.mask_id)
    device = model.embedding.weight.device
    num_given = given.shape[1]
    num_free, rows = length - num_given, range(first_row, first_row + num_samples)
    if schedule == "binomial":
        ks = binomial_schedule(num_free, alpha_0, steps, seed)
    else:
        ks = uniform_schedule(num_free, alpha_0, steps)
    order_BL = torch.from_numpy(draw_orders(positions, length, ks, order, rows, seed)).to(device)
    ks = ks + [1] * (num_free - sum(ks))
    raw_words = np.stack([words(length, seed, "token", row) for row in rows]).view(np.int64)
    raw = torch.from_numpy(raw_words).to(device)
    fed = torch.full((num_samples, length), model.shape.mask_id, device=device)
    fed[:, :num_given] = torch.from_numpy(given).to(device)
    log_probs = torch.zeros(num_samples, length, dtype=_wide(model), device=device)

    def choose(logits: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        tokens, log_probs[rows, places] = draw_tokens(logits, raw[rows, places], temperature, top_p)
        return tokens

    decode(model, fed, order_BL, ks, choose, num_given=num_given)
    if not bool(log_probs.isfinite().all()):
        raise ValueError("the model's logits are not finite numbers: check its weights, or load it in a wider dtype")
    return Samples(_by_position(fed, order_BL), _by_position(log_probs, order_BL), order_BL, ks)


def _wide(model: EsoLM) -> torch.dtype:
    return torch.float64 if model.embedding.weight.dtype == torch.float64 else torch.float32


def _by_position(in_order: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(in_order).scatter_(1, order, in_order)


def schedule_log_probs(model: EsoLM, tokens: Tensor, order: Tensor, ks: ArrayLike, *, num_given: int = 0) -> Tensor:
    """Log-probability (B, L) of each given token if it were drawn in this order with this schedule; no gradients.

    tokens, order: (B, L) int64. ks: (S,) or (B, S), places filled by each step, the first `num_given` of the order
    excepted, which are a prompt: known from the start, log-probability 0.

    Raises:
        ValueError: shapes differ, a row of `order` is no permutation, a token is outside the vocabulary, or the steps
            do not add up to the places.
    """
    check_rows(tokens, order, model.shape.mask_id)
    wanted, found = tokens.shape[1] - num_given, np.unique(np.sum(ks, axis=-1))
    if not np.array_equal(found, [wanted]) or np.min(ks, initial=0) < 0:
        raise ValueError(
            f"ks: steps fill {', '.join(map(str, found))} places; they must be at least 0 each and fill the {wanted} places "
            f"that {num_given} given ones leave of {tokens.shape[1]}"
        )
    in_order = tokens.gather(1, order)
    log_probs = torch.zeros(tokens.shape, dtype=_wide(model), device=tokens.device)

    def choose(logits: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        chosen = in_order[rows, places]
        log_probs[rows, places] = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(-1)
        return chosen

    decode(model, in_order.clone(), order, ks, choose, num_given=num_given)
    return _by_position(log_probs, order)


def schedule_log_likelihood(
    model: EsoLM, tokens: Tensor, order: Tensor, ks: ArrayLike, *, num_given: int = 0
) -> Tensor:
    """log p(tokens | order, schedule) of each row, exact, through the cached path: (B,). See `schedule_log_probs`."""
    return schedule_log_probs(model, tokens, order, ks, num_given=num_given).sum(1)


def _check_numbers(
    num_samples: int,
    length: int,
    alpha_0: float,
    steps: int,
    top_p: float,
    temperature: float,
    schedule: str,
    order: str,
) -> None:
    for name, count in (("num_samples", num_samples), ("length", length), ("steps", steps)):
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
            raise ValueError(f"{name} = {count!r}: must be a whole number of at least 1")
    if not 0 <= alpha_0 <= 1:
        raise ValueError(f"alpha_0 = {alpha_0}: must lie in 0 (left to right only) to 1 (diffusion only)")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p}: must lie above 0 and at most 1; 1 draws from all tokens")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature = {temperature}: must be a number of at least 0; 0 takes the likeliest token")
    for name, value, known in (("schedule", schedule, get_args(Schedule)), ("order", order, get_args(Order))):
        if value not in known:
            raise ValueError(f"{name} = {value!r}: must be one of {', '.join(known)}")
    if order == "block_distant" and schedule != "uniform":
        raise ValueError(
            f"schedule = {schedule!r}: order='block_distant' needs steps of one size; use schedule='uniform'"
        )


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
