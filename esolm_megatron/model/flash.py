"""Which libraries' attention a process uses: tried on a small case before it is trusted, and timed at the run's own shapes.

Calls with runs (documents, the last block) go to torch's operator, behind which newer torch can put another library:
flash-attention 3 or 4, where it is installed and knows the GPU. Calls whose shape stays the same through a run go to
whichever of the right ones was fastest.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.attention as registry
from torch import Tensor

from esolm_megatron.errors import UserError
from esolm_megatron.model import kernels
from esolm_megatron.model.attention import Calls, PackedAttention, PackedLayout
from esolm_megatron.model.kernels import Call, Chosen, Cudnn, FlashPackage, Kernel, TorchFlash, laid_out_as

_LOG = logging.getLogger(__name__)
_LIBRARIES, PACKAGE = ("FA4", "FA3"), "flash_attn.flash_attn_interface"
MOST_ERROR = 0.02
"""Relative, of outputs and gradients in bf16: rounding gives 3e-3."""
Milliseconds = dict[str, dict[str, float]]
"""Call -> kernel -> ms of a forward and a backward pass, for those kernels that are right."""


class KernelError(UserError, RuntimeError):
    """No kernel of this GPU, or not the one that was asked for, computes what it should."""


def choose(device: torch.device, wanted: str = "auto") -> str:
    """Choose the kernels of this process, and return what to call them in a log, with what else was tried.

    wanted: `train.kernels.attention`.

    Raises:
        KernelError: a GPU's kernels are wrong, or cannot run; or those that are wanted.
    """
    if not kernels.on_gpu(torch.empty(0, device=device)):
        if wanted not in ("auto", "torch"):
            raise KernelError(f"train.kernels.attention = {wanted}: on a CPU attention is torch's own; set it to auto")
        return kernels.CHOSEN_ON_CPU.name
    if wanted == "fa2":
        try:
            package = FlashPackage(importlib.import_module(PACKAGE))
            error = error_of(package, device)
        except Exception as problem:  # built for another torch, another GPU, or an older one with other arguments
            raise KernelError(f"train.kernels.attention = fa2: {str(problem).partition(chr(10))[0]}") from problem
        if error >= MOST_ERROR:
            raise KernelError(f"train.kernels.attention = fa2: relative error {error:.3g}; set auto")
        kernels.CHOSEN = Chosen(package)
        return package.name
    activate: Callable[[str], None] | None = getattr(registry, "activate_flash_attention_impl", None)
    tried = []
    for library in _LIBRARIES if wanted == "auto" else [x for x in _LIBRARIES if x == wanted.upper()]:
        named = TorchFlash(name=f"flash-attention {library[2:]}")
        try:
            if activate is None:
                raise KernelError(f"torch {torch.__version__} puts no other library behind its operator")
            activate(library)
            error = error_of(named, device)
            if error < MOST_ERROR:
                kernels.CHOSEN = Chosen(named)
                return named.name
            why = f"relative error {error:.3g}"
        except Exception as problem:  # not installed, for another GPU, or without a backward pass: the next one
            why = str(problem).partition("\n")[0]
        tried.append(f"{named.name}: {why}")
        if activate is not None:
            registry.restore_flash_attention_impl(_raise_warn=False)
    if wanted in ("fa3", "fa4"):
        raise KernelError(f"train.kernels.attention = {wanted}: {tried[0]}")
    for kernel in (TorchFlash(), TorchFlash(shared_heads=False)):
        try:
            error = error_of(kernel, device)
        except RuntimeError as problem:
            found = str(problem)
            continue
        if error < MOST_ERROR:
            kernels.CHOSEN = Chosen(kernel)
            return "; not ".join([kernel.name, *tried])
        found = f"relative error {error:.3g}"
    raise KernelError(f"flash attention of torch {torch.__version__} on {_device_name(device)}: {found}")


def others() -> tuple[Kernel, ...]:
    """Libraries besides torch's own that may take calls of a lasting shape: they are tried at these shapes."""
    try:
        return Cudnn(), FlashPackage(importlib.import_module(PACKAGE))
    except Exception as problem:  # not installed, or for another torch
        _LOG.info("%s: %s", FlashPackage.name, problem)
        return (Cudnn(),)


def padded_calls(layout: PackedLayout, heads: int, key_heads: int, head_dim: int) -> list[Call]:
    """The calls without runs that a block makes for micro-batches of this layout, rows without documents."""
    calls = Calls.of(layout, None)
    length = layout.seq_length
    out = [Call(calls.rows, heads, key_heads, length, length, head_dim, True)] if calls.rows else []
    for stream, (_, capacity) in zip(calls.streams, layout.groups, strict=True):
        for part in stream.parts:
            queries, keys = (len(range(n)[x]) for n, x in ((capacity, part.queries), (length, part.keys)))  # type: ignore[index]
            out.append(Call(stream.rows, heads, key_heads, queries, keys, head_dim, part.causal))
    return list(dict.fromkeys(out))


def time_calls(
    calls: Sequence[Call], dtype: torch.dtype, device: torch.device, candidates: Sequence[Kernel] | None = None
) -> Milliseconds:
    """How long the chosen kernel and the candidates (`others()`) take for each call, measured once on a machine and kept in a file.

    Candidates take part where they give what the chosen one gives. Costs up to a second for each call that is not in the file.
    """
    path = _cache_file(device)
    known = _read(path)
    out = {}
    for call in calls:
        name = f"{call} {str(dtype).removeprefix('torch.')}"
        if name not in known:
            known[name] = _times(call, dtype, device, others() if candidates is None else candidates)
            _write(path, known)
        out[name] = known[name]
    return out


def use(
    times: Milliseconds, calls: Sequence[Call], candidates: Sequence[Kernel] | None = None, wanted: str = "auto"
) -> list[str]:
    """Use the fastest kernel for each call, as `time_calls` found, or cuDNN's if that is wanted; returns a line for each.

    Raises:
        KernelError: cuDNN's is wanted, and is wrong, or does not take a call.
    """
    by_name = {kernel.name: kernel for kernel in (others() if candidates is None else candidates)}
    default = kernels.CHOSEN.default
    by_call, lines = {}, []
    for call, (name, found) in zip(calls, times.items(), strict=True):
        best = Cudnn.name if wanted == "cudnn" else min(found, key=found.__getitem__, default=default.name)
        if best not in found and wanted == "cudnn":
            raise KernelError(
                f"train.kernels.attention = cudnn: {name}: it is wrong here, or does not take it; set auto"
            )
        by_call[call] = by_name.get(best, default)
        times_shown = ", ".join(f"{kernel} {ms:.3g} ms" for kernel, ms in sorted(found.items(), key=lambda x: x[1]))
        lines.append(f"{name}: {by_call[call].name} ({times_shown})")
    kernels.CHOSEN = replace(kernels.CHOSEN, by_call=by_call)
    return lines


def error_of(kernel: Kernel, device: torch.device) -> float:
    """The largest relative error, of outputs and gradients, of a small packed row in bf16 against fp32 on the CPU.

    It has all that training asks of a kernel: causal rows, a mask stream, and shared keys.
    """
    attend = PackedAttention(PackedLayout(128, 1, ((1, 48),)))
    generator = torch.Generator().manual_seed(0)
    shapes = ((304, 4, 64), (304, 2, 64), (304, 2, 64), (304, 4, 64))
    *inputs, grad = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)

    def results(there: torch.device, dtype: torch.dtype) -> list[Tensor]:
        given = [x.to(there, dtype).requires_grad_() for x in inputs]
        out = attend(0, *given)
        return [x.detach().float().cpu() for x in (out, *torch.autograd.grad(out, given, grad.to(there, dtype)))]

    with _chosen(Chosen(kernel)):
        found = results(device, torch.bfloat16)
    return difference(found, results(torch.device("cpu"), torch.float32))


def difference(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The largest relative difference of pairs; infinite where there is a NaN."""
    errors = [((a - b).float().norm() / b.float().norm()).item() for a, b in zip(found, right, strict=True)]
    return float("inf") if any(map(math.isnan, errors)) else max(errors)


@contextmanager
def _chosen(choice: Chosen) -> Iterator[None]:
    before, kernels.CHOSEN = kernels.CHOSEN, choice
    try:
        yield
    finally:
        kernels.CHOSEN = before


def _times(call: Call, dtype: torch.dtype, device: torch.device, candidates: Sequence[Kernel]) -> dict[str, float]:
    """Kernel -> ms, for the default kernel and the others that agree with it on this call."""
    generator = torch.Generator().manual_seed(0)

    def tokens(heads: int, count: int) -> Tensor:  # as they lie in a packed row
        x = torch.randn(call.rows, count, heads, call.head_dim, generator=generator).to(device, dtype)
        return x.transpose(1, 2)

    q, grad = tokens(call.heads, call.queries), tokens(call.heads, call.queries)
    k, v = tokens(call.key_heads, call.keys), tokens(call.key_heads, call.keys)
    scale, out = 1 / math.sqrt(call.head_dim), {}
    # as of queries that see as much again elsewhere: a backward pass must go by the sums that it is given
    part, lse = kernels.flash_forward(q, k, v, call.causal, scale)
    whole, sums = torch.empty_like(q).copy_(part / 2), lse + math.log(2)
    grad = laid_out_as(grad, whole)

    def passes() -> list[Tensor]:
        made = kernels.flash_forward(q, k, v, call.causal, scale)
        return [*made, *kernels.flash_backward(grad, q, k, v, whole, sums, call.causal, scale)]

    right = passes()
    for kernel in (kernels.CHOSEN.default, *candidates):
        with _chosen(Chosen(kernel)):
            try:
                if difference(passes(), right) < MOST_ERROR:
                    out[kernel.name] = milliseconds(passes, device)
            except (
                RuntimeError,
                TypeError,
            ) as problem:  # a library that does not take this shape, or has other arguments
                _LOG.info("%s: %s: %s", call, kernel.name, problem)
    return out


def milliseconds(work: Callable[[], object], device: torch.device, times: int = 7) -> float:
    """Median of some, after two that warm up."""
    found = []
    for number in range(times + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= 2:
            found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _cache_file(device: torch.device) -> Path:
    """One for each kind of GPU and version of what decides."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "esolm-megatron"
    found = sys.modules.get("flash_attn")
    versions = [f"torch {torch.__version__}", f"cudnn {torch.backends.cudnn.version()}"]
    versions += [f"flash-attn {found.__version__}"] if found else []
    name = "-".join(["attention", _device_name(device), *versions, kernels.CHOSEN.default.name])
    return folder / ("".join(x if x.isalnum() or x in "-.+" else "_" for x in name) + ".json")


def _read(path: Path) -> Milliseconds:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: {kernel: float(ms) for kernel, ms in times.items()} for name, times in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):  # none yet, or cut off: measured anew
        return {}


def _write(path: Path, times: Milliseconds) -> None:
    """Whole or not at all; a home folder that cannot be written costs a second at each start, and no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(times, indent=1) + "\n")
        beside.replace(path)
    except OSError:
        pass
