"""What the processes of a run can do together, before it starts: arithmetic, collectives, clocks and disk of every rank.

Given a run's configuration, also what its layout asks of the network: each collective on the groups that will use it, all
groups at once, as in training.

Every process calls `examine`, started as a run is: by torchrun, by srun with RANK and WORLD_SIZE set, or by
`esolm doctor --cluster --processes N`. Over NCCL where there are GPUs, over gloo elsewhere.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Group
from rich.table import Table

from esolm_megatron.config import Config, ConfigError, world_problems
from esolm_megatron.topology import Topology

SLOW_MATMUL, SLOW_LINK, SLOW_DISK = 0.7, 0.5, 0.3
"""A rank is slow below this share of the median rank."""
CLOCK_LIMIT_S = 0.5


@dataclass(frozen=True)
class RankReport:
    """One rank. tflops: of a matrix product. links_gb_s: to its neighbours. clock_s: ahead of the median rank."""

    rank: int
    host: str
    device: str
    tflops: float
    links_gb_s: list[float]
    clock_s: float
    disk_mb_s: float
    problems: list[str]


@dataclass(frozen=True)
class GroupSpeed:
    """One collective on one kind of groups, all of them at once: ranks of each group, and GB/s of its slowest rank."""

    collective: str
    groups: str
    ranks: list[list[int]]
    gb_s: list[float]


@dataclass(frozen=True)
class ClusterReport:
    """All ranks, GB/s of each collective (bytes of one rank's whole tensor over time), and who is wrong or slow.

    layout: the same for the groups of a run; empty where none was given.
    """

    ranks: list[RankReport]
    collectives_gb_s: dict[str, float]
    layout: list[GroupSpeed] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        """A line for each thing that makes a run impossible or its results wrong."""
        return [f"rank {r.rank} ({r.host}): {problem}" for r in self.ranks for problem in r.problems]

    @property
    def slow(self) -> list[str]:
        """A line for each rank or group that all others would wait for, and for each clock that is off."""
        out = []
        for name, share, unit, of in (
            ("matrix product", SLOW_MATMUL, "TFLOP/s", lambda r: r.tflops),
            ("best link", SLOW_LINK, "GB/s", lambda r: max(r.links_gb_s, default=0.0)),
            ("disk", SLOW_DISK, "MB/s", lambda r: r.disk_mb_s),
        ):
            middle = statistics.median(of(r) for r in self.ranks)
            out += [
                f"rank {r.rank} ({r.host}): {name} {of(r):.3g} {unit}, the median rank has {middle:.3g}"
                for r in self.ranks
                if of(r) < share * middle
            ]
        out += [
            f"rank {r.rank} ({r.host}): its clock is {r.clock_s:+.2f} s off"
            for r in self.ranks
            if abs(r.clock_s) > CLOCK_LIMIT_S
        ]
        for row in self.layout:
            middle = statistics.median(row.gb_s)
            out += [
                f"{row.groups} group of ranks {', '.join(map(str, ranks))}: {row.collective} {speed:.3g} GB/s, "
                f"the median group has {middle:.3g}"
                for ranks, speed in zip(row.ranks, row.gb_s, strict=True)
                if speed < SLOW_LINK * middle
            ]
        return out

    @property
    def exit_status(self) -> int:
        """1 where something is wrong; slow ranks are named, but a run works with them."""
        return int(bool(self.wrong))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "wrong": self.wrong, "slow": self.slow, "exit_status": self.exit_status}

    def as_table(self) -> Group:
        """For a terminal."""
        ranks = Table("rank", "host", "device", "TFLOP/s", "links GB/s", "clock s", "disk MB/s", title="ranks")
        for r in self.ranks:
            links = " ".join(f"{x:.3g}" for x in r.links_gb_s)
            ranks.add_row(
                str(r.rank), r.host, r.device, f"{r.tflops:.3g}", links, f"{r.clock_s:+.3f}", f"{r.disk_mb_s:.0f}"
            )
        collectives = Table("collective", "GB/s", title="collectives, all ranks together")
        for name, speed in self.collectives_gb_s.items():
            collectives.add_row(name, f"{speed:.3g}")
        layout = Table(
            "groups", "collective", "GB/s: slowest", "median", "ranks of the slowest", title="the run's layout"
        )
        for row in self.layout:
            worst = min(range(len(row.gb_s)), key=row.gb_s.__getitem__)
            speeds = f"{row.gb_s[worst]:.3g}", f"{statistics.median(row.gb_s):.3g}"
            named = f"{len(row.ranks)} {row.groups}, of {len(row.ranks[0])}"
            layout.add_row(named, row.collective, *speeds, " ".join(map(str, row.ranks[worst])))
        lines = [f"WRONG  {line}" for line in self.wrong] + [f"slow   {line}" for line in self.slow]
        return Group(
            ranks, collectives, *([layout] if self.layout else []), "\n".join(lines or ["no rank is wrong or slow"])
        )


def examine(
    folder: Path, *, megabytes: int = 32, timeout_s: float = 120.0, config: Config | None = None
) -> ClusterReport:
    """The report, the same on every rank.

    folder: where the disk is tried. megabytes: size of tensors and file. config: a run whose layout is tried.

    Raises:
        ConfigError: the number of processes does not fit the run's layout.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    problems = world_problems(config, world_size, device.type) if config is not None else []
    if problems:
        raise ConfigError("\n".join(problems))
    if on_gpu:
        torch.cuda.set_device(device)
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s)}
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        options["store"] = dist.HashStore()
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=world_size, **options)
    try:
        return _examine(folder, megabytes, rank, world_size, device, config)
    finally:
        dist.destroy_process_group()


def _examine(
    folder: Path, megabytes: int, rank: int, world_size: int, device: torch.device, config: Config | None
) -> ClusterReport:
    problems: list[str] = []
    clock = _clock(world_size, rank)
    tflops = _matmul(device, problems)
    collectives = _collectives(WORLD_WIDE, None, device, megabytes, problems)
    layout = [] if config is None else layout_speeds(config, device, megabytes, problems)
    links = _links(device, rank, world_size, megabytes, problems)
    disk = _disk(folder, rank, megabytes, problems)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    mine = RankReport(rank, os.uname().nodename, name, tflops, links, clock, disk, problems)
    ranks: list[Any] = [None] * world_size
    dist.all_gather_object(ranks, mine)
    return ClusterReport(ranks, collectives, layout)


def _timed(work: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Seconds of the fastest of some runs after a first one."""
    best = float("inf")
    for number in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number:
            best = min(best, time.perf_counter() - start)
    return max(best, 1e-9)


def _matmul(device: torch.device, problems: list[str]) -> float:
    """TFLOP/s in the type that training uses. Whole numbers up to 8 make every product and sum exact in fp32 and TF32."""
    size = 4096 if device.type == "cuda" else 768
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-8, 9, (size, size), generator=generator).float() for _ in range(2))
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    expected = a.double() @ (b.double() @ signs)
    on_a, on_b = a.to(device), b.to(device)
    for _ in range(3):
        if not product_is_right((on_a @ on_b).cpu(), signs, expected):
            problems.append("a matrix product of whole numbers is wrong: replace the device")
            break
    if device.type == "cuda":
        on_a, on_b = on_a.bfloat16(), on_b.bfloat16()
    return 2 * size**3 / _timed(lambda: on_a @ on_b, device, repeats=8) / 1e12


def product_is_right(product: torch.Tensor, signs: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether (n, n) `product`, summed over its columns with (n,) random signs, is exactly (n,) `expected` (Freivalds)."""
    return bool(torch.equal(product.double() @ signs, expected))


WORLD_WIDE = ("all_reduce", "all_gather", "reduce_scatter")


def _collectives(
    names: Sequence[str], group: Any, device: torch.device, megabytes: int, problems: list[str], where: str = "here"
) -> dict[str, float]:
    """GB/s of the named collectives in `group`; what arrives is checked."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    count = max(1, megabytes * 2**18 // size) * size
    whole, out = torch.empty(count, device=device), torch.empty(count, device=device)
    share = torch.empty(count // size, device=device)
    numbers = torch.arange(1.0, size + 1, device=device)
    total = float(numbers.sum())

    def all_reduce() -> None:
        whole.fill_(rank + 1)
        dist.all_reduce(whole, group=group)

    def all_gather() -> None:
        share.fill_(rank + 1)
        dist.all_gather_into_tensor(out, share, group=group)

    def reduce_scatter() -> None:
        whole.fill_(rank + 1)
        dist.reduce_scatter_tensor(share, whole, group=group)

    def all_to_all() -> None:  # rank i sends i * size + j to rank j, counted from 1
        whole.view(size, -1).copy_(((rank + 1) * size + numbers)[:, None].expand(size, count // size))
        dist.all_to_all_single(out, whole, group=group)

    tried: dict[str, tuple[Callable[[], None], Callable[[], bool]]] = {
        "all_reduce": (all_reduce, lambda: bool((whole == total).all())),
        "all_gather": (all_gather, lambda: bool((out.view(size, -1) == numbers[:, None]).all())),
        "reduce_scatter": (reduce_scatter, lambda: bool((share == total).all())),
        "all_to_all": (all_to_all, lambda: bool((out.view(size, -1) == numbers[:, None] * size + rank + 1).all())),
    }
    speeds = {}
    for name in names:
        work, right = tried[name]
        dist.barrier()  # groups of a layout start together
        speeds[name] = 4 * count / _timed(work, device) / 1e9
        if not right():
            problems.append(f"{name} delivers wrong numbers {where}")
    return speeds


def layout_groups(config: Config, world_size: int) -> dict[str, list[list[int]]]:
    """The groups of each kind that a run of `world_size` processes has, where they have more than one rank.

    data: with context ranks, over which gradients are summed too. stage: ranks that hand activations to each other.
    """
    p = config.parallel
    places = [Topology(r, world_size, p.tensor_size, p.pipeline_size, p.context_size) for r in range(world_size)]
    keys: dict[str, Callable[[Topology], tuple[int, ...]]] = {
        "tensor": lambda t: (t.stage, t.data_rank, t.context_rank),
        "context": lambda t: (t.stage, t.data_rank, t.tensor_rank),
        "data": lambda t: (t.stage, t.tensor_rank),
        "stage": lambda t: (t.data_rank, t.context_rank, t.tensor_rank),
    }
    out = {}
    for kind, key in keys.items():
        found: dict[tuple[int, ...], list[int]] = {}
        for place in places:
            found.setdefault(key(place), []).append(place.rank)
        if len(found) < world_size:
            out[kind] = list(found.values())
    return out


def _used(config: Config, kind: str) -> tuple[str, ...]:
    """The collectives that training does on groups of a kind."""
    p = config.parallel
    if kind == "tensor":
        return ("all_reduce", "all_gather", "reduce_scatter") if p.sequence_parallel else ("all_reduce",)
    if kind == "context":
        return ("all_to_all",)
    cut = {0: (), 1: ("all_gather",)}.get(p.zero_stage, ("all_gather", "reduce_scatter"))
    return ("all_reduce", *cut)


def layout_speeds(config: Config, device: torch.device, megabytes: int, problems: list[str]) -> list[GroupSpeed]:
    """Speeds of what the run's layout uses, the same on every rank; all ranks of the run call it."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    kinds, mine = layout_groups(config, world_size), {}
    for kind, listed in kinds.items():
        own = next(ranks for ranks in listed if rank in ranks)
        where = f"in the {kind} group of ranks {', '.join(map(str, own))}"
        if kind == "stage":
            wraps = config.parallel.virtual_pipeline_size > 1
            mine[kind, "send"] = _sends(own, wraps, device, megabytes, problems, where)
            continue
        made = [dist.new_group(ranks) for ranks in listed]  # every rank takes part in making each
        group = made[listed.index(own)]
        for name, speed in _collectives(_used(config, kind), group, device, megabytes, problems, where).items():
            mine[kind, name] = speed
        for other in made:
            dist.destroy_process_group(other)
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, mine)
    return [
        GroupSpeed(name, kind, kinds[kind], [min(everyone[r][kind, name] for r in ranks) for ranks in kinds[kind]])
        for kind, name in mine
    ]


def _sends(
    stages: Sequence[int], wraps: bool, device: torch.device, megabytes: int, problems: list[str], where: str
) -> float:
    """GB/s of a tensor handed on from each stage to the next, all at once; from the last to the first if it `wraps`."""
    place, last = stages.index(dist.get_rank()), len(stages) - 1
    sent = torch.full((megabytes * 2**18,), float(place), device=device)
    got = torch.empty_like(sent)
    to = stages[(place + 1) % len(stages)] if wraps or place < last else None
    of = (place - 1) % len(stages) if wraps or place else None

    def operations() -> Iterator[dist.P2POp]:
        if to is not None:
            yield dist.P2POp(dist.isend, sent, to)
        if of is not None:
            yield dist.P2POp(dist.irecv, got, stages[of])

    def hand_on() -> None:
        for request in dist.batch_isend_irecv(list(operations())):
            request.wait()

    dist.barrier()
    speed = sent.numel() * 4 / _timed(hand_on, device) / 1e9
    if of is not None and not bool((got == of).all()):
        problems.append(f"a send from stage to stage delivers wrong numbers {where}")
    return speed


def _links(device: torch.device, rank: int, world_size: int, megabytes: int, problems: list[str]) -> list[float]:
    """GB/s with the rank before and the rank after, there and back; pairs take turns, so that one slow rank slows no other."""
    sent = torch.full((megabytes * 2**18,), float(rank), device=device)
    got = torch.empty_like(sent)
    speeds = []
    for turn in range(2):
        peer = rank + 1 if rank % 2 == turn else rank - 1

        def exchange(peer: int = peer) -> None:
            both = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, got, peer)]
            for request in dist.batch_isend_irecv(both):
                request.wait()

        dist.barrier()
        if 0 <= peer < world_size:
            speeds.append(2 * sent.numel() * 4 / _timed(exchange, device) / 1e9)
            if not bool((got == peer).all()):
                problems.append(f"wrong numbers arrive from rank {peer}")
    return speeds


def _clock(world_size: int, rank: int, tries: int = 5) -> float:
    """Seconds that this rank's clock is ahead of the median rank's, as far as leaving a barrier together can tell."""
    found = []
    for _ in range(tries):
        dist.barrier()
        now = [0.0] * world_size
        dist.all_gather_object(now, time.time())
        found.append(now[rank] - statistics.median(now))
    return min(found, key=abs)


def _disk(folder: Path, rank: int, megabytes: int, problems: list[str]) -> float:
    """MB/s of one written and synchronised file; 0 where the disk refuses."""
    path = folder / f".esolm_doctor_{os.uname().nodename}_{rank}_{os.getpid()}"
    block = os.urandom(2**20)
    try:
        start = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(megabytes):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return megabytes * 1.048576 / (time.perf_counter() - start)
    except OSError as error:
        problems.append(f"cannot write into {folder}: {error.strerror}")
        return 0.0
    finally:
        if folder.is_dir():
            path.unlink(missing_ok=True)
