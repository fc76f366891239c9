"""Exact likelihoods in one pass, and the bounds made of them.

In a two-stream pass with *all* places in the mask stream, each token is predicted from the true tokens before it in the
order: the sum is log p(x | order), exactly. Its mean over orders bounds log p(x) from below (the any-order NELBO), and
log-mean-exp over K orders is the tighter importance-weighted bound.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esolm_megatron.model.transformer import EsoLM
from esolm_megatron.objective.esolm import SEQUENTIAL, OrderedRows, PackedBatch, pack


def ordered_batch(
    tokens: NDArray[np.int64],
    order: NDArray[np.int64],
    weights: NDArray[np.float64],
    mask_id: int,
    documents: NDArray[np.int64] | None = None,
) -> PackedBatch:
    """Rows as one two-stream micro-batch that predicts the places where `weights` is not zero. All arrays (B, L)."""
    rows = np.arange(len(tokens))
    everything = OrderedRows(tokens, order, np.ones(tokens.shape, bool), weights, rows, documents)
    return pack(None, [(everything, tokens.shape[1], SEQUENTIAL)], mask_id, 0)


def log_likelihood(
    model: EsoLM, tokens: Tensor, order: Tensor, *, scored: Tensor | None = None, documents: Tensor | None = None
) -> Tensor:
    """log p(tokens | order) of each row, exact, with gradients: (B,), fp32 or better.

    tokens, order: (B, L) int64; `order[k]` is the position generated k-th. scored: (B, L) bool, the positions whose
    log-probabilities are summed, all by default: leave out a prompt (which must come first in the order) or padding
    (which must come last). documents: (B, L) int64 from 0, which document each position belongs to; a token is then given
    those before it in its own document only. One document by default.

    Raises:
        ValueError: shapes differ, a row of `order` is no permutation, or a token is outside the vocabulary.
    """
    check_rows(tokens, order, model.shape.mask_id)
    if documents is not None and (documents.shape != tokens.shape or (documents.numel() and int(documents.min()) < 0)):
        raise ValueError(f"documents {tuple(documents.shape)} must be numbers from 0, (B, L) = {tuple(tokens.shape)}")
    weights = torch.ones_like(tokens) if scored is None else scored
    ids, places, counted = (x.detach().cpu().numpy() for x in (tokens, order, weights.to(torch.float64)))
    owners = None if documents is None else documents.detach().cpu().numpy()
    batch = ordered_batch(ids, places, counted, model.shape.mask_id, owners).to(tokens.device)
    losses = model(batch.tokens, batch.positions, batch.attend, targets=batch.targets, last=batch.last)
    return -losses.new_zeros(len(tokens)).index_add(0, batch.sources, losses)


def check_rows(tokens: Tensor, order: Tensor, mask_id: int) -> None:
    """Refuse rows that no likelihood is defined for (see `log_likelihood`)."""
    if tokens.dim() != 2 or tokens.shape != order.shape:
        raise ValueError(f"tokens {tuple(tokens.shape)} and order {tuple(order.shape)} must both be (B, L)")
    if not torch.equal(order.sort(dim=1).values, torch.arange(order.shape[1], device=order.device).expand_as(order)):
        raise ValueError(f"order: each row must hold every position 0 to {order.shape[1] - 1} once")
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < mask_id:
        raise ValueError(
            f"tokens: ids must lie in 0 to {mask_id - 1}, found {int(tokens.min())} to {int(tokens.max())}"
        )


def importance_weighted(log_p: Tensor) -> Tensor:
    """log mean_k exp(log p(x | order_k)). log_p: (K, B) -> (B,)."""
    return torch.logsumexp(log_p, dim=0) - torch.log(torch.tensor(float(log_p.shape[0]), dtype=log_p.dtype))
