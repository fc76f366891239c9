"""How well a model predicts given text: bounds on its perplexity, each under the name of its estimator.

They are numbers of two different models where alpha_0 > 0. Diffusion training predicts a masked token with other masks
before it; sampling one token a step, and the exact likelihood, predict it without. So `nelbo` bounds the likelihood of
the model that training sees, `any_order` and `importance_weighted` that of the model that samples one token a step;
`left_to_right` is the exact likelihood of the order that an autoregressive model has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from esolm_megatron.config import ObjectiveConfig
from esolm_megatron.evaluation.shares import Found, shared
from esolm_megatron.model.transformer import EsoLM
from esolm_megatron.objective.esolm import DIFFUSION, SEQUENTIAL, draw_orders, draw_validation
from esolm_megatron.objective.likelihood import importance_weighted, ordered_batch
from esolm_megatron.objective.noise import antithetic_times

Batches = Iterable[tuple[NDArray[np.int64], NDArray[np.bool_]]]
"""(tokens (B, L), valid (B, L), false on padding), of any number of rows."""


@dataclass(frozen=True)
class Estimate:
    """A bound on -log p per token, in nats.

    standard_error: over sequences, of a ratio of sums; what one draw of the noise adds is in it.
    """

    estimator: str
    nats_per_token: float
    standard_error: float

    @property
    def perplexity(self) -> float:
        """exp of the nats per token."""
        return math.exp(self.nats_per_token)


@dataclass(frozen=True)
class Curve:
    """Nats per token of the tokens between two neighbours of `edges` (n + 1), n numbers; None where there is no token."""

    edges: list[float]
    nats: list[float | None]

    @classmethod
    def of(
        cls, where: NDArray[np.float64], nats: NDArray[np.float64], counts: NDArray[np.float64], edges: list[float]
    ) -> Curve:
        """Sums of nats over `counts` tokens each, found at `where`, all (N,)."""
        bins = np.clip(np.searchsorted(edges, where, "right") - 1, 0, len(edges) - 2)
        sums, tokens = (np.bincount(bins, x, len(edges) - 1) for x in (nats, counts))
        return cls(edges, [float(x / n) if n else None for x, n in zip(sums, tokens, strict=True)])


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. diffusion_part and sequential_part add up to nelbo.nats_per_token.

    nelbo: None where rows begin with what is given. by_orders: K -> nats per token of the importance-weighted bound of K
    orders, for K = 1, 10, 100, ... and all, as far as they divide all; never rising, as each is a mean over disjoint groups
    of the same orders. by_position: estimator -> nats by place in the row. by_time: of the diffusion part, nats of a masked
    token, unweighted, by the time that was drawn.
    """

    alpha_0: float
    num_sequences: int
    num_tokens: int
    num_orders: int
    seed: int
    nelbo: Estimate | None
    diffusion_part: float | None
    sequential_part: float | None
    any_order: Estimate
    importance_weighted: Estimate
    left_to_right: Estimate
    by_orders: dict[int, float]
    by_position: dict[str, Curve]
    by_time: Curve | None
    notes: tuple[str, ...]

    @property
    def estimates(self) -> dict[str, Estimate]:
        """Name -> estimate, in the order to show them."""
        found = {name: getattr(self, name) for name in ("nelbo", "any_order", "importance_weighted", "left_to_right")}
        return {name: x for name, x in found.items() if x is not None}


@dataclass(frozen=True)
class Rows:
    """Sequences to be judged, all (N, L).

    tokens: int64. valid: false on padding, which comes last. scored: which valid tokens count; the others, at the start of
    a row, are given. documents: from `document_numbers`, for a model whose attention stays inside documents, or None.

    Raises:
        ValueError: no token to count, ids outside the vocabulary of `mask_id` tokens, or shapes that differ.
    """

    tokens: NDArray[np.int64]
    valid: NDArray[np.bool_]
    scored: NDArray[np.bool_]
    documents: NDArray[np.int64] | None = None

    @classmethod
    def of(
        cls,
        batches: Batches,
        mask_id: int,
        scored: NDArray[np.bool_] | None = None,
        documents: NDArray[np.int64] | None = None,
    ) -> Rows:
        """The rows of `batches` that have a token to count."""
        pairs = [(np.asarray(tokens), np.asarray(valid, bool)) for tokens, valid in batches]
        if len({tokens.shape[1] for tokens, _ in pairs}) > 1:
            raise ValueError(f"sequences have lengths {sorted({t.shape[1] for t, _ in pairs})}; pad them to one length")
        if not any(valid.any() for _, valid in pairs):
            raise ValueError("no valid token to evaluate on: the text is empty, or shorter than one sequence")
        tokens, valid = (np.concatenate(x) for x in zip(*pairs, strict=True))
        for name, array in (("documents", documents), ("scored", scored)):
            if array is not None and array.shape != tokens.shape:
                raise ValueError(f"{name} {array.shape} must have the shape of all sequences, {tokens.shape}")
        scored = valid if scored is None else valid & scored
        keep = scored.any(1)
        tokens, valid, scored = np.where(valid, tokens, 0)[keep].astype(np.int64), valid[keep], scored[keep]
        if not 0 <= tokens.min() <= tokens.max() < mask_id:
            raise ValueError(f"tokens: ids must lie in 0 to {mask_id - 1}, found {tokens.min()} to {tokens.max()}")
        return cls(tokens, valid, scored, None if documents is None else documents[keep])

    def __getitem__(self, which: slice) -> Rows:
        """Some of the rows."""
        documents = None if self.documents is None else self.documents[which]
        return Rows(self.tokens[which], self.valid[which], self.scored[which], documents)


@torch.inference_mode()
def evaluate(
    model: EsoLM,
    batches: Batches,
    objective: ObjectiveConfig,
    *,
    orders: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    documents: NDArray[np.int64] | None = None,
) -> Evaluation:
    """The bounds of all sequences that `batches` gives, on the model's device.

    objective: gives alpha_0 and the time range; the bound is always the `elbo` one, on both parts of every sequence.
    orders: K, how many orders are drawn for each sequence: `any_order` is their mean, `importance_weighted` their
    log-mean-exp, the same number at K = 1. batch_size: sequences in one pass; the numbers do not depend on it.
    documents: (sequences, L) from `document_numbers`, for a model whose attention stays inside documents.

    Raises:
        ValueError: no valid token, tokens outside the vocabulary, sequences of different lengths, documents of other
            sequences, or a count below 1.
    """
    for name, count in (("orders", orders), ("batch_size", batch_size)):
        if count < 1:
            raise ValueError(f"{name} = {count}: must be at least 1")
    rows = Rows.of(batches, model.shape.mask_id, documents=documents)
    job = Bounds(model, rows, objective, orders, seed, batch_size)
    return job.result(shared(job) or [])


@dataclass(frozen=True)
class Bounds:
    """The bounds of rows as a job whose parts are some rows each; see `evaluate`."""

    model: EsoLM
    rows: Rows
    objective: ObjectiveConfig
    orders: int
    seed: int
    batch_size: int

    @property
    def count(self) -> int:
        """Parts."""
        return -(-len(self.rows.tokens) // self.batch_size)

    @property
    def tokens(self) -> int:
        """Tokens that count, each once."""
        return int(self.rows.scored.sum())

    @property
    def given(self) -> bool:
        """Whether rows begin with tokens that are not counted."""
        return not np.array_equal(self.rows.scored, self.rows.valid)

    def prepare(self) -> None:
        """Nothing."""

    @torch.inference_mode()
    def part(self, number: int) -> Found:
        """Sums over each row of nats, or of tokens; `*_at` by place, over the part's rows."""
        first = number * self.batch_size
        rows = self.rows[first : first + self.batch_size]
        ids = np.arange(first, first + len(rows.tokens))
        alpha_0 = self.objective.alpha_0
        by_order = [-self._log_p(rows, ids, alpha_0, k) for k in range(self.orders if alpha_0 > 0 else 1)]
        straight = by_order[0] if alpha_0 == 0 else -self._log_p(rows, ids, 0.0, 0)
        found = {
            "tokens": rows.scored.sum(1),
            "orders": np.stack([x.sum(1) for x in by_order], 1),
            "left_to_right": straight.sum(1),
            "tokens_at": rows.scored.sum(0)[None],
            "any_order_at": np.mean([x.sum(0) for x in by_order], 0)[None],
            "left_to_right_at": straight.sum(0)[None],
        }
        if not self.given:
            found |= self._bound(rows, ids)
        return {name: array.tolist() for name, array in found.items()}

    def _log_p(self, rows: Rows, ids: NDArray[np.int64], alpha_0: float, k: int) -> NDArray[np.float64]:
        """Exact log p of each counted token in order k, given what comes before it: (B, L) fp64, 0 elsewhere."""
        order = draw_orders(rows.scored, ids, alpha_0, self.seed, "evaluate", k)
        place, length = np.argsort(order, 1), order.shape[1]
        given = rows.valid & ~rows.scored
        order = np.argsort(np.where(given, np.arange(length) - length, place), 1)  # what is given first, from the left
        device = self.model.embedding.weight.device
        batch = ordered_batch(
            rows.tokens, order, rows.scored.astype(np.float64), self.model.shape.mask_id, rows.documents
        )
        at = (batch.sources * length + batch.positions[batch.places]).numpy()
        batch = batch.to(device)
        losses = self.model(batch.tokens, batch.positions, batch.attend, targets=batch.targets, last=batch.last)
        out = np.zeros(rows.tokens.shape)
        out.ravel()[at] = -losses.double().cpu().numpy()
        return out

    def _bound(self, rows: Rows, ids: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """Nats of the two parts of the bound for each row, and of the diffusion part's masks by themselves."""
        noised = draw_validation(
            rows.tokens,
            rows.valid,
            ids,
            len(self.rows.tokens),
            self.objective,
            mask_id=self.model.shape.mask_id,
            key=(self.seed, "evaluate"),
            documents=rows.documents,
        )
        batch = noised.micro_batches[0].to(self.model.embedding.weight.device)
        losses = self.model(
            batch.tokens, batch.positions, batch.attend, targets=batch.targets, last=batch.last
        ).double()
        present = (noised.num_valid > 0).nonzero()[:, 0].tolist()  # which parts there are, each one row a sequence
        sums = losses.new_zeros(3, len(present) * len(ids))
        counted = torch.stack([losses * batch.weights, losses, torch.ones_like(losses)])
        weighted, plain, masks = sums.index_add_(1, batch.sources, counted).view(3, len(present), -1).cpu().numpy()
        parts = np.zeros((len(ids), 2))
        parts[:, present] = weighted.T
        out = {"parts": parts}
        if DIFFUSION in present:
            times = antithetic_times(ids, len(self.rows.tokens), self.objective.time_epsilon, self.seed, "evaluate")
            out |= {"times": times, "masked": masks[0], "masked_nats": plain[0]}
        return out

    def result(self, parts: list[Found]) -> Evaluation:
        """What all parts together say."""
        x = {name: np.concatenate([np.asarray(part[name], np.float64) for part in parts]) for name in parts[0]}
        counts, alpha_0, kinds = x["tokens"], self.objective.alpha_0, x["orders"].shape[1]
        log_p = -torch.from_numpy(x["orders"].T)
        each = "left to right" if alpha_0 == 0 else f"{kinds} order{'s' if kinds > 1 else ''} a sequence"
        nelbo = None if self.given else _estimate(_bound_name(alpha_0), x["parts"].sum(1), counts)
        shares = [None, None] if self.given else (x["parts"].sum(0) / counts.sum()).tolist()
        places, edges = np.arange(self.rows.tokens.shape[1]), _edges(self.rows.tokens.shape[1])
        tokens_at = x["tokens_at"].sum(0)
        return Evaluation(
            alpha_0=alpha_0,
            num_sequences=len(self.rows.tokens),
            num_tokens=int(counts.sum()),
            num_orders=kinds,
            seed=self.seed,
            nelbo=nelbo,
            diffusion_part=shares[DIFFUSION],
            sequential_part=shares[SEQUENTIAL],
            any_order=_estimate(
                f"mean over orders of the exact -log p(x | order), {each}", x["orders"].mean(1), counts
            ),
            importance_weighted=_estimate(
                f"-log mean over orders of the exact p(x | order), {each}", -importance_weighted(log_p).numpy(), counts
            ),
            left_to_right=_estimate("exact -log p(x | left to right)", x["left_to_right"], counts),
            by_orders={k: float(-_in_groups(log_p, k).sum() / counts.sum()) for k in _group_sizes(kinds)},
            by_position={
                name: Curve.of(places.astype(np.float64), x[f"{name}_at"].sum(0), tokens_at, edges)
                for name in ("any_order", "left_to_right")
            },
            by_time=Curve.of(x["times"], x["masked_nats"], x["masked"], [t / 10 for t in range(11)])
            if "times" in x
            else None,
            notes=_notes(self.objective, self.given),
        )


def _edges(length: int) -> list[float]:
    """Of at most 64 bins of places."""
    return [float(x) for x in np.unique(np.linspace(0, length, min(length, 64) + 1).round())]


def _group_sizes(orders: int) -> list[int]:
    tens = (10**power for power in range(len(str(orders))))
    return sorted({*(k for k in tens if orders % k == 0), orders})


def _in_groups(log_p: torch.Tensor, size: int) -> torch.Tensor:
    """The bound of `size` orders for each sequence (B,), its mean over the groups that log_p (K, B) has."""
    return torch.stack([importance_weighted(group) for group in log_p.split(size)]).mean(0)


def _estimate(estimator: str, nats: NDArray[np.float64], counts: NDArray[np.float64]) -> Estimate:
    """Sum of nats over sum of tokens, its standard error by the sequences' residuals (nan for one sequence)."""
    mean, n = nats.sum() / counts.sum(), len(nats)
    variance = ((nats - mean * counts) ** 2).sum() * n / (n - 1) if n > 1 else math.nan
    return Estimate(estimator, float(mean), math.sqrt(variance) / float(counts.sum()))


def _bound_name(alpha_0: float) -> str:
    if alpha_0 == 0:
        return "exact -log p(x), left to right"
    time = "one random time a sequence" if alpha_0 == 1 else "one random time and one random prefix set a sequence"
    return f"variational bound (NELBO), {time}"


def _notes(objective: ObjectiveConfig, given: bool) -> tuple[str, ...]:
    if given:
        return ("nelbo: not defined where a row begins with tokens that are given.",)
    if objective.alpha_0 == 0:
        return ("alpha_0 = 0: there is one order, so all numbers are the same exact one.",)
    missing = objective.alpha_0 * objective.time_epsilon
    return (
        "nelbo is a number of the model that predicts a token with other masks before it, the others "
        "of the one that samples one token a step: with alpha_0 > 0 these differ, so compare like with like.",
        f"nelbo's diffusion weights sum to {1 - missing:g} of what they stand for, so it is up to {missing:g} of itself too low.",
    )


def unigram_entropy(batches: Batches) -> float:
    """Nats per token of the best model that ignores context: the entropy of the valid tokens' frequencies.

    Raises:
        ValueError: there is no valid token.
    """
    counts = np.zeros(0, np.int64)
    for tokens, valid in batches:
        found = np.bincount(tokens[valid], minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    if not counts.any():
        raise ValueError("no valid token to count: the text is empty")
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
