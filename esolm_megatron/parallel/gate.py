"""A gate before the optimizer: a step is refused on all ranks together once its gradient norm is known.

The norm of a global batch exists only after the reduction over data ranks, inside DeepSpeed's step. DeepSpeed already has a
way out there, for a norm that is not finite: no update, and every buffer that holds gradients is cleared, whichever stage
and precision keeps them. The gate replaces the norm function during one step and answers infinity for a step that must not
be made. So a refused step runs the same collectives as any other, on every rank, whatever made it bad.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.zero import stage3


def _norm_function(optimizer: Any) -> tuple[Any, str]:
    """Where a DeepSpeed optimizer looks up what gives it the global norm."""
    if isinstance(optimizer, bf16_optimizer.BF16_Optimizer):
        return bf16_optimizer, "get_global_norm_of_tensors"
    if isinstance(optimizer, stage3.DeepSpeedZeroOptimizer_Stage3):
        return stage3, "combine_grad_norm_groups"
    return optimizer, "scaled_global_norm"


class Gate:
    """While entered, `problem_of(norm)` is asked before each update of `optimizer`; a text on any rank refuses it on all.

    norm: the global gradient norm; inf where a gradient is not finite. problem: why the last step was refused, or None.
    """

    def __init__(
        self, optimizer: Any, problem_of: Callable[[float], str | None], any_rank: Callable[[bool], bool]
    ) -> None:
        self.optimizer, self._problem_of, self._any_rank = optimizer, problem_of, any_rank
        self.norm, self.asked = float("inf"), False
        self.problem: str | None = None
        self._owner, self._name = _norm_function(optimizer)
        self._original = getattr(self._owner, self._name)

    def _judged(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        found = self._original(*args, **kwargs)
        self.norm, self.asked = float(found), True
        if self.norm < 0:  # DeepSpeed's sign for inf or nan
            self.norm = float("inf")
        self.problem = self._problem_of(self.norm)
        if not self._any_rank(self.problem is not None):
            return found
        self.problem = self.problem or "refused by another rank"
        return torch.full_like(torch.as_tensor(found), float("inf"))

    def __enter__(self) -> Gate:
        setattr(self._owner, self._name, self._judged)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        setattr(self._owner, self._name, self._original)
        if error is not None or self.asked:
            return
        if getattr(self.optimizer, "overflow", False):  # found on the way to the norm, and agreed on by all ranks
            self.problem = self._problem_of(self.norm) or "a gradient that is not finite"
        else:
            raise RuntimeError("DeepSpeed stepped without computing the gradient norm: bad steps would go unseen")
