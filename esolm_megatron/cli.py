"""The command line: `esolm VERB PATH [section.field=value ...] [--json]`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from esolm_megatron.commands import data, evaluate, generate, jobs, model, run
from esolm_megatron.errors import UserError, missing_package
from esolm_megatron.terminal import Terminal
from esolm_megatron.version import __version__

_PLANS = "search ranks the layouts on --gpus N; check simulates some of its ranks, and whether they go together"
_CHANGE = "alter optim, objective, dropout or fp8 of a run from its newest checkpoint on; the run folder keeps it"


def parser() -> argparse.ArgumentParser:
    """The grammar."""
    out = argparse.ArgumentParser(prog="esolm", description="Pretrain, evaluate and sample Esoteric Language Models.")
    out.add_argument("--version", action="version", version=f"esolm-megatron {__version__}")
    verbs = out.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, action: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text, description=text)
        made.add_argument("--json", action="store_true", help="print one JSON document")
        made.set_defaults(run=action, overrides=[])
        return made

    def fields(made: argparse.ArgumentParser, what: str) -> None:
        made.add_argument("overrides", nargs="*", metavar="field=value", help=what)

    made = verb("plan", run.run_plan, "what a run will cost: memory, time, failures; or the fastest layouts of it")
    made.add_argument("path", metavar="[search|check] RUN.yaml", help=_PLANS)
    made.add_argument("--processes", "--gpus", type=int, default=None, metavar="N", help="processes, a GPU for each")
    made.add_argument("--device", default=None, help="GPU that is planned for; default: H100, or that of --on")
    made.add_argument("--mfu", type=float, default=None, help="assume this share of its peak; default: predict it")
    made.add_argument("--on", metavar="CLUSTER.yaml", help="the cluster's GPUs, wires and failures")
    made.add_argument("--all", action="store_true", help="check: all ranks of a replica, not the ends of each stage")
    made.add_argument("--write", metavar="NEW.yaml", help="search: the fastest layout as a configuration")
    made.add_argument("--plot", metavar="FILE.png", help="draw a step by stage, and memory by part")
    made.add_argument("--law", metavar="LAW.json", help="predict the loss by the law that tools/study.py fitted")
    fields(made, "override section.field of the file")
    made = verb("train", run.run_train, "train, or continue, the run of a YAML file")
    made.add_argument("path", metavar="RUN.yaml")
    made.add_argument("--processes", type=int, default=None, metavar="N", help="processes on this machine")
    fields(made, "override section.field of the file")
    made.add_argument("--change", action="append", default=[], metavar="field=value", help=_CHANGE)
    made = verb("launch", jobs.run_launch, "start the run of a YAML file on a cluster, and keep it alive there")
    made.add_argument("path", metavar="RUN.yaml")
    made.add_argument("--on", required=True, metavar="CLUSTER.yaml", help="see slurm/clusters")
    made.add_argument("--dry-run", action="store_true", help="print what would be submitted, and what it will cost")
    made.add_argument("--local", action="store_true", help="run the job here, without SLURM")
    made.add_argument("--prepare", action="store_true", help="fill the run folder, for slurm/train.sbatch")
    made.add_argument("--resume", action="store_true", help="continue the run that is in the run folder")
    made.add_argument("--change", action="append", default=[], metavar="field=value", help=_CHANGE)
    made.add_argument(
        "--sweep", action="append", default=[], metavar="field=a,b", help="one run for each value (an array)"
    )
    made.add_argument(
        "--chain", type=int, default=1, metavar="N", help="N jobs after each other, where nothing may requeue"
    )
    fields(made, "override section.field of RUN.yaml")
    made = verb("jobs", jobs.run_jobs, "state, speed and restarts of launched runs; stop, requeue or read one")
    made.add_argument(
        "words", nargs="*", metavar="FOLDER", help="a folder of runs, or: stop RUN, requeue RUN, logs RUN"
    )
    made.add_argument("--watch", action="store_true", help="again and again")
    made.add_argument("--every", type=float, default=5.0, metavar="S", help="seconds between, with --watch")
    made = verb("data", data.run, "tokens: prepare, verify, show, mix, train-tokenizer, corpus")
    made.add_argument("action", choices=["prepare", "verify", "show", "mix", "train-tokenizer", "corpus"])
    made.add_argument(
        "path", metavar="PATH", help="a YAML file (prepare, mix), prepared data (verify, show), text, or a folder"
    )
    fields(made, "override fields; mix: those of the run, and plot=FILE.png")
    made = verb(
        "eval", evaluate.run_eval, "perplexity bounds of a model, its texts judged, or its answers to questions"
    )
    made.add_argument("path", metavar="MODEL|RUN[@step]", help="folder made by esolm convert, or of a run")
    made.add_argument("--processes", type=int, metavar="N", help="share the work among N processes of this machine")
    fields(made, ", ".join(evaluate.EvalOptions.model_fields))
    made = verb("compare", evaluate.run_compare, "several models or runs side by side: settings, losses, bounds, texts")
    made.add_argument(
        "words", nargs="+", metavar="MODEL|RUN[@step]|field=value", help=", ".join(evaluate.CompareOptions.model_fields)
    )
    made = verb("lm-eval", model.run_harness, "the lm-evaluation-harness, whose words follow, with --model esolm")
    made.add_argument("words", nargs=argparse.REMAINDER, metavar="WORDS", help="see esolm lm-eval run --help")
    made = verb("convert", model.run_convert, "between training runs, the inference format and foreign checkpoints")
    made.add_argument("path", metavar="SOURCE", help="run folder, or what --from says; a model with --to or --check")
    made.add_argument("out", metavar="OUT", nargs="?", help="folder to write")
    made.add_argument("--from", dest="source", choices=["run", "reference", "transformers"], help="what SOURCE is")
    made.add_argument("--to", choices=["model", "training", "reference"], default="model", help="what to make of it")
    made.add_argument("--check", action="store_true", help="compare a model's files with their hashes")
    fields(made, ", ".join(model.ConvertOptions.model_fields))
    for name, action, text, kind in (
        ("sample", generate.run_sample, "text from a converted model", generate.SampleOptions),
        ("score", generate.run_score, "exact log-likelihoods of given texts", generate.ScoreOptions),
        ("serve", generate.run_serve, "a model over HTTP, for this machine by default", generate.ServeOptions),
    ):
        made = verb(name, action, text)
        made.add_argument("path", metavar="MODEL", help="folder made by esolm convert")
        fields(made, ", ".join(kind.model_fields))
        if name == "sample":
            made.add_argument("--watch", action="store_true", help="draw the texts in the terminal as they are written")
            made.add_argument(
                "--processes", type=int, metavar="N", help="cut the model over N processes of this machine"
            )
            made.add_argument("--html", metavar="PAGE", help="write a page that plays how they were written")
    made = verb("doctor", run.run_doctor, "what this machine has, and what each missing part costs")
    made.add_argument(
        "--cluster", action="store_true", help="try all processes of torchrun, srun or --processes together"
    )
    made.add_argument(
        "--processes", type=int, default=None, metavar="N", help="with --cluster: start N on this machine"
    )
    made.add_argument("--folder", default=".", metavar="DIR", help="with --cluster: where each rank tries to write")
    made.add_argument("--providers", metavar="RUN.yaml", help="try this run's kernels here: who does each job, and why")
    made.add_argument("--layout", metavar="RUN.yaml", help="with --cluster: try each group of this run's layout")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0 done, 2 bad input, 1 anything else that was foreseen; train: see Ending."""
    if argv is None and sys.getfilesystemencoding() != "utf-8":
        _start_in_utf8()
    grammar = parser()
    args, rest = grammar.parse_known_args(argv)
    for word in rest:  # words that come after a flag
        if args.verb == "convert" and args.out is None and not word.startswith("-") and "=" not in word:
            args.out = word
            continue
        if word.startswith("-") or "=" not in word or args.verb in ("doctor", "jobs"):
            grammar.error(f"unrecognised: {word}")
        args.overrides = [*args.overrides, word]
    try:
        return args.run(args)
    except ImportError as error:
        missing = missing_package(error)
        if missing is None:
            raise
        return _said(args.verb, missing)
    except (UserError, ValueError, OSError) as error:  # what users can mend: said in one piece, without a traceback
        return _said(args.verb, error)


def _start_in_utf8() -> None:
    """Begin again as a process whose words, files and names are UTF-8, whatever the locale says; those that it starts are, too."""
    sys.stderr.write(f"esolm: the locale says {sys.getfilesystemencoding()}; text is UTF-8 here\n")
    sys.stderr.flush()
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _said(verb: str, error: Exception) -> int:
    """Say what is wrong; the exit status."""
    Terminal(stderr=True, soft_wrap=True).print(f"esolm {verb}: {error}", style="red", highlight=False)
    return 2 if isinstance(error, ValueError) else 1


if __name__ == "__main__":
    sys.exit(main())
