"""What a piece of work runs on its device, by kernel: for the benchmarks, which import it."""

import re
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

PARTS = {
    "attention": r"flash|fmha|sdpa|scaled_dot_product|attention",
    "matrix products": r"gemm|cutlass|nvjet|cublas|xmma|matmul|aten::(addmm|mm|bmm)$|_linear",
    "optimizer": r"adam|foreach|multi_tensor|lerp",
    "copies": r"copy|memcpy|memset|memory|aten::(cat|fill_|zero_|clone|index_put_|to)$",
}
"""Names of kernels on a GPU, and of operators on a CPU, in the order in which they are tried; all else is `rest`."""


def kernel_table(work: Callable[[], Any], device: torch.device, times: int = 1) -> list[dict[str, Any]]:
    """Rows {name, count, ms, share} of one of the `times` steps or passes that `work` makes, the longest first.

    On a GPU its kernels and copies, in time of the device; elsewhere operators, without those they call, in CPU time.
    """
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        work()
        if on_gpu:
            torch.cuda.synchronize(device)
    found = []
    for event in profiler.key_averages():
        if (event.device_type == DeviceType.CUDA) == on_gpu:
            took = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            found.append((event.key, event.count, took / 1e3))
    whole = sum(ms for _, _, ms in found) or 1.0
    found.sort(key=lambda row: -row[2])
    return [{"name": n, "count": c / times, "ms": ms / times, "share": ms / whole} for n, c, ms in found]


def parts_of(table: list[dict[str, Any]]) -> dict[str, float]:
    """Share of the time of each of `PARTS`, and of the rest."""
    out = dict.fromkeys([*PARTS, "rest"], 0.0)
    for row in table:
        out[next((part for part, names in PARTS.items() if re.search(names, row["name"], re.I)), "rest")] += row[
            "share"
        ]
    return out


def shortened(table: list[dict[str, Any]], top: int) -> list[dict[str, Any]]:
    """The `top` longest rows, and the sum of the others."""
    rest = table[top:]
    if not rest:
        return table
    more = {name: sum(row[name] for row in rest) for name in ("count", "ms", "share")}
    return [*table[:top], {"name": f"{len(rest)} others", **more}]


def kernel_rows(found: dict[str, Any], top: int = 8) -> Table:
    """The longest of a profile's kernels, for the eye."""
    table = Table("kernel", "count", "ms", "share", title=f"{found['what']}: {found['ms']:.2f} ms")
    for row in shortened(found["kernels"], top):
        table.add_row(row["name"][:90], f"{row['count']:g}", f"{row['ms']:.3f}", f"{row['share']:.1%}")
    return table
