"""A plan drawn: what each stage does when in the first micro-batches of a step, and what fills each stage's memory."""

from __future__ import annotations

from pathlib import Path

from esolm_megatron.config import ConfigError
from esolm_megatron.errors import of_setting, optional
from esolm_megatron.plan.cost import Plan
from esolm_megatron.plan.memory import GIB

PARTS = ("weights", "gradients", "optimizer", "buckets", "activations", "working")


def draw(plan: Plan, memory_gib: float, path: str | Path) -> None:
    """Write the picture. memory_gib: of a device.

    Raises:
        ConfigError: matplotlib is not installed, the name does not end in .png, or times were assumed.
    """
    if Path(path).suffix != ".png":
        raise ConfigError(f"--plot {path}: must end in .png")
    if plan.times is None:
        raise ConfigError(f"--plot {path}: draws predicted times; leave --mfu out")
    figure = optional("matplotlib.figure", f"--plot {path}").Figure(figsize=(12, 4.5), layout="constrained")
    figure.suptitle(
        f"{plan.name} on {plan.topology.world_size} x {plan.device}: {plan.seconds_per_step:.3g} s a step, {plan.mfu:.0%} MFU"
    )
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    for backward, colour in ((False, "tab:blue"), (True, "tab:orange")):
        mine = [span for span in plan.times.spans if span.backward == backward]
        places, widths = [x.stage for x in mine], [1e3 * (x.end - x.start) for x in mine]
        edges = {"edgecolor": "white", "linewidth": 0.3}
        left.barh(
            places,
            widths,
            left=[1e3 * x.start for x in mine],
            height=0.8,
            color=colour,
            label="backward" if backward else "forward",
            **edges,
        )
    played = max(span.micro_batch for span in plan.times.spans) + 1
    left.set(xlabel="ms", ylabel="pipeline stage", title=f"{played} of {plan.num_micro_batches} micro-batches")
    bottom = [0.0] * len(plan.stages)
    for part in PARTS:
        heights = [getattr(stage, part) / GIB for stage in plan.stages]
        right.bar(range(len(heights)), heights, bottom=bottom, label=part)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    right.axhline(memory_gib, color="black", ls="--", label=plan.device)
    right.set(xlabel="pipeline stage", ylabel="GiB on each rank", title="memory")
    for axes in (left, right):
        axes.legend(fontsize=8)
    left.invert_yaxis()
    left.set_yticks(range(len(plan.stages)))
    right.set_xticks(range(len(plan.stages)))
    with of_setting("--plot", str(path)):
        figure.savefig(path, dpi=110)
