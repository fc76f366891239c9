"""Which library's flash attention a process uses: chosen once, and tried on a small case before it is trusted.

All calls go through torch's own operators (`flash_forward` and `flash_backward` in model/attention.py). Newer torch can
put another library behind these: flash-attention 3 or 4, where it is installed and knows the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.attention as registry
from torch import Tensor

from esolm_megatron.model.attention import KERNELS, PackedAttention, PackedLayout

_LIBRARIES = ("FA4", "FA3")


class KernelError(RuntimeError):
    """No flash kernel of this GPU computes what it should."""


def choose(device: torch.device) -> str:
    """Choose the kernels of this process, and return what to call them in a log.

    Raises:
        KernelError: a GPU's kernels are wrong, or cannot run.
    """
    if device.type != "cuda":
        return "torch's flash attention for CPUs"
    activate: Callable[[str], None] | None = getattr(registry, "activate_flash_attention_impl", None)
    for library in _LIBRARIES if activate is not None else ():
        try:
            activate(library)  # type: ignore[misc]
            if error_of(device) < 0.02:
                return f"flash-attention {library[2:]}"
        except Exception:  # not installed, for another GPU, or without a backward pass: the next one
            pass
        registry.restore_flash_attention_impl(_raise_warn=False)
    for KERNELS.shared_heads in (True, False):
        try:
            error = error_of(device)
        except RuntimeError as problem:
            found = str(problem)
            continue
        if error < 0.02:
            return "torch's flash attention" + ("" if KERNELS.shared_heads else ", heads of keys repeated")
        found = f"relative error {error:.3g}"
    raise KernelError(f"flash attention of torch {torch.__version__} on {torch.cuda.get_device_name(device)}: {found}")


def error_of(device: torch.device) -> float:
    """The largest relative error, of outputs and gradients, of a small packed row in bf16 against fp32 on the CPU.

    It has all that training asks of the kernels: causal rows, a mask stream, and shared keys.
    """
    attend = PackedAttention(PackedLayout(128, 1, ((1, 48),)))
    generator = torch.Generator().manual_seed(0)
    shapes = ((304, 4, 64), (304, 2, 64), (304, 2, 64), (304, 4, 64))
    *inputs, grad = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)

    def results(there: torch.device, dtype: torch.dtype) -> list[Tensor]:
        given = [x.to(there, dtype).requires_grad_() for x in inputs]
        out = attend(0, *given)
        return [x.detach().float().cpu() for x in (out, *torch.autograd.grad(out, given, grad.to(there, dtype)))]

    pairs = zip(results(device, torch.bfloat16), results(torch.device("cpu"), torch.float32), strict=True)
    errors = [((a - b).norm() / b.norm()).item() for a, b in pairs]
    return float("inf") if any(map(math.isnan, errors)) else max(errors)
