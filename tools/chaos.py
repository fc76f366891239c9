"""Kills a real training run again and again, and checks that nothing is lost.

    python tools/chaos.py --kills 100 --out runs/chaos

Two runs of 4 processes with the same settings, which read their tokens from a shard server on this machine: one
undisturbed, one that is killed with SIGKILL and restarted. Kinds of trouble:

    one rank      SIGKILL to one process; the launcher must end the others
    all           SIGKILL to launcher and ranks at once
    save          all, at the moment when a checkpoint is being written
    load          all, at any moment between the start and the first new step: imports, joining, loading, the first reading
    full disk     writing a checkpoint meets a limit on the size of files, as on a full disk; the run must end by itself
    shard server  the server answers 500 once the ranks have fetched a few shards; the run must end by itself

After each, the newest checkpoint must be whole and no older than before. At the end the run must have reached its last
step; while the layout stayed the same, its weights must be those of the undisturbed run, bit for bit. With --layouts,
restarts take turns over several layouts of 4 processes (tensor, sequence, context, pipeline, interleaved and data
parallelism, ZeRO 0 to 3). Layouts add in another order, and training multiplies such rounding with every step, so weights
that started equal do not end equal on two layouts; instead the losses of the first steps, restarts among them, must agree
to fp32 rounding, and in the last tenth those of most steps roughly.

--out gets report.json, and table.md for docs/reliability.md. Exits with 1 where something was lost.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from esolm_megatron.checkpoint import Checkpoint, newest, step_folder
from esolm_megatron.data.prepare import PrepareConfig, prepare
from esolm_megatron.train.ending import read as read_ending

KINDS = ("one rank", "all", "save", "load", "full disk", "shard server")
ENDS_BY_ITSELF = {"full disk", "shard server"}
LAYOUTS: tuple[dict[str, int | bool], ...] = (
    {},
    {"tensor_size": 2},
    {"pipeline_size": 2},
    {"tensor_size": 2, "pipeline_size": 2},
    {"tensor_size": 2, "sequence_parallel": True, "zero_stage": 2},
    {"pipeline_size": 2, "virtual_pipeline_size": 2, "zero_stage": 0},
    {"context_size": 2, "zero_stage": 3},
)
FIRST_STEPS, ROUNDING = 12, 1e-5
"""On several layouts: steps at the start, and the largest relative difference of their losses."""
IN_THE_END = 0.02
"""The median of the last tenth's differences. Not their mean: weights that rounding drives apart (Adam's steps do not shrink with
the gradient) give single masked tokens losses that differ by 12 nats, in a step whose neighbours differ by 1e-3. Either run repeats
its own bit for bit, and fp64 agrees with each."""
HANGS_S = 300.0
FILE_LIMIT_KIB = 600
"""Below the size of each rank's checkpoint, above that of logs and metrics."""
CONSOLE = Console()


@dataclass
class Trouble:
    """One disturbance, what was left, and how long the next start took to make a new step."""

    kind: str
    layout: str
    committed: int
    """Step of the newest whole checkpoint afterwards."""
    reached: int
    """Last step that had been made."""
    status: int
    """Exit status of the launcher."""
    seconds_to_new_step: float | None = None

    @property
    def repeated(self) -> int:
        """Steps that had been made and must be made again."""
        return max(0, self.reached - self.committed)


class ShardServer:
    """Serves a folder over HTTP; after so many more `shards` it answers 500, None stands for no end."""

    def __init__(self, folder: Path):
        self.shards: int | None = None
        self.refused = 0
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                if server.shards is not None and self.path.endswith(".tar"):
                    server.shards -= 1
                    if server.shards < 0:
                        server.refused += 1
                        self.send_error(500)
                        return
                super().do_GET()

            def log_message(self, *words: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()


class Run:
    """A training run in its folder, started and disturbed."""

    def __init__(self, folder: Path, address: str, steps: int, seed: int):
        self.folder, self.run, self.cache, self.starts = folder, folder / "run", folder / "cache", 0
        self.tree = {
            "name": "run",
            "runs_dir": str(folder),
            "seed": seed,
            "model": {"num_layers": 4, "hidden_size": 64, "num_heads": 4, "seq_length": 64},
            "objective": {"alpha_0": 0.5},
            "train": {
                "num_steps": steps, "global_batch_size": 16, "micro_batch_size": 2, "precision": "fp32",
                "log_every_steps": 1, "device": "cpu",
            },
            "optim": {"lr": 3e-3, "warmup_steps": 5, "ema_decay": 0.9},
            "data": {"path": address, "cache_dir": str(self.cache), "retries": 2},
            "evaluate": {"every_steps": 0},
            "checkpoint": {"every_steps": 3, "keep_last": 3},
        }  # fmt: skip
        folder.mkdir(parents=True)

    @property
    def log(self) -> Path:
        """What the newest start said."""
        return self.folder / "logs" / f"{self.starts:03d}.txt"

    def start(self, layout: dict[str, int | bool], file_limit: int | None = None) -> subprocess.Popen[bytes]:
        """The run as a user starts it, on 4 processes, in a process group of its own."""
        self.starts += 1
        self.log.parent.mkdir(exist_ok=True)
        file = self.folder / "run.yaml"
        file.write_text(yaml.safe_dump(self.tree | {"parallel": layout}))
        command = [sys.executable, "-m", "esolm_megatron", "train", str(file), "--processes", "4"]
        if file_limit is not None:  # in units of 1 KiB; without the signal, writes fail as on a full disk
            command = ["bash", "-c", f'trap "" XFSZ; ulimit -f {file_limit}; exec "$@"', "limited", *command]
        with self.log.open("wb") as log:
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

    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        parent = step_folder(self.run, 0).parent
        return parent.exists() and any(".tmp" in path.name for path in parent.iterdir())


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


def wait_for(process: subprocess.Popen[bytes], what: Any) -> bool:
    """Whether `what()` came true before the process ended."""
    deadline = time.monotonic() + HANGS_S
    while time.monotonic() < deadline:
        if what():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    kill_all(process)
    raise SystemExit(f"HANGS: no new step within {HANGS_S:g} s; see the newest of its logs")


class Chaos:
    """The disturbed run, and what was done to it."""

    def __init__(self, run: Run, server: ShardServer, seed: int):
        self.run, self.server = run, server
        self.generator = random.Random(seed)
        self.troubles: list[Trouble] = []
        self.starting_s = 10.0  # what the last start took to its first new step

    def disturb(self, kind: str, layout: dict[str, int | bool]) -> bool:
        """Start the run, let it work, make trouble; False if it finished first."""
        run, before, begun = self.run, self.run.committed(), time.time()
        if kind == "shard server":
            shutil.rmtree(run.cache, ignore_errors=True)
            self.server.shards, self.server.refused = self.generator.randrange(4), 0
        process = run.start(layout, file_limit=FILE_LIMIT_KIB if kind == "full disk" else None)
        if kind in ENDS_BY_ITSELF:
            try:
                process.wait(HANGS_S)
            except subprocess.TimeoutExpired:
                kill_all(process)
                raise SystemExit(f"HANGS: {kind} did not end the run within {HANGS_S:g} s; see {run.log}") from None
            self._check_reason(kind, process.returncode)
        elif not self._kill(kind, process, before, begun):
            return False
        self.server.shards = None
        reached = max(before, run.last_step(begun))
        self.troubles.append(Trouble(kind, name(layout), run.committed(), reached, process.returncode))
        return True

    def _check_reason(self, kind: str, status: int) -> None:
        """The run must have ended for the reason that was made, and said so."""
        said = self.run.log.read_text()
        met = "cannot write" in said if kind == "full disk" else self.server.refused and "500" in said
        if status == 0 or not met:
            raise SystemExit(f"{kind}: the run ended with status {status}, and not of that; see {self.run.log}")

    def _kill(self, kind: str, process: subprocess.Popen[bytes], before: int, begun: float) -> bool:
        run, generator = self.run, self.generator
        if kind == "load":
            until = begun + generator.uniform(0.1, 1.0) * self.starting_s
            wait_for(process, lambda: time.time() > until or run.last_step(begun) > before)
            kill_all(process)
            return True
        if not wait_for(process, lambda: run.last_step(begun) > before):
            return False
        self.starting_s = round(time.time() - begun, 2)
        if self.troubles and self.troubles[-1].seconds_to_new_step is None:
            self.troubles[-1].seconds_to_new_step = self.starting_s
        goal = before + generator.randrange(1, 8)
        if not wait_for(process, lambda: run.last_step(begun) >= goal):
            return False
        if kind == "save":
            if not wait_for(process, run.saving):
                return False
        else:
            time.sleep(generator.uniform(0, 0.3))
        ranks = children(process.pid)
        if kind == "one rank" and ranks:
            os.kill(generator.choice(ranks), signal.SIGKILL)
            process.wait(90)
        else:
            kill_all(process)
        return True


def name(layout: dict[str, int | bool]) -> str:
    """A layout in a word."""
    sizes = {"TP": "tensor_size", "CP": "context_size", "PP": "pipeline_size", "VP": "virtual_pipeline_size"}
    words = [f"{short}{layout[field]}" for short, field in sizes.items() if field in layout]
    words += ["SP"] if layout.get("sequence_parallel") else []
    return " ".join([*words, f"ZeRO {layout.get('zero_stage', 1)}"])


def difference(a: Path, b: Path, step: int) -> float:
    """Largest difference between the saved tensors of two runs."""
    one, two = (Checkpoint.open(step_folder(run, step), verify=True) for run in (a, b))
    return max(
        float((one.read(kind, key) - two.read(kind, key)).abs().max())
        for kind in one.kinds()
        for key in one.names(kind)
    )


def losses(run: Path) -> dict[int, float]:
    """The loss of each step, as it was made last."""
    return {
        tree["step"]: tree["loss"]
        for tree in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "loss" in tree
    }


def apart(a: Path, b: Path, steps: int) -> tuple[float, float]:
    """Largest relative difference of the losses of two runs' first steps, and the median of those of the last tenth."""
    one, two = losses(a), losses(b)
    first = max(abs(one[s] / two[s] - 1) for s in range(1, FIRST_STEPS + 1))
    return first, median(abs(one[s] / two[s] - 1) for s in range(steps - steps // 10, steps + 1))


def table(troubles: list[Trouble]) -> str:
    """Markdown: a row for each kind, and one for all."""
    head = ("kind", "times", "steps made again: median, most", "exit status", "seconds to a new step: median, most")
    out = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for kind in (*KINDS, "all kinds"):
        mine = [t for t in troubles if kind in (t.kind, "all kinds")]
        if not mine:
            continue
        again = [t.repeated for t in mine]
        status = ", ".join(sorted({"killed" if t.status < 0 else str(t.status) for t in mine}))
        waits = [t.seconds_to_new_step for t in mine if t.seconds_to_new_step is not None]
        wait = f"{median(waits):.1f}, {max(waits):.1f}" if waits else "-"
        out.append(f"| {kind} | {len(mine)} | {median(again):g}, {max(again)} | {status} | {wait} |")
    return "\n".join(out)


def main() -> None:
    """Run it, print the table, exit 1 where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no more kills after so long")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", action="store_true", help="restart on other layouts of 4 processes")
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(f"{args.out}: exists; remove it, or give another --out")
    steps = 8 * args.kills + 20
    tokens, source = args.out / "tokens", Path(__file__).parents[1] / "esolm_megatron"
    text = PrepareConfig(inputs=(str(source),), output=str(tokens), block_tokens=4096, task_bytes=50_000)
    prepare(text, progress=False)  # a shard for each 50 kB, so that there are some to be asked for
    server = ShardServer(tokens)
    run = Run(args.out / "killed", server.address, steps, args.seed)
    calm = Run(args.out / "calm", server.address, steps, args.seed)
    chaos = Chaos(run, server, args.seed)
    kinds = [KINDS[number % len(KINDS)] for number in range(args.kills)]
    chaos.generator.shuffle(kinds)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    deadline = time.monotonic() + 60 * args.minutes
    with Progress(*columns, console=CONSOLE) as progress:
        task = progress.add_task("kills", total=args.kills)
        for kind in kinds:
            if time.monotonic() > deadline:
                break
            layout = chaos.generator.choice(LAYOUTS) if args.layouts else LAYOUTS[1]
            best = run.committed()
            if not chaos.disturb(kind, layout):
                raise SystemExit(f"the run ended before it was disturbed; see {run.log}")
            done = chaos.troubles[-1]
            if done.committed < best:
                raise SystemExit(f"LOST: checkpoint {best} was whole, now the newest is {done.committed}")
            said = f"{done.kind}: at step {done.reached}, {done.repeated} to repeat"
            progress.update(task, advance=1, description=said)
            if not CONSOLE.is_terminal:
                CONSOLE.print(f"{len(chaos.troubles)} {said}", highlight=False)
    for each in (run, calm):
        CONSOLE.print(f"{each.folder}: to the end")
        if each.start(LAYOUTS[1]).wait() or (read_ending(each.run) or {}).get("how") != "finished":
            raise SystemExit(f"{each.folder}: did not finish; see {each.log}")
    worst, (first, last) = difference(run.run, calm.run, steps), apart(run.run, calm.run, steps)
    facts = {"steps": steps, "difference": worst, "losses_first": first, "losses_last": last}
    facts["troubles"] = [asdict(t) for t in chaos.troubles]
    (args.out / "report.json").write_text(json.dumps(facts, indent=1) + "\n")
    (args.out / "table.md").write_text(table(chaos.troubles) + "\n")
    CONSOLE.print(table(chaos.troubles), soft_wrap=True)
    CONSOLE.print(
        f"step {steps} reached; from the undisturbed run differ: weights {worst:g}, losses of the first {FIRST_STEPS} steps "
        f"{first:.1e}, those of the last tenth {last:.1e} in the median"
    )
    if worst > 0 and not args.layouts:
        raise SystemExit("LOST: the weights are not those of the undisturbed run")
    if first > ROUNDING or last > IN_THE_END:
        raise SystemExit("LOST: the losses are not those of the undisturbed run")


if __name__ == "__main__":
    main()
