"""A real SLURM on this machine: munged, slurmctld and several slurmd, each with a host name of its own, in one folder.

Two things differ from a production cluster: nodes claim more cores than there are, and waits are short.
"""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import time
import zlib
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "unshare")
SBIN = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin"
GPUS = 2


def missing():
    """What this machine lacks for it, in words; empty where nothing does."""
    absent = [name for name in NEEDED if shutil.which(name, path=SBIN) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
    tried = subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else "this process may not make namespaces, which give each node its host name"


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class MiniSlurm:
    """`with MiniSlurm(folder) as slurm: slurm.run("sinfo")`."""

    def __init__(self, root, nodes=2):
        self.root, self.nodes = Path(root), [f"n{i + 1}" for i in range(nodes)]
        self.conf = self.root / "slurm.conf"
        self.daemons = {}

    @property
    def env(self):
        """The environment of a user of this cluster."""
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        return keep | {"SLURM_CONF": str(self.conf), "PATH": SBIN}

    def run(self, *words, check=True, **options):
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, check=False, **options)
        assert not check or done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job_id):
        """`scontrol show job`, field by field."""
        text = self.run("scontrol", "show", "job", "-o", str(job_id))
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def __enter__(self):
        self._write()
        try:
            key, run = self.root / "munge.key", self.root / "run"
            self._start(
                "munged", "munged", "-F", f"--key-file={key}", f"--socket={run}/munge.sock", f"--pid-file={run}/munged.pid",
                f"--log-file={self.root}/log/munged.log", f"--seed-file={run}/munged.seed",
            )  # fmt: skip
            self._await((run / "munge.sock").exists, "munged")
            self._start("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
            for name in self.nodes:
                self.start_node(name)
            self._await(
                lambda: len(self.run("sinfo", "-hN", "-p", "main", "-t", "idle", check=False).split()) >= 4, "nodes"
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def start_node(self, name):
        inner = (
            f"hostname {name} && mount --bind {self.root}/hosts /etc/hosts && exec slurmd -D -f {self.conf} -N {name}"
        )
        self._start(name, "unshare", "--mount", "--uts", "sh", "-c", inner)

    def kill_node(self, name):
        """SIGKILL to a slurmd; what it started lives on."""
        self.daemons[name].kill()
        self.daemons.pop(name).wait()

    def _start(self, name, *words):
        with (self.root / f"log/{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                words,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.root,
                start_new_session=True,
            )

    def _await(self, true, what, seconds=30):
        deadline = time.monotonic() + seconds
        while not true():
            dead = [name for name, process in self.daemons.items() if process.poll() is not None]
            assert not dead, f"{dead} ended; see {self.root}/log"
            assert time.monotonic() < deadline, f"{what} not ready; see {self.root}/log"
            time.sleep(0.1)

    def __exit__(self, *_):
        if "slurmctld" in self.daemons:
            for job in {line.split("_")[0] for line in self.run("squeue", "-h", "-o", "%i", check=False).split()}:
                self.run("scancel", job, check=False)
            deadline = time.monotonic() + 5
            while self._left_over(b"slurmstepd") and time.monotonic() < deadline:
                time.sleep(0.1)
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in reversed(self.daemons.values()):
                if process.poll() is None:
                    process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                for process in self.daemons.values():
                    process.wait(5)
        for pid in self._left_over(b""):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _left_over(self, name):
        """Processes of this cluster's jobs, known by the configuration in their environment."""
        tag, out = f"SLURM_CONF={self.conf}".encode(), []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                env = process.joinpath("environ").read_bytes().split(b"\0")
                command = process.joinpath("cmdline").read_bytes()
                of_a_job = b"slurmstepd" in command or any(v.startswith(b"SLURM_JOB_ID=") for v in env)
                if tag in env and of_a_job and name in command:
                    out.append(int(process.name))
        return out

    def _write(self):
        for name in ("state", "spool", "log", "run", "gpu"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o755)
        (self.root / "munge.key").write_bytes(os.urandom(1024))
        (self.root / "munge.key").chmod(0o400)
        for index in range(GPUS):  # copies of /dev/null: SLURM wants devices, and sets CUDA_VISIBLE_DEVICES for them
            os.mknod(self.root / f"gpu/fake{index}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        host, user, ports = socket.gethostname(), pwd.getpwuid(os.getuid()).pw_name, free_ports(1 + len(self.nodes))
        unlike = 1000 * (
            1 + zlib.crc32(str(self.root).encode()) % 60
        )  # ports come from job ids; clusters may run side by side
        r = self.root
        lines = f"""
            ClusterName=mini
            SlurmctldHost={host}(127.0.0.1)
            SlurmctldPort={ports[0]}
            SlurmUser={user}
            SlurmdUser={user}
            AuthType=auth/munge
            CredType=cred/munge
            AuthInfo=socket={r}/run/munge.sock,cred_expire=5
            StateSaveLocation={r}/state
            SlurmdSpoolDir={r}/spool/%n
            SlurmctldPidFile={r}/run/slurmctld.pid
            SlurmdPidFile={r}/run/slurmd.%n.pid
            SlurmctldLogFile={r}/log/slurmctld.log
            SlurmdLogFile={r}/log/slurmd.%n.log
            ProctrackType=proctrack/linuxproc
            TaskPlugin=task/none
            SwitchType=switch/none
            MpiDefault=none
            JobAcctGatherType=jobacct_gather/none
            AccountingStorageType=accounting_storage/none
            JobCompType=jobcomp/none
            SelectType=select/cons_tres
            SelectTypeParameters=CR_Core
            SlurmdParameters=config_overrides
            ReturnToService=2
            FirstJobId={unlike}
            MinJobAge=86400
            JobRequeue=1
            GresTypes=gpu
            KillWait=5
            SlurmdTimeout=10
            MessageTimeout=5
            BatchStartTimeout=10
            UnkillableStepTimeout=10
            InactiveLimit=0
            CompleteWait=0
            TCPTimeout=2
            SchedulerType=sched/backfill
            SchedulerParameters=sched_interval=1,bf_interval=2,sched_min_interval=100000,batch_sched_delay=0
            PreemptType=preempt/partition_prio
            PreemptMode=REQUEUE
            PartitionName=main Nodes=ALL Default=YES MaxTime=2-00:00:00 PriorityTier=1 PreemptMode=REQUEUE
            PartitionName=high Nodes=ALL MaxTime=2-00:00:00 PriorityTier=10 PreemptMode=OFF
        """.split("\n")
        lines += [
            f"NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=64000 Gres=gpu:{GPUS}"
            for name, port in zip(self.nodes, ports[1:], strict=True)
        ]
        self.conf.write_text("\n".join(line.strip() for line in lines) + "\n")
        (r / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # needs no mounted hierarchy
        gpus = f"Name=gpu File={r}/gpu/fake[0-{GPUS - 1}] Flags=nvidia_gpu_env"
        (r / "gres.conf").write_text(f"AutoDetect=off\nNodeName={','.join(self.nodes)} {gpus}\n")
        (r / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in ["localhost", host, *self.nodes]))
