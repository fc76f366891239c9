"""The body of a job: health check, ranks, how they ended, and whether they start again.

`python -m esolm_megatron.launch.job LAUNCH` runs in the batch script, outside all ranks, because what must be judged is
how they die. Ranks save when a signal reaches them; this process only passes on what reached it alone, waits, reads what
they left, and asks SLURM to requeue the job. Its last line is the cause.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from esolm_megatron.errors import UserError
from esolm_megatron.launch import verdict
from esolm_megatron.launch.executor import Local, Machine, Slurm
from esolm_megatron.launch.health import report_file, together_file
from esolm_megatron.launch.record import Cause, Record, fruitless, newest_step, starts
from esolm_megatron.launch.site import ClusterConfig, load_cluster
from esolm_megatron.train.ending import Ending, mark, mark_running

_LONGEST_WAIT_S = 3600.0
_CLOCK_S = 60.0


class Job:
    """One start of a launched run."""

    def __init__(self, folder: Path, machine: Callable[[Path, ClusterConfig, Path], Machine]):
        self.folder, self.run_dir = folder, folder.parents[1]
        self.cluster: ClusterConfig = load_cluster(folder / "cluster.yaml")
        self.launch: dict[str, Any] = json.loads((folder / "launch.json").read_text())
        self.record = Record(self.run_dir)
        self.machine = machine(folder, self.cluster, self.run_dir)
        self.attempt = self.machine.attempt
        self.logs = self.run_dir / "logs" / self.attempt

    def say(self, line: str) -> None:
        """A line in the job's log."""
        text = f"{time.strftime('%F %T')} {line}\n"
        sys.stdout.write(text)
        sys.stdout.flush()
        self.logs.mkdir(parents=True, exist_ok=True)
        with (self.logs / "job.txt").open("a") as file:
            file.write(text)

    def go(self) -> int:
        """One start, to its end; the exit status of the job."""
        events = starts(self.record.events(self.folder.name))
        over = next((s for s in events if s["again"] is False), None)  # an earlier job of a chain
        if over is not None and not self.machine.restarted:
            self.say(f"{self.run_dir}: {over['how']}: {over['detail']}; nothing is left for this job")
            return 0 if over["how"] == "finished" else int(Ending[over["how"].upper()])
        step = newest_step(self.run_dir)
        self.record.claim(self.attempt)
        self.record.write(
            "start", launch=self.folder.name, attempt=self.attempt, step=step, nodes=list(self.machine.hosts)
        )
        self.machine.on_signal = self._note_signal
        self.say(f"start {self.attempt} from step {step}; {self.machine.where()}")
        listed = starts(self.record.events(self.folder.name))
        if listed[:-1] and (lost := fruitless(listed[:-1], step)) > self.cluster.max_restarts:
            return self._end(self._gave_up(Cause(Ending.KILLED, "its nodes failed, or it was killed with them"), lost))
        cause = self._health()
        if cause is None:
            mark_running(self.run_dir, step)
            status = self.machine.run("rank", self.logs)
            cause = verdict.cause(self.run_dir, self.logs, self.machine, status, step)
        return self._end(cause)

    def _note_signal(self, number: int) -> None:
        self.record.write("signal", launch=self.folder.name, attempt=self.attempt, signal=signal.Signals(number).name)

    def _health(self) -> Cause | None:
        """What speaks against training here; None if nothing does."""
        if self.cluster.health == "off":
            return None
        begun = time.time()
        status = self.machine.run("health", self.logs, limit_s=self.cluster.health_limit_s)
        if self.machine.told:
            return Cause(Ending.STOPPED, f"{self.machine.told} came during the health check")
        problems: dict[str, list[str]] = {}
        for rank in range(self.cluster.num_ranks):
            host, path = self.machine.host_of(rank), report_file(self.logs, rank)
            if not path.exists():
                problems.setdefault(host, []).append(f"rank {rank} did not answer")
                continue
            found = json.loads(path.read_text())
            off = found["time"] - time.time() if found["time"] > time.time() else min(0.0, found["time"] - begun)
            clock = [f"its clock is {off:+.0f} s off"] if abs(off) > _CLOCK_S else []
            if found["problems"] or clock:
                problems.setdefault(host, []).extend([*found["problems"], *clock])
        path = together_file(self.logs)
        together: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        for line in together.get("slow", ()):
            self.say(f"slow: {line}")
        for host in together.get("bad", ()):
            problems.setdefault(host, []).extend(line for line in together["wrong"] if f"({host})" in line)
        if problems:
            lines = "; ".join(f"{host}: {', '.join(found)}" for host, found in problems.items())
            all_bad = set(problems) == set(
                self.machine.hosts
            )  # then it is the job, the disk or the network, not a node
            return Cause(Ending.UNHEALTHY, lines, () if all_bad and len(problems) > 1 else tuple(problems))
        if status or (self.cluster.health == "all" and not together):
            return Cause(
                Ending.UNHEALTHY, f"the collectives did not end well (status {status}); see {self.logs}/health.txt"
            )
        self.say(f"healthy: {len(self.machine.hosts)} nodes, {time.time() - begun:.1f} s")
        return None

    def _gave_up(self, cause: Cause, count: int) -> Cause:
        return replace(cause, detail=f"gave up, {count} starts without a new checkpoint: {cause.detail}", hopeless=True)

    def _end(self, cause: Cause) -> int:
        """Write down how it ended, start again if that may help, and say so."""
        if self.record.owner() not in (None, self.attempt):
            self.say("another start of this run has taken over; this one ends without a word in the run folder")
            return int(Ending.STOPPED)
        step = newest_step(self.run_dir)
        lost = 0
        if cause.ending not in (Ending.STOPPED, Ending.FINISHED):
            lost = fruitless(starts(self.record.events(self.folder.name)), step)
            if not cause.hopeless and lost > self.cluster.max_restarts:
                cause = self._gave_up(cause, lost)
        again = not cause.hopeless and (cause.ending.restart or cause.ending == Ending.FAILED)
        if (self.run_dir / "stop_requested").exists():
            again = False
        delay = 0.0
        if again and cause.ending != Ending.STOPPED:
            delay = min(_LONGEST_WAIT_S, self.cluster.restart_delay_s * 2 ** max(0, lost - 1))
        marker = verdict.marker(self.run_dir)
        if marker.get("how") != cause.how or cause.hopeless:
            mark(self.run_dir, cause.ending, marker.get("step", step), cause.detail)
        self.record.write(
            "end", launch=self.folder.name, attempt=self.attempt, how=cause.how, detail=cause.detail, step=step,
            again=again, delay_s=delay, exclude=list(cause.nodes),
        )  # fmt: skip
        what = f"{cause.how} at step {step}"
        if again and self.launch["requeue"]:
            nodes = [n for e in self.record.events(self.folder.name) for n in e.get("exclude") or ()]
            what += f"; {self.machine.start_again(delay, list(dict.fromkeys(nodes)))}"
        self.say(f"{what}: {cause.detail or 'done'}")
        return int(cause.ending)


def main(folder: Path) -> int:
    """The job's exit status. Outside SLURM the starts follow each other here."""
    if "SLURM_JOB_ID" in os.environ:
        try:
            return Job(folder, Slurm).go()
        except UserError as error:
            sys.stderr.write(f"{error}\n")
            return int(Ending.BAD_CONFIG)
    while True:
        job = Job(folder, Local)
        status = job.go()
        wait = job.machine.again_after
        if wait is None or job.machine.told:
            return status
        time.sleep(wait)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute()))
