"""Runs on a cluster: `esolm launch`, `esolm jobs`."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from rich.text import Text

from esolm_megatron.commands import show
from esolm_megatron.config import ConfigError
from esolm_megatron.terminal import Terminal


def run_launch(args: argparse.Namespace) -> int:
    """Check everything, fill the run folder, and submit; or show it, or run it here."""
    from esolm_megatron.launch.site import load_cluster
    from esolm_megatron.launch.submit import check_cluster, plan_launches, submission, submit, sweep, write
    from esolm_megatron.train import course

    cluster = load_cluster(args.on)
    if not args.local:
        check_cluster(cluster)
    if args.chain < 1 or (args.chain > 1 and args.sweep):
        raise ConfigError(f"--chain {args.chain}: a number of jobs from 1 on, and not together with --sweep")
    if (args.local or args.prepare) and (args.sweep or args.chain > 1):
        raise ConfigError("--local and --prepare take one run: leave out --sweep and --chain")
    launches = plan_launches(args.path, args.overrides, cluster, sweep(args.sweep), again=args.resume)
    if args.change:
        if not args.resume or args.sweep or args.dry_run:
            raise ConfigError(
                "--change: alters one run that is continued; give --resume, and neither --sweep nor --dry-run"
            )
        course.change(launches[0].config, args.change)
        launches = plan_launches(args.path, args.overrides, cluster, sweep(args.sweep), again=True)
    first = launches[0]
    if args.dry_run:
        return _dry_run(args, submission(cluster, launches, chain=args.chain > 1))
    if args.local or args.prepare:
        write(first, cluster, requeue=True)
        if args.prepare:
            show(
                Text(str(first.folder), no_wrap=True, overflow="ignore"),
                lambda: {"launch": str(first.folder)},
                args.json,
            )
            return 0
        # in a shell that SLURM has started, its names would say that the job is SLURM's
        here = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        env = here | cluster.env | {"PYTHONPATH": f"{first.folder}/code:{os.environ.get('PYTHONPATH', '')}"}
        sys.stdout.flush()
        os.execve(  # signals meant for us must reach the job
            sys.executable, [sys.executable, "-P", "-u", "-m", "esolm_megatron.launch.job", str(first.folder)], env
        )
    ids = submit(submission(cluster, launches, chain=args.chain > 1), chain=args.chain)
    folders = [str(launch.run_dir) for launch in launches]
    text = f"submitted job {', '.join(ids)}: {', '.join(folders)}\nesolm jobs {first.config.runs_dir}"
    show(Text(text), lambda: {"jobs": ids, "runs": folders}, args.json)
    return 0


def _dry_run(args: argparse.Namespace, planned) -> int:  # type: ignore[no-untyped-def]
    import shlex

    from esolm_megatron.launch.executor import srun_command
    from esolm_megatron.plan import plan

    cluster, first = planned.cluster, planned.launches[0]
    srun = shlex.join(srun_command(cluster, "rank", first.folder, f"{first.run_dir}/logs/JOB.COUNT/rank_%5t.txt"))
    cost = plan(first.config, cluster.num_ranks, device=cluster.gpu, fabric=cluster.wires)
    jobs = math.ceil(24 * cost.days / cluster.time_h)
    runs = [str(launch.run_dir) for launch in planned.launches]
    if args.json:
        tree = {"script": planned.script, "srun": srun, "runs": runs, "jobs": jobs, "plan": cost.as_dict()}
        show(None, lambda: tree, as_json=True)
        return 0
    console = Terminal(soft_wrap=True)
    console.print(f"sbatch script of {', '.join(runs)}:\n", highlight=False)
    console.print(planned.script, highlight=False)
    console.print(f"the job starts the ranks by:\n\n{srun}\n", highlight=False)
    console.print(cost)
    console.print(
        f"{cluster.nodes} nodes, {cluster.num_ranks} processes; about {jobs} jobs of {cluster.time_h:g} hours. "
        "Nothing was written or submitted.",
        highlight=False,
    )
    return 0


def run_jobs(args: argparse.Namespace) -> int:
    """The table of launched runs; or stop, requeue, or read one."""
    from esolm_megatron.launch import table

    if args.words and args.words[0] in ("stop", "requeue", "logs"):
        if len(args.words) != 2:
            raise ConfigError(f"esolm jobs {args.words[0]} RUN: give one run folder")
        text = getattr(table, args.words[0])(Path(args.words[1]))
        show(Text(text), lambda: {"text": text}, args.json)
        return 0
    if len(args.words) > 1:
        raise ConfigError(f"{' '.join(args.words)}: give one folder, or stop, requeue or logs and a run folder")
    folder = Path(args.words[0] if args.words else "runs")
    with suppress(KeyboardInterrupt):  # the way to leave --watch
        while True:
            found = table.rows(folder)
            if args.watch:
                Terminal().clear()
            show(table.as_table(found), lambda: table.as_dict(found), args.json)  # noqa: B023 - used at once
            if not args.watch:
                break
            time.sleep(args.every)
    return 0
