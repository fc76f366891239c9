"""What is done with a run: `esolm plan`, `esolm train`, `esolm doctor`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from rich.progress import Progress
from rich.table import Table

from esolm_megatron.commands import show
from esolm_megatron.config import Config, ConfigError, load
from esolm_megatron.errors import require
from esolm_megatron.terminal import Terminal


def run_plan(args: argparse.Namespace) -> int:
    """What the run will cost, or which layouts of it are the fastest."""
    from esolm_megatron.plan import DEVICES, Fabric, fastest_layouts, plan, write_recipe
    from esolm_megatron.plan.picture import draw

    kind, words = args.path if args.path in ("search", "check") else None, list(args.overrides)
    if kind is not None and not words:
        raise ConfigError(f"plan {kind}: give the run's YAML file")
    path = words.pop(0) if kind is not None else args.path
    fabric, device, processes = Fabric(), args.device, args.processes
    if args.on is not None:
        from esolm_megatron.launch.site import load_cluster

        cluster = load_cluster(args.on)
        fabric, device, processes = cluster.wires, device or cluster.gpu, processes or cluster.num_ranks
    device = device or "H100"
    if kind is not None and (
        processes is None or args.mfu is not None or args.plot is not None or args.law is not None
    ):
        raise ConfigError(f"plan {kind}: takes --gpus N, or --on CLUSTER.yaml")
    if args.write is not None and kind != "search":
        raise ConfigError(f"--write {args.write}: it is for plan search, whose fastest layout it keeps")
    if args.write is not None and (Path(args.write).exists() or not Path(args.write).absolute().parent.is_dir()):
        why = "it is there; name another file, or remove it" if Path(args.write).exists() else "its folder is not there"
        raise ConfigError(f"--write {args.write}: {why}")
    if kind == "search":
        found = fastest_layouts(load(path, words), processes, device=device, fabric=fabric)
        if args.write is not None:
            write_recipe(found, path, words, args.write)
            print(f"{args.write}: the fastest layout, as a configuration", file=sys.stderr)
        show(found, found.as_dict, args.json)
        return 0
    if kind == "check":
        return _plan_check(load(path, words), processes, args)
    config = load(path, words)
    result = plan(config, processes, device=device, mfu=args.mfu, fabric=fabric, law=args.law)
    if args.plot is not None:
        draw(result, DEVICES[device].memory_gib, args.plot)
    show(result, result.as_dict, args.json)
    return 0


def _plan_check(config: Config, processes: int, args: argparse.Namespace) -> int:
    from esolm_megatron.simulation.check import check

    require(("deepspeed", "megatron"), "plan check")
    with Progress(console=Terminal(stderr=True), transient=True, disable=args.json) as bar:
        task = bar.add_task("ranks", total=None)
        checked = check(
            config, processes, whole=args.all, progress=lambda done, n: bar.update(task, completed=done, total=n)
        )
    show(checked, checked.as_dict, args.json)
    return 1 if checked.problems else 0


def run_doctor(args: argparse.Namespace) -> int:
    """What this machine has, or what all processes of a run can do together."""
    if args.cluster:
        return _doctor_cluster(args)
    if args.providers:
        return _doctor_providers(args)
    from esolm_megatron import doctor

    findings = doctor.report()
    show(doctor.as_table(findings), lambda: doctor.as_dict(findings), args.json)
    return doctor.exit_status(findings)


def _doctor_providers(args: argparse.Namespace) -> int:
    require(("deepspeed", "megatron"), "doctor --providers")
    from esolm_megatron.parallel.providers import on_this_machine

    found = on_this_machine(load(args.providers, []))
    table = Table(title=f"who does what for {args.providers} here", title_justify="left")
    for heading in ("job", "who, and what else was tried"):
        table.add_column(heading, overflow="fold")
    for job, who in found.items():
        table.add_row(job, who)
    show(table, lambda: found, args.json)
    return 0


def _doctor_cluster(args: argparse.Namespace) -> int:
    if (args.processes or 1) > 1 and "RANK" not in os.environ:
        from esolm_megatron.launch import run_local

        words = ["doctor", "--cluster", f"--folder={args.folder}", *(["--json"] if args.json else [])]
        words += [f"--layout={args.layout}"] if args.layout else []
        return run_local([sys.executable, "-m", "esolm_megatron", *words], args.processes)
    from esolm_megatron.doctor.cluster import examine

    report = examine(Path(args.folder), config=load(args.layout, []) if args.layout else None)
    if int(os.environ.get("RANK", 0)) == 0:
        show(report.as_table(), report.as_dict, args.json)
    return report.exit_status


def run_train(args: argparse.Namespace) -> int:
    """Train, in this process or in `--processes` of them."""
    from esolm_megatron.train import course
    from esolm_megatron.train.preflight import check_run

    config = course.change(course.with_changes(load(args.path, args.overrides)), args.change)
    if (
        config.train.fp8 != "none" and config.train.kernels.linears != "te"
    ):  # the extra that brings it brings the others, too
        require(("torchao",), f"train.fp8={config.train.fp8}")
    require(("deepspeed", "megatron"), "training")
    check_run(config, int(os.environ.get("WORLD_SIZE", args.processes or 1)))
    if (args.processes or 1) > 1 and "RANK" not in os.environ:
        return _train_here(args, config.run_dir)
    from esolm_megatron.train.trainer import train

    outcome = train(config)
    if int(os.environ.get("RANK", 0)) == 0:
        state = " ".join([outcome.ending.name.lower().replace("_", " "), *filter(None, [outcome.detail])])
        state += "; start it again to continue" if outcome.ending.restart else ""
        Terminal(stderr=True).print(f"{config.run_dir}: step {outcome.step} of {config.train.num_steps}, {state}")
    return int(outcome.ending)


def _train_here(args: argparse.Namespace, run_dir: Path) -> int:
    """Train in processes of this machine; what none of them could write into the run folder is written here."""
    from esolm_megatron.launch import run_local
    from esolm_megatron.train import ending
    from esolm_megatron.train.ending import Ending

    killed: list[str] = []

    def note(rank: int, code: int) -> None:
        if code < 0:
            killed.append(f"rank {rank}: {signal.strsignal(-code)}")

    began = time.time()
    command = [
        sys.executable,
        "-m",
        "esolm_megatron",
        "train",
        args.path,
        *args.overrides,
    ]  # what changes is written down
    status = run_local(command, args.processes, on_failure=note)
    said = ending.read(run_dir)
    if killed and said:  # its last words were those of the others, which miss it
        ending.mark(run_dir, Ending.KILLED, said["step"], killed[0])
        Terminal(stderr=True, soft_wrap=True).print(f"{run_dir}: {killed[0]}; start it again to continue")
    elif status == Ending.HUNG and said and (said["how"] == "running" or said["time"] < began):
        ending.mark(run_dir, Ending.HUNG, said["step"], ending.LOCKED)
        Terminal(stderr=True, soft_wrap=True).print(f"{run_dir}: {ending.LOCKED}; start it again to continue")
    return status
