"""The learning rate of each step."""

from __future__ import annotations

import math

from esolm_megatron.config.optim import OptimConfig


def learning_rate(step: int, optim: OptimConfig, num_steps: int) -> float:
    """Rate of the (0-based) step: linear warm-up, then constant, cosine, or warm-up-stable-decay (WSD)."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    low = optim.lr * optim.min_lr_fraction
    if optim.schedule == "cosine":
        done = (step - optim.warmup_steps) / max(1, num_steps - optim.warmup_steps)
        return low + (optim.lr - low) * (1 + math.cos(math.pi * min(1.0, done))) / 2
    if optim.schedule == "wsd":
        left = min(1.0, (num_steps - step) / optim.decay_steps)
        return low + (optim.lr - low) * left
    return optim.lr
