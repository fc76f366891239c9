"""What happens on the login node: everything checked, the run folder filled, the job submitted. No torch.

submitit writes the sbatch script from typed parameters, submits it and makes arrays of it. What the script runs is our own
`job`, not submitit's: see docs/decisions.md.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import esolm_megatron
from esolm_megatron.config import Config, ConfigError, UserError, check, dump, is_remote, load
from esolm_megatron.errors import optional
from esolm_megatron.launch.site import ClusterConfig, ask, cluster_problems, partitions, there
from esolm_megatron.launch.slurm_queue import refuse_running
from esolm_megatron.train.course import with_changes
from esolm_megatron.train.ending import write_json
from esolm_megatron.train.preflight import check_run, resolve

JOB = "esolm_megatron.launch.job"


@dataclass(frozen=True)
class Launch:
    """One run that is about to start: its settings, and RUN/launches/NNN, which holds all that the job needs."""

    config: Config
    folder: Path

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return self.config.run_dir


@dataclass(frozen=True)
class Submission:
    """What goes to SLURM in one sbatch: one run, or an array of them. parameters: submitit's."""

    cluster: ClusterConfig
    launches: tuple[Launch, ...]
    folder: Path
    parameters: dict[str, Any]
    command: str

    @property
    def count(self) -> int | None:
        """Tasks of the array; None for a single job."""
        return len(self.launches) if len(self.launches) > 1 else None

    @property
    def script(self) -> str:
        """The text that sbatch gets."""
        from submitit.slurm.slurm import _make_sbatch_string

        return _make_sbatch_string(self.command, self.folder, map_count=self.count, **self.parameters)


def sweep(words: Sequence[str]) -> list[tuple[str, ...]]:
    """The overrides of each point of a grid.

    >>> sweep(["optim.lr=1e-4,3e-4", "seed=1"])
    [('optim.lr=1e-4', 'seed=1'), ('optim.lr=3e-4', 'seed=1')]
    """
    axes = []
    for word in words:
        key, separator, values = word.partition("=")
        if not separator or not values:
            raise ConfigError(f"--sweep {word!r}: is written section.field=value,value")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return list(itertools.product(*axes))


def plan_launches(
    path: str, overrides: Sequence[str], cluster: ClusterConfig, grid: Sequence[tuple[str, ...]], *, again: bool
) -> tuple[Launch, ...]:
    """The checked runs of a grid. Nothing is written. again: their run folders may exist.

    Raises:
        ConfigError: a run cannot work with this cluster file, or its folder exists and `again` is False.
    """
    launches = []
    for point in grid:
        config = with_changes(_at_home(load(path, [*overrides, *point]), cluster, point))
        if config.run_dir.exists() and not again:
            raise ConfigError(
                f"{config.run_dir}: exists; give --resume to continue it, or choose another name with name=..."
            )
        check_run(config, cluster.num_ranks)
        launches.append(Launch(resolve(config), config.run_dir / "launches" / f"{_last(config.run_dir) + 1:03d}"))
    if len({launch.run_dir for launch in launches}) < len(launches):
        raise ConfigError("--sweep: two points have the same name; sweep over different values")
    return tuple(launches)


def _at_home(config: Config, cluster: ClusterConfig, point: Sequence[str]) -> Config:
    """`config` with paths that hold in any folder, and a name of its own in a sweep."""
    tree = config.model_dump(mode="json")
    tree["runs_dir"] = str(Path(cluster.runs_dir or config.runs_dir).absolute())
    data = tree["data"]
    for owner, key in [(data, "path"), (data, "cache_dir"), *((source, "path") for source in data["sources"].values())]:
        if owner[key] and not is_remote(owner[key]):
            owner[key] = str(Path(owner[key]).absolute())
    parts = [f"{key.rpartition('.')[2]}{value}" for key, _, value in (word.partition("=") for word in point)]
    tree["name"] = re.sub(r"[^A-Za-z0-9._-]", "_", "-".join([config.name, *parts]))
    return check(tree)


def _last(run_dir: Path) -> int:
    return max([0, *(int(p.name) for p in (run_dir / "launches").glob("[0-9][0-9][0-9]"))])


def check_cluster(cluster: ClusterConfig) -> None:
    """Raise ConfigError if sinfo is there and says that this cluster does not have what is asked."""
    found = partitions()
    problems = cluster_problems(cluster, found) if found is not None else []
    if problems:
        raise ConfigError("\n".join(problems))


def submission(cluster: ClusterConfig, launches: tuple[Launch, ...], *, chain: bool) -> Submission:
    """What would be submitted. chain: SLURM must not requeue, the next job of the chain goes on."""
    first = launches[0]
    if len(launches) == 1:
        folder, which = first.folder, f"LAUNCH={shlex.quote(str(first.folder))}"
        output = first.run_dir / "logs" / "job_%j.txt"
    else:
        folder = Path(first.config.runs_dir) / f"{_shared([x.config.name for x in launches])}.sweep"
        which = f'LAUNCH=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(folder / "launches.txt"))})'
        output = folder / "job_%A_%a.txt"
    python = shlex.quote(sys.executable)
    command = "\n".join(
        [
            which,
            'export PYTHONPATH="$LAUNCH/code${PYTHONPATH:+:$PYTHONPATH}"',
            f'exec {python} -P -u -m {JOB} "$LAUNCH"',
        ]
    )
    extra: dict[str, Any] = {**cluster.sbatch, "output": str(output), "no-requeue" if chain else "requeue": True}
    if cluster.reservation:
        extra["reservation"] = cluster.reservation
    parameters = {
        "job_name": launches[0].config.name if len(launches) == 1 else folder.name,
        "partition": cluster.partition, "account": cluster.account, "qos": cluster.qos, "time": cluster.minutes,
        "nodes": cluster.nodes, "ntasks_per_node": cluster.tasks, "cpus_per_task": cluster.cpus_per_task,
        "gpus_per_node": cluster.gpus_per_node or None, "signal_delay_s": cluster.signal_s,
        "mem": {None: None, 0: "0"}.get(cluster.memory_gb, f"{cluster.memory_gb}G"), "constraint": cluster.constraint,
        "exclude": cluster.exclude, "exclusive": cluster.exclusive or None, "mail_user": cluster.mail_user,
        "mail_type": cluster.mail_type if cluster.mail_user else None, "wckey": None, "stderr_to_stdout": True,
        "use_srun": False, "setup": _setup(cluster), "additional_parameters": extra,
    }  # fmt: skip
    return Submission(
        cluster, launches, folder, {k: v for k, v in parameters.items() if v is not None or k == "wckey"}, command
    )


def _setup(cluster: ClusterConfig) -> list[str]:
    env = {"OMP_NUM_THREADS": str(cluster.cpus_per_task), **cluster.env}
    if cluster.network_interface:
        env |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), cluster.network_interface)
    if cluster.scratch:
        env["TMPDIR"] = cluster.scratch
    lines = [f"module load {shlex.quote(name)}" for name in cluster.modules]
    return [*lines, *cluster.setup, *(f"export {key}={shlex.quote(value)}" for key, value in env.items())]


def _shared(names: Sequence[str]) -> str:
    """What names begin with alike."""
    alike = "".join(a[0] for a in itertools.takewhile(lambda a: len(set(a)) == 1, zip(*names, strict=False)))
    return alike.rstrip("-._0123456789") or "runs"


def write(launch: Launch, cluster: ClusterConfig, *, requeue: bool) -> None:
    """Fill the folder of a launch: settings, the code as it is now, and where it comes from.

    Raises:
        UserError: a job of this run is still in the queue.
    """
    refuse_running(launch.run_dir)
    (launch.run_dir / "logs").mkdir(parents=True, exist_ok=True)  # sbatch does not make the folder of its output
    launch.folder.mkdir(parents=True)
    (launch.run_dir / "stop_requested").unlink(missing_ok=True)
    (launch.folder / "config.yaml").write_text(dump(launch.config))
    (launch.folder / "cluster.yaml").write_text(yaml.safe_dump(cluster.model_dump(mode="json"), sort_keys=False))
    package = Path(esolm_megatron.__file__).parent
    shutil.copytree(
        package, launch.folder / "code" / package.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
    )
    (launch.folder / "revision.txt").write_text(_git(package, "rev-parse", "HEAD") or "not a git repository\n")
    (launch.folder / "changes.diff").write_text(_git(package, "diff", "HEAD", "--relative"))
    found = {f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions()}
    (launch.folder / "packages.txt").write_text("\n".join(sorted(found, key=str.lower)) + "\n")
    write_json(launch.folder / "launch.json", {"requeue": requeue, "time": time.time(), "jobs": []})


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def submit(planned: Submission, *, chain: int = 1, again: bool = False) -> list[str]:
    """Write all folders and submit; ids of the jobs.

    Raises:
        UserError: submitit is missing, or sbatch refuses; before any folder is written where sbatch can tell.
    """
    submitit = optional("submitit", "esolm launch (slurm/train.sbatch does without)")
    if not there("sbatch"):
        raise UserError("sbatch is not there: is this a login node? esolm launch --local needs no SLURM")
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".sh") as trial:
        trial.write(planned.script)
        trial.flush()
        status, text = ask("sbatch", "--test-only", trial.name)
    if status:
        raise UserError(f"sbatch would refuse this: {text.strip()}")
    for launch in planned.launches:
        write(launch, planned.cluster, requeue=chain == 1)
    if planned.count:
        planned.folder.mkdir(parents=True, exist_ok=True)
        (planned.folder / "launches.txt").write_text("".join(f"{x.folder}\n" for x in planned.launches))
    ids: list[str] = []
    for _ in range(chain):
        executor = submitit.SlurmExecutor(planned.folder)
        after = {"dependency": f"afterany:{ids[-1]}"} if ids else {}
        executor.update_parameters(**planned.parameters, **after)
        if planned.count:
            executor.parameters["map_count"] = planned.count
        try:
            ids.append(str(executor._submit_command(planned.command).job_id))
        except Exception as error:  # submitit's own kinds, and whatever sbatch does
            raise UserError(f"sbatch failed: {error}") from None
    for index, launch in enumerate(planned.launches):
        jobs = [f"{job}_{index}" for job in ids] if planned.count else ids
        file = launch.folder / "launch.json"
        write_json(file, {**json.loads(file.read_text()), "jobs": jobs})
    return ids
