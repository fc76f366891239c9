"""Speed of `esolm data prepare` against the bare tokenizer libraries, on the same text, merges and cores, in one run.

    python tools/benchmark_prepare.py [--text FOLDER ...] [--megabytes 480] [--tokenizer FOLDER] [--processes 1 2]
                                      [--rounds 2] [--json OUT]

The bare libraries get the documents as `str` that are already in memory, and keep nothing; `prepare` reads a jsonl file
twice (exact duplicates), parses, shuffles, splits, packs, hashes and syncs its shards. Each runs in fresh processes, with
the loading of its tokenizer counted; of `prepare`, not of the bare libraries, also the imports of all processes that it
starts. What a `prepare` of next to no text takes is told beside (start-up), and not taken off. Rounds take turns, the best
of each counts; tokenizers, five times slower, gets a tenth of the text once. The text is that of the Python sources below
FOLDER, by default those of the running Python and of the packages installed in it, again and again with a number before each.
Exit status 1: `prepare` reaches less than 90 % of bare tiktoken's bytes per CPU-second, or per second of wall time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

BAR = 0.9
ENGINES = ("tiktoken", "tokenizers", "prepare")


def write_text(folders: list[str], path: Path, megabytes: float) -> tuple[int, int]:
    """Documents and bytes written to a jsonl file; no two documents are equal."""
    count = size = 0
    with open(path, "w", encoding="utf-8") as out:
        for turn in range(1000):
            for source in (p for folder in folders for p in sorted(Path(folder).rglob("*.py"))):
                try:
                    text = f"# {turn} {count}\n" + source.read_bytes().decode("utf-8")
                except (OSError, UnicodeDecodeError):
                    continue
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                count, size = count + 1, size + len(text.encode())
                if size >= megabytes * 1e6:
                    return count, size
    return count, size


def encode_bare(engine: str, tokenizer_folder: str, jsonl: str, share: tuple[int, int], barrier, out) -> None:
    """Measure one process of a bare library on every n-th document; the parsing of the file is not counted."""
    from esolm_megatron.data import tokenizer as ours

    texts = [json.loads(line)["text"] for line in Path(jsonl).read_text(encoding="utf-8").split("\n") if line]
    texts = texts[share[0] :: share[1] * (10 if engine == "tokenizers" else 1)]
    size = sum(len(text.encode()) for text in texts)
    barrier.wait()
    cpu, wall = time.process_time(), time.perf_counter()
    loaded = ours.load_tokenizer(tokenizer_folder)
    if engine == "tiktoken":
        fast = ours._fast_engine(loaded._definition, loaded._engine)
        assert hasattr(fast, "encode_ordinary"), "this tokenizer is no plain byte-level BPE"
        tokens = sum(len(fast.encode_ordinary(text)) for text in texts)
    else:
        tokens = 0
        for first in range(0, len(texts), 256):
            batch = loaded._engine.encode_batch_fast(texts[first : first + 256], add_special_tokens=False)
            tokens += sum(len(one.ids) for one in batch)
    out.put((time.process_time() - cpu, time.perf_counter() - wall, tokens, size))


def bare(engine: str, tokenizer_folder: str, jsonl: Path, processes: int) -> tuple[float, float, int, int]:
    """CPU-seconds, wall seconds, tokens and bytes of text of a bare library in so many processes."""
    context = multiprocessing.get_context("spawn")
    barrier, out = context.Barrier(processes), context.SimpleQueue()
    started = [
        context.Process(target=encode_bare, args=(engine, tokenizer_folder, str(jsonl), (n, processes), barrier, out))
        for n in range(processes)
    ]
    for process in started:
        process.start()
    results = [out.get() for _ in started]
    for process in started:
        process.join()
    return (
        sum(r[0] for r in results),
        max(r[1] for r in results),
        sum(r[2] for r in results),
        sum(r[3] for r in results),
    )


def run_prepare(tokenizer_folder: str, jsonl: str, folder: str, processes: int, out) -> None:
    """Measure a whole `prepare` in this process and those that it starts."""
    from esolm_megatron.data.prepare import PrepareConfig, prepare

    size = os.path.getsize(jsonl)
    config = PrepareConfig(
        inputs=(jsonl,), output=folder, tokenizer=tokenizer_folder, num_processes=processes, task_bytes=size // 8 + 1
    )
    wall = time.perf_counter()
    summary = prepare(config, progress=False)
    wall = time.perf_counter() - wall
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    tokens = sum(split.tokens - split.documents for split in summary.manifest.splits.values())
    out.put((sum(u.ru_utime + u.ru_stime for u in used), wall, tokens, summary.manifest.text_bytes))


def prepared(tokenizer_folder: str, jsonl: Path, processes: int) -> tuple[float, float, int, int]:
    """CPU-seconds (of all processes, imports included), wall seconds, tokens and bytes of text of `prepare`."""
    context = multiprocessing.get_context("spawn")
    folder, out = jsonl.parent / "tokens", context.SimpleQueue()
    process = context.Process(target=run_prepare, args=(tokenizer_folder, str(jsonl), str(folder), processes, out))
    process.start()
    result = out.get()
    process.join()
    shutil.rmtree(folder)
    return result


def measure(jsonl: Path, args: argparse.Namespace) -> list[dict[str, float]]:
    """A row for each number of processes and engine: the best of all rounds."""
    best: dict[tuple[int, str], tuple[float, float]] = {}
    tokens = set()
    for number in range(args.rounds):
        for processes in args.processes:
            for engine in ENGINES:
                if engine == "tokenizers" and number:
                    continue
                if engine == "prepare":
                    cpu, wall, count, size = prepared(args.tokenizer, jsonl, processes)
                else:
                    cpu, wall, count, size = bare(engine, args.tokenizer, jsonl, processes)
                if engine != "tokenizers":
                    tokens.add((count, size))
                old = best.get((processes, engine), (0.0, 0.0))
                best[processes, engine] = max(size / cpu / 1e6, old[0]), max(size / wall / 1e6, old[1])
    assert len(tokens) == 1, f"the engines disagree: {tokens}"
    return [
        {"processes": n, "engine": engine, "mb_per_cpu_s": cpu, "mb_per_s": wall}
        for (n, engine), (cpu, wall) in best.items()
    ]


def start_up(jsonl: Path, args: argparse.Namespace) -> dict[int, tuple[float, float]]:
    """CPU-seconds and wall seconds of `prepare` for next to no text, by number of processes."""
    little = jsonl.with_name("little.jsonl")
    little.write_text("".join(json.dumps({"text": f"document {n} " + 99 * "x"}) + "\n" for n in range(100)))
    return {n: prepared(args.tokenizer, little, n)[:2] for n in args.processes}


def main() -> int:
    from rich.console import Console  # not above: the processes that are measured import this file
    from rich.table import Table

    grammar = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    paths = sysconfig.get_paths()
    grammar.add_argument("--text", nargs="+", default=[paths["stdlib"], paths["purelib"]], metavar="FOLDER")
    grammar.add_argument("--megabytes", type=float, default=480)
    grammar.add_argument(
        "--tokenizer", default=None, metavar="FOLDER", help="default: one learnt from 4 MB of the text"
    )
    grammar.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    grammar.add_argument("--rounds", type=int, default=2)
    grammar.add_argument("--json", default=None, metavar="OUT")
    args = grammar.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as top:
        jsonl = Path(top) / "text.jsonl"
        count, size = write_text(args.text, jsonl, args.megabytes)
        if args.tokenizer is None:
            from esolm_megatron.data.tokenizer import train_tokenizer

            texts = (json.loads(line)["text"] for line in jsonl.read_text(encoding="utf-8").split("\n") if line)
            train_tokenizer((text for n, text in enumerate(texts) if n % max(1, size // 4_000_000) == 0), 32000, top)
            args.tokenizer = top
        rows, started = measure(jsonl, args), start_up(jsonl, args)
    table = Table(title=f"{size / 1e6:.0f} MB of text, {count:,} documents; ratio: to bare tiktoken")
    for name in ("processes", "engine", "MB per CPU-second", "MB per second", "ratio, CPU", "ratio, wall"):
        table.add_column(name, justify="right")
    short = []
    for row in rows:
        base = next(r for r in rows if (r["processes"], r["engine"]) == (row["processes"], "tiktoken"))
        row["ratio_cpu"], row["ratio_wall"] = (row[k] / base[k] for k in ("mb_per_cpu_s", "mb_per_s"))
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
        if row["engine"] == "prepare" and min(row["ratio_cpu"], row["ratio_wall"]) < BAR:
            short.append(row)
    Console().print(table)
    if args.json:
        Path(args.json).write_text(
            json.dumps({"bytes": size, "documents": count, "bar": BAR, "rows": rows, "start_up_s": started}, indent=1)
        )
    for number, (cpu, wall) in started.items():
        print(f"start-up of prepare with {number} processes: {cpu:.2f} CPU-seconds, {wall:.2f} s; it is counted above")
    print(f"bar of {BAR:.0%}: {'missed' if short else 'met'}")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
