"""What a job runs on: SLURM's nodes through srun, or processes of this machine. Both start ranks, and start the job again."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from esolm_megatron.errors import UserError
from esolm_megatron.launch.local import run_local
from esolm_megatron.launch.record import Record, starts
from esolm_megatron.launch.site import ClusterConfig, ask

_OWNER_CHECK_S = 5.0


class Machine(Protocol):
    """hosts: in the order of ranks. told: the signal that asked this job to end, if one did."""

    attempt: str
    restarted: bool
    hosts: tuple[str, ...]
    told: str
    again_after: float | None
    on_signal: Callable[[int], None]

    def where(self) -> str:
        """Nodes and ranks, for people."""

    def host_of(self, rank: int) -> str:
        """The node of a rank."""

    def run(self, part: str, logs: Path, limit_s: float | None = None) -> int:
        """Start `part`, a module of this package, on all ranks; their worst exit status."""

    def start_again(self, delay_s: float, exclude: Sequence[str]) -> str:
        """Start the job again after delay_s, elsewhere than on `exclude`; what was done, for people."""


def rank_command(cluster: ClusterConfig, part: str, folder: Path) -> list[str]:
    """What each process of a job runs."""
    python = [cluster.python or sys.executable, "-P", "-u", "-m", f"esolm_megatron.launch.{part}", str(folder)]
    if cluster.container == "apptainer":
        binds = [word for mount in cluster.container_mounts for word in ("--bind", mount)]
        gpus = ["--nv"] if cluster.gpus_per_node else []
        return ["apptainer", "exec", *gpus, *binds, str(cluster.container_image), *python]
    return python


def srun_command(cluster: ClusterConfig, part: str, folder: Path, output: str) -> list[str]:
    """The srun line: one process for each GPU, bound to its cores; when one fails, all end."""
    words = [
        "srun", f"--nodes={cluster.nodes}", f"--ntasks={cluster.num_ranks}", f"--ntasks-per-node={cluster.tasks}",
        f"--cpus-per-task={cluster.cpus_per_task}", "--cpu-bind=cores", "--distribution=block", "--kill-on-bad-exit=1",
        "--mpi=none", "--unbuffered", "--export=ALL", f"--output={output}",
    ]  # fmt: skip
    if cluster.container == "pyxis":
        words.append(f"--container-image={cluster.container_image}")
        words += [f"--container-mounts={','.join(cluster.container_mounts)}"] if cluster.container_mounts else []
    return [*words, *cluster.srun, *rank_command(cluster, part, folder)]


_PORTS = range(12000, 32000)
"""Below those that the system gives away."""


def meeting_port(job_id: int) -> int:
    """Where the ranks of a job meet: by its number, or the next that nobody uses on this node, the job's first.

    Jobs whose numbers are 10,000 apart begin at the same one.
    """
    first = 2 * (job_id % (len(_PORTS) // 2))
    for step in range(0, len(_PORTS), 2):
        port = _PORTS[(first + step) % len(_PORTS)]
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what has just ended does not count
            probe.bind(("", port))
            return port
    raise UserError(f"no port of {_PORTS.start} to {_PORTS.stop - 1} is free on {os.uname().nodename}")


class Slurm:
    """The nodes of this job."""

    def __init__(self, folder: Path, cluster: ClusterConfig, run_dir: Path, env: Mapping[str, str] = os.environ):
        self.folder, self.cluster, self.run_dir = folder, cluster, run_dir
        self.job_id = int(env["SLURM_JOB_ID"])
        count = int(env.get("SLURM_RESTART_COUNT", 0))
        self.attempt, self.restarted = f"{self.job_id}.{count}", count > 0
        status, text = ask("scontrol", "show", "hostnames", env["SLURM_JOB_NODELIST"])
        if status:  # what it says then is no list of hosts
            raise UserError(f"scontrol show hostnames {env['SLURM_JOB_NODELIST']}: {text.strip()}")
        self.hosts, self.port = tuple(text.split()), meeting_port(self.job_id)
        self.told = ""
        self.again_after: float | None = None
        self.on_signal: Callable[[int], None] = lambda number: None
        self._srun: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: Any) -> None:
        """SIGTERM comes to the ranks by itself; the others may have been meant for this process alone."""
        first, self.told = not self.told, self.told or signal.Signals(number).name
        if number != signal.SIGTERM and self._srun is not None and self._srun.poll() is None:
            self._srun.send_signal(signal.SIGUSR1)  # srun passes it on
        if first:
            self.on_signal(number)

    def where(self) -> str:
        """Which ranks are on which node."""
        size = self.cluster.tasks
        ranks = (f"{i * size}-{i * size + size - 1} on {host}" for i, host in enumerate(self.hosts))
        return f"ranks {', '.join(ranks)}; they meet at {self.hosts[0]}:{self.port}"

    def host_of(self, rank: int) -> str:
        """By --distribution=block."""
        return self.hosts[rank // self.cluster.tasks]

    def run(self, part: str, logs: Path, limit_s: float | None = None) -> int:
        """srun's status; 124 when it took longer than limit_s. Ends early when another start takes over."""
        words = srun_command(self.cluster, part, self.folder, str(logs / f"{part}_%5t.txt"))
        env = os.environ | {
            "MASTER_ADDR": self.hosts[0], "MASTER_PORT": str(self.port + (part == "health")),
            "ESOLM_ATTEMPT": self.attempt, "ESOLM_LOGS": str(logs),
        }  # fmt: skip
        owner, begun, record = self.attempt, time.monotonic(), Record(self.run_dir)
        with (logs / f"{part}.txt").open("ab") as log:
            log.write(f"{shlex.join(words)}\n".encode())
            log.flush()
            self._srun = process = subprocess.Popen(words, stdout=log, stderr=log, env=env)
            asked = begun
            while process.poll() is None:
                now = time.monotonic()
                if now - asked > _OWNER_CHECK_S:
                    asked, owner = now, record.owner() or self.attempt
                if owner != self.attempt or (limit_s is not None and now - begun > limit_s):
                    process.terminate()
                    process.wait()
                    return 124
                time.sleep(0.2)
        return process.returncode

    def start_again(self, delay_s: float, exclude: Sequence[str]) -> str:
        """Requeue the job, unless SLURM has done so, or someone has cancelled it."""
        job = str(self.job_id)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # scontrol inherits it: requeueing ends whatever runs in this job
        if self.told == "SIGTERM":  # preempted, requeued or cancelled: all look alike from here, and all are decided
            return "SLURM starts it again unless it was cancelled"
        if not delay_s and not exclude:
            return _answer(*ask("scontrol", "requeue", job))
        status, text = ask("scontrol", "requeuehold", job)
        if status:
            return _answer(status, text)
        said = ["requeued"]
        if exclude:
            listed = ",".join([*([self.cluster.exclude] if self.cluster.exclude else []), *exclude])
            status, text = ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={listed}")
            said.append(f"without {', '.join(exclude)}" if status == 0 else f"not without {exclude}: {text.strip()}")
        if delay_s:  # never earlier than SLURM itself wants: it waits until the old credential is void
            begin = max(_seconds(_field(job, "EligibleTime")), time.time() + delay_s)
            at = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(begin))
            status, text = ask("scontrol", "update", f"JobId={job}", f"StartTime={at}")
            said.append(f"not before {at}" if status == 0 else f"at once: {text.strip()}")
        status, text = ask("scontrol", "release", job)
        return ", ".join(said) if status == 0 else f"held, scontrol could not release it: {text.strip()}"


def _answer(status: int, text: str) -> str:
    if "is pending" in text:  # after a node's failure SLURM is quicker
        return "SLURM has requeued it"
    return "requeued" if status == 0 else f"scontrol could not requeue it: {text.strip()}"


def _field(job: str, name: str) -> str:
    """One field of `scontrol show job`; empty where it is not there."""
    status, text = ask("scontrol", "show", "job", "-o", job)
    found = None if status else re.search(rf"(?:^|\s){name}=(\S*)", text)
    return found[1] if found else ""


def _seconds(text: str) -> float:
    """A time of SLURM in seconds of the clock; 0 where it is unknown."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return 0.0


class Local:
    """This machine, as if it were a cluster of one node."""

    def __init__(self, folder: Path, cluster: ClusterConfig, run_dir: Path):
        self.folder, self.cluster, self.run_dir = folder, cluster, run_dir
        count = len(starts(Record(run_dir).events()))
        self.attempt, self.restarted = f"local.{count}", count > 0
        self.hosts: tuple[str, ...] = (os.uname().nodename,)
        self.told = ""
        self.again_after: float | None = None
        self.on_signal: Callable[[int], None] = lambda number: None

    def where(self) -> str:
        """All ranks are here."""
        return f"ranks 0-{self.cluster.num_ranks - 1} on {self.hosts[0]}"

    def host_of(self, rank: int) -> str:
        """This machine."""
        return self.hosts[0]

    def run(self, part: str, logs: Path, limit_s: float | None = None) -> int:
        """The status of `run_local`; what srun would say about a dead rank is written where srun writes it."""
        logs.mkdir(parents=True, exist_ok=True)
        env = {"ESOLM_ATTEMPT": self.attempt, "ESOLM_LOGS": str(logs)}

        def note(rank: int, code: int) -> None:
            what = signal.strsignal(-code) if code < 0 else f"Exited with exit code {code}"
            with (logs / f"{part}.txt").open("a") as log:
                log.write(f"srun: error: {self.hosts[0]}: task {rank}: {what}\n")

        def hear(number: int) -> None:
            self.told = self.told or signal.Signals(number).name
            self.on_signal(number)

        return run_local(
            rank_command(self.cluster, part, self.folder), self.cluster.num_ranks, env=env,
            output=lambda rank: logs / f"{part}_{rank:05d}.txt", on_failure=note, on_signal=hear, limit_s=limit_s,
        )  # fmt: skip

    def start_again(self, delay_s: float, exclude: Sequence[str]) -> str:
        """`job.main` does it. A machine of one cannot leave itself out."""
        self.again_after = None if exclude else delay_s
        return f"starts again in {delay_s:g} s" if self.again_after is not None else "this is the only node"
