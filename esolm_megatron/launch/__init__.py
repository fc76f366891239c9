"""Starts runs: as processes of this machine, or as SLURM jobs that survive what happens to them.

    local         processes on this machine
    site          what is written once about a cluster, checked against sinfo
    submit        run folder, code snapshot, sbatch script, submission         (the login node)
    job           health check, ranks, how they ended, start again or not      (one process in each job)
    health rank   what srun starts once for each GPU
    record        what the parts write down for each other in the run folder
    executor      what a job runs on: SLURM's nodes, or this machine
    slurm_queue   which jobs SLURM still knows
    verdict       why ranks ended
    table         what `esolm jobs` shows

Only `rank` and the last part of `health` import torch: refusing a bad run, and judging a dead one, must be quick.
"""

from esolm_megatron.launch.local import run_local

__all__ = ["run_local"]
