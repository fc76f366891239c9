"""The section of the optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from esolm_megatron.config.section import Section

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    """Optimizer, learning-rate schedule, clipping, and the moving average of the weights."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW for all; or Muon for the matrices of blocks, with updates as large as AdamW's, and AdamW for the rest."""
    lr: float = Field(3e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: float = Field(1e-8, gt=0)
    """Adam's denominator offset."""
    momentum: Decay = 0.95
    """Decay of Muon's momentum."""
    base_width: int | None = Field(None, ge=1)
    """The hidden_size that lr and model.init_std were found for; other widths scale both (muP). null: as they are."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay on matrices; vectors are never decayed."""
    clip_grad: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0 means no clipping."""
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    """After the warm-up: constant, cosine to the minimum, or constant and then linear to the minimum (WSD)."""
    warmup_steps: int = Field(2500, ge=0)
    """Steps of linear warm-up."""
    decay_steps: int = Field(0, ge=0)
    """Last steps of wsd over which the rate falls."""
    min_lr_fraction: float = Field(0.0, ge=0, le=1)
    """Final learning rate as a share of lr (cosine, wsd)."""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Decay of the moving average of the weights, whose weights sum to one from the first step on; 0 means none."""

    def width_ratio(self, width: int) -> float:
        """How much narrower than `width` the network was that lr and init_std were found for; 1 without base_width."""
        return (self.base_width or width) / width


def optim_problems(c: Any) -> Iterator[str]:
    """What is wrong with how weights are updated."""
    p, o, t = c.parallel, c.optim, c.train
    if o.name == "muon" and p.zero_stage == 3:
        yield "optim.name = muon: parallel.zero_stage = 3 updates pieces one by one, and it wants matrices; use zero_stage=1 or 2"
    if o.name == "muon" and p.offload_optimizer:
        yield "optim.name = muon: its products want the device; set parallel.offload_optimizer=false"
    if o.base_width and c.model.tied_embeddings:
        why = "a head scales with the width, and an embedding does not"
        yield f"optim.base_width = {o.base_width}: {why}; set model.tied_embeddings=false"
    if o.schedule == "wsd" and not 0 < o.decay_steps <= t.num_steps:
        yield f"optim.decay_steps = {o.decay_steps}: wsd needs between 1 and train.num_steps = {t.num_steps}"
    if o.schedule != "constant" and o.warmup_steps >= t.num_steps:
        yield f"optim.warmup_steps = {o.warmup_steps}: must be below train.num_steps = {t.num_steps}"
