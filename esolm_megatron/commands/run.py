"""What is done with a run: `esolm plan`, `esolm train`, `esolm doctor`."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from rich.console import Console

from esolm_megatron.commands import show
from esolm_megatron.config import load


def run_plan(args: argparse.Namespace) -> int:
    """What the run will cost."""
    from esolm_megatron.plan import plan

    result = plan(load(args.path, args.overrides), args.processes, device=args.device, mfu=args.mfu)
    show(result, result.as_dict, args.json)
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    """What this machine has, or what all processes of a run can do together."""
    if args.cluster:
        return _doctor_cluster(args)
    from esolm_megatron import doctor

    findings = doctor.report()
    show(doctor.as_table(findings), lambda: doctor.as_dict(findings), args.json)
    return doctor.exit_status(findings)


def _doctor_cluster(args: argparse.Namespace) -> int:
    if (args.processes or 1) > 1 and "RANK" not in os.environ:
        from esolm_megatron.launch import run_local

        words = ["doctor", "--cluster", f"--folder={args.folder}", *(["--json"] if args.json else [])]
        return run_local([sys.executable, "-m", "esolm_megatron", *words], args.processes)
    from pathlib import Path

    from esolm_megatron.cluster import examine

    report = examine(Path(args.folder))
    if int(os.environ.get("RANK", 0)) == 0:
        show(report.as_table(), report.as_dict, args.json)
    return report.exit_status


def run_train(args: argparse.Namespace) -> int:
    """Train, in this process or in `--processes` of them."""
    from esolm_megatron.train.preflight import check_run

    config = load(args.path, args.overrides)
    check_run(config, int(os.environ.get("WORLD_SIZE", args.processes or 1)))
    if (args.processes or 1) > 1 and "RANK" not in os.environ:
        from esolm_megatron.launch import run_local
        from esolm_megatron.train import ending

        killed: list[str] = []

        def note(rank: int, code: int) -> None:
            if code < 0:
                killed.append(f"rank {rank}: {signal.strsignal(-code)}")

        command = [sys.executable, "-m", "esolm_megatron", "train", args.path, *args.overrides]
        status = run_local(command, args.processes, on_failure=note)
        if killed and (said := ending.read(config.run_dir)):  # its last words were those of the others, which miss it
            ending.mark(config.run_dir, ending.Ending.KILLED, said["step"], killed[0])
            Console(stderr=True, soft_wrap=True).print(f"{config.run_dir}: {killed[0]}; start it again to continue")
        return status
    from esolm_megatron.train.trainer import train

    outcome = train(config)
    if int(os.environ.get("RANK", 0)) == 0:
        state = " ".join([outcome.ending.name.lower().replace("_", " "), *filter(None, [outcome.detail])])
        state += "; start it again to continue" if outcome.ending.restart else ""
        Console(stderr=True).print(f"{config.run_dir}: step {outcome.step} of {config.train.num_steps}, {state}")
    return int(outcome.ending)
