"""Exact log-likelihoods of given texts, in drawn orders or left to right, after a prompt or without one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from esolm_megatron.inference.loaded_model import PretrainedEsoLM
from esolm_megatron.objective.esolm import draw_orders
from esolm_megatron.objective.likelihood import importance_weighted

Orders = Literal["generation", "random", "left_to_right"]
"""generation: as the model generates, a share of alpha_0 in random order and the rest from the left. random: all of it."""


@dataclass(frozen=True)
class Score:
    """What a text of `num_tokens` tokens got, in nats: exact log p(text | order) for each of K orders.

    any_order: their mean, and importance_weighted: log of the mean probability; both bound log p(text) from below.
    nats_per_token, perplexity: of importance_weighted, which with one order is that order's likelihood.
    """

    num_tokens: int
    log_p: list[float]
    any_order: float
    importance_weighted: float
    nats_per_token: float
    perplexity: float


def score(
    model: PretrainedEsoLM,
    tokens: list[int],
    prompt: list[int] | None = None,
    *,
    orders: int = 4,
    kind: Orders = "generation",
    alpha_0: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
) -> Score:
    """Log-likelihood of `tokens` after `prompt`, which is not counted. orders: K; one is enough from the left.

    Raises:
        ValueError: there is no token to score, or one outside the vocabulary.
    """
    prompt, count = prompt or [], len(tokens)
    if count == 0:
        raise ValueError("text: there is no token to score; give text of at least one token")
    if orders < 1 or batch_size < 1:
        raise ValueError(f"orders = {orders}, batch_size = {batch_size}: must be at least 1")
    if kind == "left_to_right":
        places = np.arange(count)[None]
    else:
        share = 1.0 if kind == "random" else model.alpha_0 if alpha_0 is None else alpha_0
        valid = np.ones((orders, count), bool)
        places = draw_orders(valid, np.arange(orders), share, seed, "score")
    given = np.broadcast_to(np.arange(len(prompt)), (len(places), len(prompt)))
    order = torch.from_numpy(np.concatenate([given, places + len(prompt)], axis=1))
    rows = torch.tensor([prompt + tokens]).expand_as(order)
    scored = torch.arange(rows.shape[1]).expand_as(rows) >= len(prompt)
    parts = zip(rows.split(batch_size), order.split(batch_size), scored.split(batch_size), strict=True)
    with torch.inference_mode():
        log_p = torch.cat([model.log_likelihood(*part).double().cpu() for part in parts])
    bound = importance_weighted(log_p[:, None]).item()
    perplexity = math.exp(min(-bound / count, 700.0))
    return Score(count, log_p.tolist(), log_p.mean().item(), bound, -bound / count, perplexity)
