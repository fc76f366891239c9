"""Kills a real training run again and again, and checks that nothing is lost.

    python tools/chaos.py --kills 100 --out runs/chaos

Two runs with the same settings: one undisturbed, one that is killed with SIGKILL and restarted. Kinds of trouble:

    one rank      SIGKILL to one process; the launcher ends the others
    all           SIGKILL to launcher and ranks at once
    save          all, at the moment when a checkpoint is being written
    load          all, while the restarted run is still loading
    full disk     the run meets a limit on the size of files, as on a full disk, and ends by itself

After each, the newest checkpoint must be whole and no older than before. At the end the run must have reached its last
step; while the layout stayed the same, its weights must be those of the undisturbed run, bit for bit. With --layouts,
restarts take turns over several layouts of 4 processes, and the losses must agree to fp32 rounding.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from esolm_megatron.checkpoint import Checkpoint, complete_steps, newest, step_folder
from esolm_megatron.data.prepare import PrepareConfig, prepare

KINDS = ("one rank", "all", "save", "load", "full disk")
LAYOUTS: tuple[dict[str, int], ...] = (
    {},
    {"tensor_size": 2},
    {"pipeline_size": 2},
    {"tensor_size": 2, "pipeline_size": 2},
)
CONSOLE = Console()


@dataclass
class Trouble:
    """One disturbance: what was done, when, and what the next start made of it."""

    kind: str
    layout: str
    committed: int
    reached: int
    seconds_to_first_step: float

    @property
    def repeated(self) -> int:
        """Steps that had been done and must be done again."""
        return max(0, self.reached - self.committed)


class Run:
    """A training run in its folder, started and disturbed."""

    def __init__(self, folder: Path, tokens: Path, steps: int, seed: int):
        self.folder, self.run = folder, folder / "run"
        self.tree = {
            "name": "run",
            "runs_dir": str(folder),
            "seed": seed,
            "model": {"num_layers": 4, "hidden_size": 32, "num_heads": 4, "seq_length": 64},
            "objective": {"alpha_0": 0.5},
            "train": {
                "num_steps": steps, "global_batch_size": 16, "micro_batch_size": 2, "precision": "fp32",
                "log_every_steps": 1, "device": "cpu",
            },
            "optim": {"lr": 3e-3, "warmup_steps": 5, "ema_decay": 0.9},
            "data": {"path": str(tokens)},
            "evaluate": {"every_steps": 0},
            "checkpoint": {"every_steps": 3, "keep_last": 3},
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, layout: dict[str, int], file_limit: int | None = None) -> subprocess.Popen[bytes]:
        """The run as a user starts it, on 4 processes, in a process group of its own."""
        file = self.folder / "run.yaml"
        file.write_text(yaml.safe_dump(self.tree | {"parallel": layout}))
        log = (self.folder / "log.txt").open("ab")
        command = [sys.executable, "-m", "esolm_megatron", "train", str(file), "--processes", "4"]

        if file_limit is not None:  # in units of 1 KiB; without the signal, writes fail as on a full disk
            command = ["bash", "-c", f'trap "" XFSZ; ulimit -f {file_limit}; exec "$@"', "limited", *command]
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def last_step(self, since: float = 0.0) -> int:
        """The newest step that was logged after `since` (seconds of the clock); 0 where there is none."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        for line in reversed(lines):
            try:
                tree = json.loads(line)
                return int(tree["step"]) if tree["time"] >= since else 0
            except (json.JSONDecodeError, KeyError):
                continue
        return 0

    def committed(self) -> int:
        """The newest whole checkpoint, verified."""
        found = newest(self.run, verify=True)
        return 0 if found is None else found.step


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the launcher and every rank."""
    for pid in [*children(process.pid), process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def children(pid: int) -> list[int]:
    """Processes that `pid` started."""
    try:
        return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def wait_for(process: subprocess.Popen[bytes], what: Any, seconds: float = 180.0) -> bool:
    """Whether `what()` came true before the process ended or time ran out."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if what():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    raise SystemExit("the run hangs: no new step within three minutes; see log.txt")


def disturb(run: Run, kind: str, layout: dict[str, int], generator: random.Random) -> Trouble | None:
    """Start the run, let it work, make trouble; None if it finished first."""
    before, begun = run.committed(), time.time()
    if kind == "full disk":
        process = run.start(layout, file_limit=20)
        process.wait()
        if process.returncode == 0:
            return None
        return Trouble(kind, name(layout), run.committed(), run.last_step(), float("nan"))
    process = run.start(layout)
    if kind == "load":
        time.sleep(generator.uniform(2.0, 8.0))
        kill_all(process)
        return Trouble(kind, name(layout), run.committed(), before, float("nan"))
    if not wait_for(process, lambda: run.last_step(begun) > before):
        return None
    first = time.time() - begun
    goal = before + generator.randrange(1, 8)
    if not wait_for(process, lambda: run.last_step(begun) >= goal):
        return None
    if kind == "save":
        parent = run.run / "checkpoints"
        if not wait_for(process, lambda: any(".tmp" in p.name for p in parent.iterdir()) if parent.exists() else False):
            return None
    else:
        time.sleep(generator.uniform(0, 0.3))
    if kind == "one rank":
        ranks = children(process.pid)
        if ranks:
            os.kill(generator.choice(ranks), signal.SIGKILL)
        process.wait(90)
    else:
        kill_all(process)
    return Trouble(kind, name(layout), run.committed(), run.last_step(), round(first, 2))


def name(layout: dict[str, int]) -> str:
    """A layout in a word."""
    tensor, pipeline = layout.get("tensor_size", 1), layout.get("pipeline_size", 1)
    return f"TP{tensor} PP{pipeline} DP{4 // (tensor * pipeline)}"


def equal_weights(a: Path, b: Path, step: int) -> float:
    """Largest difference between the saved tensors of two runs."""
    one, two = (Checkpoint.open(step_folder(run, step), verify=True) for run in (a, b))
    return max(
        float((one.read(kind, key) - two.read(kind, key)).abs().max())
        for kind in one.kinds()
        for key in one.names(kind)
    )


def main() -> None:
    """Run it, print the table, exit 1 where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", action="store_true", help="restart on other layouts of 4 processes")
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(f"{args.out}: exists; remove it, or give another --out")
    generator, steps = random.Random(args.seed), 8 * args.kills + 20
    source = Path(__file__).parents[1] / "esolm_megatron"
    tokens = args.out / "tokens"
    prepare(PrepareConfig(inputs=(str(source),), output=str(tokens), block_tokens=4096), progress=False)
    run, calm = Run(args.out / "killed", tokens, steps, args.seed), Run(args.out / "calm", tokens, steps, args.seed)
    troubles: list[Trouble] = []
    best = 0
    while len(troubles) < args.kills:
        layout = generator.choice(LAYOUTS) if args.layouts else LAYOUTS[1]
        trouble = disturb(run, KINDS[len(troubles) % len(KINDS)], layout, generator)
        if trouble is None:
            break
        if trouble.committed < best:
            raise SystemExit(f"LOST: checkpoint {best} was whole, now the newest is {trouble.committed}")
        best = trouble.committed
        troubles.append(trouble)
        CONSOLE.print(f"{len(troubles)}/{args.kills} {trouble}", highlight=False)
    for each in (run, calm):
        if each.start(LAYOUTS[1]).wait():
            raise SystemExit(f"{each.folder}: did not finish; see log.txt there")
    difference = equal_weights(run.run, calm.run, steps)
    report(args.out, troubles, steps, complete_steps(run.run)[-1], difference)
    if not args.layouts and difference:
        raise SystemExit(f"LOST: weights differ from the undisturbed run by {difference}")


def report(out: Path, troubles: list[Trouble], steps: int, reached: int, difference: float) -> None:
    """The table, and report.json beside it."""
    table = Table(title=f"{len(troubles)} kills; step {reached} of {steps}; largest difference {difference:g}")
    for heading in ("kind", "times", "steps repeated, median and most", "seconds to first new step, median"):
        table.add_column(heading, justify="right")
    for kind, times in Counter(t.kind for t in troubles).items():
        mine = [t for t in troubles if t.kind == kind]
        repeated = sorted(t.repeated for t in mine)
        first = sorted(t.seconds_to_first_step for t in mine if t.seconds_to_first_step == t.seconds_to_first_step)
        median = f"{first[len(first) // 2]:.1f}" if first else "-"
        table.add_row(kind, str(times), f"{repeated[len(repeated) // 2]}, {repeated[-1]}", median)
    CONSOLE.print(table)
    facts = {"steps": steps, "reached": reached, "difference": difference, "troubles": [asdict(t) for t in troubles]}
    (out / "report.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
