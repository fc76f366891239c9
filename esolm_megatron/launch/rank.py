"""One process of a run, as srun starts it once for each GPU: `python -m esolm_megatron.launch.rank LAUNCH`.

A rank that returns from the trainer exits with 0, whatever the ending: ended.json says it, and any other status would make
srun kill ranks that still save.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from esolm_megatron.launch.record import Record, failure_file
from esolm_megatron.train.ending import Ending, write_json

_FENCE_S = 2.0


def take_place() -> int:
    """This process's rank; RANK, LOCAL_RANK and WORLD_SIZE are set from SLURM's names where they are missing."""
    for name, slurm in (("RANK", "PROCID"), ("LOCAL_RANK", "LOCALID"), ("WORLD_SIZE", "NTASKS")):
        if f"SLURM_{slurm}" in os.environ:
            os.environ.setdefault(name, os.environ[f"SLURM_{slurm}"])
    return int(os.environ["RANK"])


def place() -> dict[str, Any]:
    """Where this process runs: host, cores it is bound to, GPUs it sees."""
    return {
        "rank": int(os.environ["RANK"]),
        "local_rank": int(os.environ["LOCAL_RANK"]),
        "host": os.uname().nodename,
        "cores": sorted(os.sched_getaffinity(0)),
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


def fence(record: Record, attempt: str) -> None:
    """End this process when another start of the run has taken over; asks from a thread.

    Where a node's slurmd dies and its processes do not, SLURM starts the job again beside them. Only the first rank commits
    checkpoints, prunes and writes metrics, and without it the others come to nothing: it alone asks.
    """

    def watch() -> None:
        while True:
            time.sleep(_FENCE_S)
            owner = record.owner()
            if owner not in (None, attempt):
                sys.stderr.write(f"start {attempt}: start {owner} has taken over this run; ending\n")
                sys.stderr.flush()
                os._exit(Ending.STOPPED)

    threading.Thread(target=watch, name="fence", daemon=True).start()


def main(folder: Path) -> int:
    """Train, or continue; returns the exit status. An error is one line, in the log and in `failure_file`."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):  # until the trainer listens itself
        signal.signal(number, lambda *_: os._exit(Ending.STOPPED))
    rank = take_place()
    sys.stderr.write(json.dumps(place()) + "\n")
    logs, run_dir = Path(os.environ["ESOLM_LOGS"]), folder.parents[1]
    if rank == 0:
        fence(Record(run_dir), os.environ["ESOLM_ATTEMPT"])
    try:
        from esolm_megatron.config import UserError, load
        from esolm_megatron.train.trainer import train

        train(load(folder / "config.yaml"))
    except Exception as error:
        foreseen = isinstance(error, UserError)
        if not foreseen:
            import traceback

            traceback.print_exc()
        code = Ending.BAD_CONFIG if foreseen else Ending.FAILED
        line = str(error) if foreseen else f"{type(error).__name__}: {error}"
        write_json(
            failure_file(logs, rank),
            {"rank": rank, "host": os.uname().nodename, "code": int(code), "error": line, "time": time.time()},
        )
        sys.stderr.write(f"rank {rank} on {os.uname().nodename}: {line}\n")
        sys.stderr.flush()
        os._exit(code)  # a broken process group may not let the interpreter end
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
