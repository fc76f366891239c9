"""Some ranks of a run of any size, each simulated, and whether what they call of each other goes together.

A run whose ranks come to collectives in another order, or with other sizes, hangs or breaks on the cluster; here it is found
before one is booked. Ranks that are not simulated do as their neighbours do: those of a stage differ in their numbers only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table
from rich.text import Text

from esolm_megatron.config import Config, ConfigError, dump, world_problems
from esolm_megatron.plan.cost import Plan, plan, with_vocabulary
from esolm_megatron.plan.memory import GIB
from esolm_megatron.topology import Topology

Found = dict[str, Any]


def ranks_to_try(grid: Topology, whole: bool) -> list[int]:
    """Of each stage of the first replica the first and the last rank, or with `whole` all; and the last replica's ends."""
    inner = grid.tensor_size * grid.context_size
    stage = grid.world_size // grid.pipeline_size
    places = range(inner) if whole else sorted({0, inner - 1})
    first = [s * stage + place for s in range(grid.pipeline_size) for place in places]
    last = [s * stage + stage - inner for s in sorted({0, grid.pipeline_size - 1})]
    return sorted({*first, *last})


@dataclass(frozen=True)
class Checked:
    """What was found. problems: what does not go together, a line each; none if all is well."""

    planned: Plan
    ranks: list[Found]
    problems: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        kept = [{name: x for name, x in found.items() if name not in ("built", "step")} for found in self.ranks]
        for found, out in zip(self.ranks, kept, strict=True):
            out["calls"] = [
                {"what": a, "ranks": b, "count": n, "bytes": size} for (a, b), (n, size) in _sums(found).items()
            ]
        return {"problems": self.problems, "world_size": self.planned.topology.world_size, "ranks": kept}

    def __rich__(self) -> Group:
        title = "held between steps, the most beyond that in one, and how much of it is planned"
        memory = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
        for name in ("rank", "stage", "weights", "gradients", "optimizer", "activations", "at most"):
            memory.add_column(name, justify="right")
        for found in self.ranks:
            stage = self.planned.stages[found["stage"]]
            held = [(found[name], getattr(stage, name)) for name in ("weights", "gradients", "optimizer")]
            passes = found["activations"], stage.activations + stage.working + stage.buckets
            pairs = [*held, passes, (sum(mine for mine, _ in (*held, passes)), stage.total)]
            cells = [f"{_size(mine)} ({planned / max(mine, 1):.0%})" for mine, planned in pairs]
            memory.add_row(str(found["rank"]), str(found["stage"]), *cells)
        first = self.ranks[0]
        calls = Table(
            title=f"rank {first['rank']} in a step of {first['micro_batches']} micro-batches",
            title_justify="left",
            box=SIMPLE,
        )
        for name in ("what", "ranks", "times", "bytes"):
            calls.add_column(name, justify="left" if name in ("what", "ranks") else "right", overflow="fold")
        for (what, ranks), (count, size) in _sums(first).items():
            calls.add_row(what, ranks, str(count), _size(size))
        world = self.planned.topology.world_size
        said = self.problems or [
            f"{len(self.ranks)} of {world:,} ranks were simulated: what they call of each other goes together"
        ]
        return Group(memory, calls, *map(Text, said))


def _size(count: int) -> str:
    unit, name = next((x for x in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if count >= x[0]), (1, "B"))
    return f"{count / unit:.3g} {name}"


def _sums(found: Found) -> dict[tuple[str, str], tuple[int, int]]:
    counts, sizes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for what, ranks, size in found["step"]:
        counts[what, ranks] += 1
        sizes[what, ranks] += size
    return {key: (counts[key], sizes[key]) for key in counts}


def check(
    config: Config, world_size: int, *, whole: bool = False, progress: Callable[[int, int], None] = lambda *_: None
) -> Checked:
    """Simulate some ranks of `config` on `world_size` processes, as many at a time as there are cores.

    Raises:
        ConfigError: the world does not fit the configuration, or a rank cannot build itself; with its words.
    """
    config = with_vocabulary(config)
    planned = plan(config, world_size, mfu=0.4)
    if problems := world_problems(config, world_size, config.train.device):
        raise ConfigError("\n".join(problems))
    ranks, done = ranks_to_try(planned.topology, whole), [0]
    progress(0, len(ranks))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(dump(config), encoding="utf-8")

        running: list[subprocess.Popen[str]] = []

        def some(part: list[int]) -> list[Found]:
            out = []
            for found in _simulated(path, world_size, part, running):
                out.append(found)
                done[0] += 1
                progress(done[0], len(ranks))
            return out

        workers = min(os.cpu_count() or 1, len(ranks))
        with ThreadPoolExecutor(workers) as pool:
            parts = [pool.submit(some, ranks[i::workers]) for i in range(workers)]
            try:
                found = [each for part in as_completed(parts) for each in part.result()]
            except BaseException:
                for process in running:  # nobody waits for what the others would say
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                raise
    found.sort(key=lambda each: each["rank"])
    return Checked(planned, found, disagreements(found))


def _simulated(
    path: Path, world_size: int, ranks: Sequence[int], running: list[subprocess.Popen[str]]
) -> Iterator[Found]:
    """What each rank found, as they end. running: gets the process."""
    command = [sys.executable, "-m", "esolm_megatron.simulation.one_rank", str(path), str(world_size), *map(str, ranks)]
    with tempfile.TemporaryFile("w+") as said:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # with the ranks that it forks it is one group
        ) as process:  # fmt: skip
            assert process.stdout is not None
            running.append(process)
            yield from (json.loads(line) for line in process.stdout if line.startswith('{"rank"'))
        if process.returncode:
            said.seek(0)
            lines = said.read().strip().splitlines() or ["it ended without a word"]
            raise ConfigError(f"ranks {', '.join(map(str, ranks))} of {world_size}: {lines[-1]}")


def disagreements(found: Sequence[Found]) -> list[str]:
    """Where two ranks of a group do not call the same of it, or a message is not what the other end waits for."""
    out = []
    tried = {rank["rank"] for rank in found}
    for phase in ("built", "step"):
        calls: dict[str, dict[int, list[tuple[str, int]]]] = defaultdict(lambda: defaultdict(list))
        for each in found:
            for what, ranks, size in each[phase]:
                calls[ranks][each["rank"]].append((what, size))
        for ranks, logs in calls.items():
            (first, theirs), *others = [(rank, logs.get(rank, [])) for rank in sorted(tried & set(_members(ranks)))]
            for rank, log in others:
                if theirs != log:
                    pairs = enumerate(zip(theirs, log, strict=False))
                    at = next((n for n, (a, b) in pairs if a != b), min(len(theirs), len(log)))
                    said = [f"{x[at][0]} of {x[at][1]:,} bytes" if at < len(x) else "nothing" for x in (theirs, log)]
                    out.append(
                        f"{phase}, ranks {ranks}, call {at}: rank {first} makes {said[0]}, rank {rank} {said[1]}"
                    )
    return out


def _members(ranks: str) -> list[int]:
    if " -> " in ranks:
        return [int(x) for x in ranks.split(" -> ")]
    if " to " in ranks:
        first, last, step = (int(x) for x in ranks.replace(" to ", " ").replace(" by ", " ").split())
        return list(range(first, last + 1, step))
    return [int(x) for x in ranks.split(", ")]
