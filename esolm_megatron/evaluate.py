"""How well a model predicts given text: bounds on its perplexity, each under the name of its estimator.

They are numbers of two different models where alpha_0 > 0. Diffusion training predicts a masked token with other masks
before it; sampling one token a step, and the exact likelihood, predict it without. So `nelbo` bounds the likelihood of
the model that training sees, `any_order` and `importance_weighted` that of the model that samples one token a step;
`left_to_right` is the exact likelihood of the order that an autoregressive model has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from esolm_megatron.config import ConfigError, ObjectiveConfig
from esolm_megatron.model.transformer import EsoLM
from esolm_megatron.objective.esolm import DIFFUSION, SEQUENTIAL, draw_orders, draw_validation
from esolm_megatron.objective.likelihood import importance_weighted, log_likelihood

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
class Evaluation:
    """What `evaluate` found. diffusion_part and sequential_part add up to nelbo.nats_per_token.

    by_orders: K -> nats per token of the importance-weighted bound of K orders, for K = 1, 10, 100, ... and all, as far as
    they divide all; never rising, as each is a mean over disjoint groups of the same orders.
    """

    alpha_0: float
    num_sequences: int
    num_tokens: int
    num_orders: int
    seed: int
    nelbo: Estimate
    diffusion_part: float
    sequential_part: float
    any_order: Estimate
    importance_weighted: Estimate
    left_to_right: Estimate
    by_orders: dict[int, float]
    notes: tuple[str, ...]

    @property
    def estimates(self) -> dict[str, Estimate]:
        """Name -> estimate, in the order to show them."""
        return {name: getattr(self, name) for name in ("nelbo", "any_order", "importance_weighted", "left_to_right")}


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
    orders = orders if objective.alpha_0 > 0 else 1  # all orders are the same one
    text = _all_rows(batches, documents, model.shape.mask_id)
    tokens, valid, _ = text
    chunks = [slice(i, i + batch_size) for i in range(0, len(tokens), batch_size)]
    counts = valid.sum(1).astype(np.float64)
    parts = np.concatenate([_bound_parts(model, text, rows, objective, seed) for rows in chunks])
    log_p = _each_log_p(model, text, chunks, objective.alpha_0, orders, seed)
    tight = -importance_weighted(log_p).numpy()
    loose = -log_p.mean(0).numpy()
    straight = log_p if objective.alpha_0 == 0 else _each_log_p(model, text, chunks, 0.0, 1, seed)
    each = "left to right" if objective.alpha_0 == 0 else f"{orders} order{'s' if orders > 1 else ''} a sequence"
    return Evaluation(
        alpha_0=objective.alpha_0,
        num_sequences=len(tokens),
        num_tokens=int(counts.sum()),
        num_orders=orders,
        seed=seed,
        nelbo=_estimate(_bound_name(objective.alpha_0), parts.sum(1), counts),
        diffusion_part=float(parts[:, DIFFUSION].sum() / counts.sum()),
        sequential_part=float(parts[:, SEQUENTIAL].sum() / counts.sum()),
        any_order=_estimate(f"mean over orders of the exact -log p(x | order), {each}", loose, counts),
        importance_weighted=_estimate(f"-log mean over orders of the exact p(x | order), {each}", tight, counts),
        left_to_right=_estimate("exact -log p(x | left to right)", -straight[0].numpy(), counts),
        by_orders={k: float(-_in_groups(log_p, k).sum() / counts.sum()) for k in _group_sizes(orders)},
        notes=_notes(objective),
    )


def _group_sizes(orders: int) -> list[int]:
    tens = (10**power for power in range(len(str(orders))))
    return sorted({*(k for k in tens if orders % k == 0), orders})


def _in_groups(log_p: Tensor, size: int) -> Tensor:
    """The bound of `size` orders for each sequence (B,), its mean over the groups that log_p (K, B) has."""
    return torch.stack([importance_weighted(group) for group in log_p.split(size)]).mean(0)


_Text = tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64] | None]
"""Tokens, validity and numbers of documents, each (sequences, L)."""


def _all_rows(batches: Batches, documents: NDArray[np.int64] | None, mask_id: int) -> _Text:
    pairs = [(np.asarray(tokens), np.asarray(valid, bool)) for tokens, valid in batches]
    if len({tokens.shape[1] for tokens, _ in pairs}) > 1:
        raise ValueError(f"sequences have lengths {sorted({t.shape[1] for t, _ in pairs})}; pad them to one length")
    if not any(valid.any() for _, valid in pairs):
        raise ValueError("no valid token to evaluate on: the text is empty, or shorter than one sequence")
    tokens, valid = (np.concatenate(x) for x in zip(*pairs, strict=True))
    if documents is not None and documents.shape != tokens.shape:
        raise ValueError(f"documents {documents.shape} must have the shape of all sequences, {tokens.shape}")
    keep = valid.any(1)
    tokens, valid = np.where(valid, tokens, 0)[keep].astype(np.int64), valid[keep]
    if not 0 <= tokens.min() <= tokens.max() < mask_id:
        raise ValueError(f"tokens: ids must lie in 0 to {mask_id - 1}, found {tokens.min()} to {tokens.max()}")
    return tokens, valid, None if documents is None else documents[keep]


def _bound_parts(model: EsoLM, text: _Text, rows: slice, objective: ObjectiveConfig, seed: int) -> NDArray[np.float64]:
    """Nats of the two parts of the bound for each sequence: (B, 2)."""
    tokens, valid, documents = text
    ids = np.arange(len(tokens))[rows]
    noised = draw_validation(
        tokens[rows],
        valid[rows],
        ids,
        len(tokens),
        objective,
        mask_id=model.shape.mask_id,
        key=(seed, "evaluate"),
        documents=None if documents is None else documents[rows],
    )
    batch = noised.micro_batches[0].to(model.embedding.weight.device)
    losses = model(batch.tokens, batch.positions, batch.attend, targets=batch.targets, last=batch.last)
    present = (noised.num_valid > 0).nonzero()[:, 0].tolist()  # which parts there are, each one row a sequence
    sums = torch.zeros(len(present) * len(ids), dtype=torch.float64, device=losses.device)
    sums.index_add_(0, batch.sources, losses.double() * batch.weights)
    parts = np.zeros((len(ids), 2))
    parts[:, present] = sums.view(len(present), -1).T.cpu().numpy()
    return parts


def _each_log_p(model: EsoLM, text: _Text, chunks: list[slice], alpha_0: float, num_orders: int, seed: int) -> Tensor:
    return torch.cat([_order_log_p(model, text, rows, alpha_0, num_orders, seed) for rows in chunks], 1)


def _order_log_p(model: EsoLM, text: _Text, rows: slice, alpha_0: float, num_orders: int, seed: int) -> Tensor:
    """Exact log p(x | order_k): (K, B) fp64 on the CPU."""
    tokens, valid, documents = text
    device, ids = model.embedding.weight.device, np.arange(len(tokens))[rows]
    x, scored = torch.from_numpy(tokens[rows]).to(device), torch.from_numpy(valid[rows]).to(device)
    owners = None if documents is None else torch.from_numpy(documents[rows])
    out = []
    for k in range(num_orders):
        order = torch.from_numpy(draw_orders(valid[rows], ids, alpha_0, seed, "evaluate", k)).to(device)
        out.append(log_likelihood(model, x, order, scored=scored, documents=owners).double().cpu())
    return torch.stack(out)


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


def _notes(objective: ObjectiveConfig) -> tuple[str, ...]:
    if objective.alpha_0 == 0:
        return ("alpha_0 = 0: there is one order, so all numbers are the same exact one.",)
    missing = objective.alpha_0 * objective.time_epsilon
    return (
        "nelbo is a number of the model that predicts a token with other masks before it, the others "
        "of the one that samples one token a step: with alpha_0 > 0 these differ, so compare like with like.",
        f"nelbo's diffusion weights sum to {1 - missing:g} of what they stand for, so it is up to {missing:g} of itself too low.",
    )


@dataclass(frozen=True)
class TextRows:
    """Given text in rows of one length. tokens, valid: (rows, L); a document's last row is padded. The rest counts all of it."""

    tokens: NDArray[np.int64]
    valid: NDArray[np.bool_]
    num_words: int
    num_bytes: int

    @classmethod
    def of(cls, texts: Iterable[str], encode: Callable[[str], list[int]], length: int, most: int) -> TextRows:
        """Each document by itself, without an end-of-text token: a row sees nothing of the rows before it.

        most: rows that are wanted; no document is read after the one that fills them.

        Raises:
            ConfigError: there is no text.
        """
        rows, num_words, num_bytes = [], 0, 0
        for text in texts:
            ids = encode(text)
            rows += [ids[i : i + length] for i in range(0, len(ids), length)]
            num_words += len(text.split())
            num_bytes += len(text.encode())
            if len(rows) >= most:
                break
        if not rows:
            raise ConfigError("text: there is none to evaluate on; every document is empty")
        tokens, valid = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], valid[i, : len(row)] = row, True
        return cls(tokens, valid, num_words, num_bytes)

    def per_unit(self, estimate: Estimate) -> dict[str, float]:
        """Perplexity of a word (what white space separates) and bits of a UTF-8 byte, by what the whole text has of each."""
        nats = estimate.nats_per_token * int(self.valid.sum())
        try:
            words = math.exp(nats / self.num_words)
        except (OverflowError, ZeroDivisionError):
            words = math.inf
        return {"word_perplexity": words, "bits_per_byte": nats / self.num_bytes / math.log(2)}


def table(evaluation: Evaluation, text: TextRows | None = None) -> Table:
    """The estimates as a table for the terminal, what they are and notes below. text: that was evaluated, for words and bytes."""
    e = evaluation
    title = f"{e.num_tokens:,} tokens in {e.num_sequences:,} sequences, alpha_0 = {e.alpha_0:g}"
    out, below = (
        Table(title=title, caption_justify="left"),
        [f"{name}: {x.estimator}." for name, x in e.estimates.items()],
    )
    out.add_column("bound", no_wrap=True)
    for name in ("perplexity", "nats/token", *(() if text is None else ("per word", "bits/byte"))):
        out.add_column(name, justify="right")
    for name, x in e.estimates.items():
        nats = f"{x.nats_per_token:.4f} +- {x.standard_error:.4f}"
        units = [] if text is None else [f"{value:.4g}" for value in text.per_unit(x).values()]
        out.add_row(name, f"{x.perplexity:.3f}", nats, *units)
    if len(e.by_orders) > 1:
        bounds = ", ".join(f"K = {k}: {math.exp(nats):.3f}" for k, nats in e.by_orders.items())
        below.append(f"importance-weighted perplexity by orders: {bounds}.")
    if text is not None:
        below.append(
            f"per word: perplexity; a word is what white space separates. bits/byte: of UTF-8. By {text.num_words:,} words and "
            f"{text.num_bytes:,} bytes for {int(text.valid.sum()):,} tokens, those of the documents that were read."
        )
    out.caption = "\n".join([*below, *e.notes])
    return out


def as_dict(evaluation: Evaluation, text: TextRows | None = None) -> dict[str, Any]:
    """The same as a tree for JSON; a standard error of one sequence is null."""
    out = asdict(evaluation)
    for name, x in evaluation.estimates.items():
        error = None if math.isnan(x.standard_error) else x.standard_error
        out[name].update(perplexity=x.perplexity, standard_error=error)
        units = {} if text is None else text.per_unit(x)
        out[name].update({unit: value if math.isfinite(value) else None for unit, value in units.items()})
    counts = {} if text is None else {"num_words": text.num_words, "num_bytes": text.num_bytes}
    return {**out, **counts, "notes": list(evaluation.notes)}


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
