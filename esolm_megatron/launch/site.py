"""What is written once about a cluster, `slurm/clusters/*.yaml`; checked by itself and against what sinfo says."""

from __future__ import annotations

import difflib
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from esolm_megatron.config import ConfigError, Section
from esolm_megatron.config.yaml_text import read_mapping
from esolm_megatron.errors import shown
from esolm_megatron.plan.devices import Fabric


class ClusterConfig(Section):
    """Where and how jobs run. Nothing in it changes what is trained."""

    partition: str
    """Partition of the jobs."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    nodes: int = Field(1, ge=1)
    """Nodes of a job."""
    gpus_per_node: int = Field(0, ge=0)
    """GPUs asked of each node, one process each; 0 for a cluster without GPUs."""
    tasks_per_node: int | None = Field(None, ge=1)
    """Processes on each node; null means gpus_per_node. Only a cluster without GPUs may set it."""
    gpu: str = "H100"
    """Kind of GPU that `esolm launch` plans for."""
    fabric: Fabric = Fabric()
    """What connects its GPUs, and how often nodes fail, for `esolm plan`."""
    cpus_per_task: int = Field(1, ge=1)
    """Cores of each process, which is bound to them."""
    memory_gb: int | None = Field(None, ge=0)
    """Memory of each node; 0 means all of it, null the site's default."""
    exclusive: bool = False
    """Share nodes with no other job."""
    time_h: float = Field(gt=0)
    """Time limit of a job in hours. A longer run is requeued."""
    signal_s: int = Field(300, ge=10, le=65535)
    """Seconds before the limit at which the run is asked to save: more than a step and a checkpoint take."""
    constraint: str | None = None
    """Features that nodes must have."""
    exclude: str | None = None
    """Nodes that are not used."""
    reservation: str | None = None
    """Reservation that the jobs belong to."""
    mail_user: str | None = None
    """Address that SLURM writes to."""
    mail_type: str = "FAIL,END"
    """Events that it writes about."""
    sbatch: dict[str, str] = Field(default_factory=dict)
    """Any other options of sbatch, by their long names."""
    srun: tuple[str, ...] = ()
    """Any other words for srun."""
    modules: tuple[str, ...] = ()
    """Environment modules loaded in the job."""
    setup: tuple[str, ...] = ()
    """Lines of shell run at the start of the job."""
    python: str | None = None
    """Python of the processes; null means the one that runs `esolm launch`."""
    container: Literal["none", "pyxis", "apptainer"] = "none"
    """What the processes of the run are wrapped in; the job's own script runs outside."""
    container_image: str | None = None
    """Image of the container."""
    container_mounts: tuple[str, ...] = ()
    """Folders made visible inside, as FROM:TO."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment of the processes: NCCL_*, and whatever the site needs."""
    network_interface: str | None = None
    """Interface that NCCL and gloo meet on, as `ib0`."""
    scratch: str | None = None
    """Folder on each node for temporary files."""
    runs_dir: str | None = None
    """Folder on the shared file system for run folders; null keeps the run's own."""
    max_restarts: int = Field(5, ge=0)
    """Restarts in a row without a new checkpoint after which a job gives up."""
    restart_delay_s: float = Field(60.0, ge=0)
    """Wait before the first restart after a failure; doubled with each that brings no new checkpoint, up to an hour."""
    health: Literal["off", "node", "all"] = "all"
    """Before training: nothing; GPUs, ECC, memory, disk and clock of each node; or collectives of all processes too."""
    health_limit_s: float = Field(300.0, gt=0)
    """Seconds that this may take."""
    min_memory_gb: float = Field(1.0, ge=0)
    """Free memory that a node must have."""
    min_disk_gb: float = Field(1.0, ge=0)
    """Free room that the file system of the run folder must have."""

    @property
    def tasks(self) -> int:
        """Processes on each node."""
        return self.tasks_per_node or self.gpus_per_node

    @property
    def wires(self) -> Fabric:
        """The fabric, with as many GPUs in a node as it has."""
        return self.fabric.model_copy(update={"gpus_per_node": self.tasks})

    @property
    def num_ranks(self) -> int:
        """Processes of a run."""
        return self.nodes * self.tasks

    @property
    def minutes(self) -> int:
        """Time limit as sbatch counts it."""
        return max(1, round(60 * self.time_h))

    @model_validator(mode="after")
    def _fits_together(self) -> ClusterConfig:
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"tasks_per_node = {self.tasks_per_node}: one process for each of gpus_per_node = {self.gpus_per_node}; "
                "leave tasks_per_node out"
            )
        if not self.tasks:
            raise ValueError("gpus_per_node = 0: set it, or tasks_per_node on a cluster without GPUs")
        if (self.container != "none") != (self.container_image is not None):
            raise ValueError(
                f"container = {self.container}: container and container_image go together; set both or none"
            )
        if self.signal_s >= 60 * self.minutes:
            raise ValueError(f"signal_s = {self.signal_s}: must be below the time limit of {60 * self.minutes} s")
        return self


def load_cluster(path: str | Path) -> ClusterConfig:
    """The checked file.

    Raises:
        ConfigError: with every problem, one a line.
    """
    tree = read_mapping(Path(path), "fields")
    try:
        return ClusterConfig.model_validate(tree)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            name = ".".join(map(str, item["loc"]))
            if item["type"] == "extra_forbidden":
                near = difflib.get_close_matches(name, ClusterConfig.model_fields, n=1)
                lines.append(f"{name}: no such field; {f'did you mean {near[0]}?' if near else 'see slurm/README.md'}")
            elif name:
                lines.append(f"{name} = {shown(item.get('input'))}: {item['msg']}")
            else:
                lines.append(item["msg"].removeprefix("Value error, "))
        raise ConfigError("\n".join([f"{path}:", *lines])) from None


def there(command: str) -> bool:
    """Whether this machine has a command of SLURM."""
    return shutil.which(command) is not None


def ask(*command: str, timeout_s: float = 30.0) -> tuple[int, str]:
    """Exit status and output of a command of SLURM; never raises. A controller that does not answer is status 1."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return done.returncode, done.stdout + (done.stderr if done.returncode else "")


def minutes_of(text: str) -> float:
    """Minutes of a time as sinfo writes it: 30, 1:00:00, 2-00:00:00, infinite.

    >>> minutes_of("2-01:30:00"), minutes_of("30:00"), minutes_of("infinite")
    (2970.0, 30.0, inf)
    """
    if text in ("infinite", "n/a"):
        return float("inf")
    days, _, rest = text.rpartition("-")
    seconds = 0.0
    for part in rest.split(":"):
        seconds = 60 * seconds + float(part)
    return (1440 * int(days or 0)) + seconds / 60


def partitions() -> dict[str, dict[str, Any]] | None:
    """nodes, minutes, cores, and GPUs of a node in each partition, as sinfo says; None where it does not answer."""
    status, text = ask("sinfo", "-h", "-o", "%R|%D|%l|%c|%G") if there("sinfo") else (1, "")
    if status:
        return None
    out: dict[str, dict[str, Any]] = {}
    for line in text.splitlines():  # one for each kind of node in a partition
        name, nodes, limit, cores, gres = line.strip().split("|")
        facts = out.setdefault(name, {"nodes": 0, "minutes": minutes_of(limit), "cores": 0, "gpus": 0})
        facts["nodes"] += int(nodes)
        facts["cores"] = max(facts["cores"], int(cores.rstrip("+")))
        gpus = [g.split("(")[0].split(":")[-1] for g in gres.split(",") if g.startswith("gpu:")]
        facts["gpus"] = max(facts["gpus"], sum(int(g) for g in gpus if g.isdigit()))
    return out


def cluster_problems(cluster: ClusterConfig, found: dict[str, dict[str, Any]]) -> list[str]:
    """What `cluster` asks for and `found`, from `partitions`, does not have."""
    if cluster.partition not in found:
        return [f"partition = {cluster.partition}: sinfo knows {', '.join(sorted(found))}"]
    has, out = found[cluster.partition], []
    where = f"partition {cluster.partition} has"
    if cluster.nodes > has["nodes"]:
        out.append(f"nodes = {cluster.nodes}: {where} {has['nodes']}")
    if cluster.minutes > has["minutes"]:
        out.append(f"time_h = {cluster.time_h:g}: {where} a limit of {has['minutes'] / 60:g} hours")
    if cluster.gpus_per_node > has["gpus"]:
        out.append(f"gpus_per_node = {cluster.gpus_per_node}: {where} nodes with {has['gpus']}")
    if cluster.tasks * cluster.cpus_per_task > has["cores"]:
        out.append(
            f"cpus_per_task = {cluster.cpus_per_task}: {cluster.tasks} processes want {cluster.tasks * cluster.cpus_per_task} "
            f"cores of a node, {where} nodes with {has['cores']}"
        )
    return out
