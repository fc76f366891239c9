"""The main job on real text: the sources of Python's standard library, from text to a model that writes and infills code.

Each stage is a command that a user could type; this program prints it, runs it, and times it. The results lie in
RUNS/quickstart: config.yaml, metrics.jsonl, loss.png, model/, samples.txt, summary.json.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

CONSOLE = Console()
PROMPT = "class Point:\n    def __init__(self, x, y):\n"
INFILL = "def read_lines(path):\n    with open(path) as file:\n        [[16]]\n    return lines\n"


class Stages:
    """Runs command lines, stops at the first that fails, and remembers how long each took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, name: str, *words: str, capture: bool = False) -> Any:
        """Run `esolm WORDS`; with `capture`, what its --json printed."""
        shown = shlex.join(["esolm", *(word.replace("\n", "\\n") for word in words)])
        CONSOLE.print(f"\n{name}: {shown}", highlight=False, soft_wrap=True, markup=False, style="bold")
        start = time.perf_counter()
        command = [sys.executable, "-m", "esolm_megatron", *words, *(["--json"] if capture else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True, check=False)
        if done.returncode:
            CONSOLE.print(f"{name} failed with status {done.returncode}; what it said is above", style="red")
            raise SystemExit(done.returncode)
        self.seconds[name] = round(time.perf_counter() - start, 1)
        return json.loads(done.stdout) if capture else None


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs", help="folder for data and run (default: runs)")
    parser.add_argument("--processes", default="2", help="training processes (default: 2)")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="changes to configs/quickstart.yaml"
    )
    return parser.parse_args()


def main() -> None:
    """All stages."""
    args = arguments()
    runs, stages = Path(args.runs), Stages()
    data, run = runs / "data" / "python", runs / "quickstart"
    text, tokens, tokenizer, model = data / "text", data / "tokens", data / "tokenizer", run / "model"
    if model.exists():
        raise SystemExit(f"{run}: the quickstart has been run here; remove the folder, or give --runs another one")
    stages.run("corpus", "data", "corpus", str(text))
    stages.run("tokenizer", "data", "train-tokenizer", str(text), f"output={tokenizer}", "vocab_size=1024")
    stages.run(
        "shards", "data", "prepare", "configs/data/python.yaml", f"inputs=[{text}]", f"output={tokens}",
        f"tokenizer={tokenizer}",
    )  # fmt: skip
    stages.run(
        "training", "train", "configs/quickstart.yaml", "--processes", args.processes, f"runs_dir={runs}",
        f"data.path={tokens}", *args.overrides,
    )  # fmt: skip
    stages.run("export", "convert", str(run), str(model))
    bounds = stages.run(
        "evaluation", "eval", str(model), f"data={tokens}", "num_sequences=128", "orders=4", capture=True
    )
    options = ["num_samples=2", "top_p=0.9", "temperature=0.7"]
    prompt, hole = f"prompt={PROMPT}", f"infill={INFILL}"
    made = {
        "left to right, alpha_0 = 0": stages.run(
            "samples", "sample", str(model), prompt, "alpha_0=0", *options, capture=True
        ),
        "as trained, first tokens in parallel": stages.run(
            "diffusion", "sample", str(model), prompt, *options, capture=True
        ),
        "a hole filled in": stages.run("infilling", "sample", str(model), hole, "alpha_0=0", *options, capture=True),
    }
    write_samples(run / "samples.txt", made)
    summary = summarise(run, bounds, stages.seconds)
    (run / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    show(run, summary)


def write_samples(path: Path, made: dict[str, dict[str, Any]]) -> None:
    """Generated and infilled texts, under a line that says how they were made."""
    parts = []
    for title, result in made.items():
        for sample in result["samples"]:
            parts.append(f"{'-' * 20} {title}, log p = {sample['log_prob']:.1f} {'-' * 20}\n{sample['text']}")
    path.write_text("\n\n".join(parts) + "\n")


def summarise(run: Path, bounds: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """The numbers of the run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    speeds = sorted(line["tokens_per_s"] for line in steps[1:])
    tail = [line["loss"] for line in steps[-5:]]
    return {
        "first_training_loss": steps[0]["loss"],
        "last_training_loss": round(sum(tail) / len(tail), 4),
        "validation": {name: bounds[name] for name in ("nelbo", "any_order", "importance_weighted")},
        "unigram_entropy": bounds["unigram_entropy"],
        "steps": steps[-1]["step"],
        "tokens_per_s": speeds[len(speeds) // 2],
        "seconds": seconds,
        "total_seconds": round(sum(seconds.values()), 1),
    }


def show(run: Path, summary: dict[str, Any]) -> None:
    """The summary as a table, and where everything is."""
    table = Table(title="Quickstart", show_header=False)
    table.add_row(
        "training loss, first and last", f"{summary['first_training_loss']:.3f} -> {summary['last_training_loss']:.3f}"
    )
    for name, estimate in summary["validation"].items():
        value = f"{estimate['nats_per_token']:.3f} nats per token, perplexity {estimate['perplexity']:.1f}"
        table.add_row(f"validation, {name}", f"{value}\n{estimate['estimator']}")
    table.add_row("entropy of token frequencies", f"{summary['unigram_entropy']:.3f} nats per token")
    table.add_row("training speed", f"{summary['tokens_per_s']:,.0f} tokens/s")
    table.add_row("time", "  ".join(f"{k} {v:.0f} s" for k, v in summary["seconds"].items()))
    CONSOLE.print(table)
    CONSOLE.print(f"Look at {run}/samples.txt and {run}/loss.png; the model is in {run}/model.", soft_wrap=True)


if __name__ == "__main__":
    main()
