"""Tokens that a CPU-second of one process reads: this package's stream beside other loaders, the same tokens in one run.

    python tools/benchmark_data.py [--tokens 40000000] [--rounds 3] [--install FOLDER]
                                   [--mosaicml-python PYTHON] [--energon-python PYTHON]
                                   [--steady-steps N --step-seconds 0.5] [--json FILE]

Each loader reads rows of 2048 tokens for an epoch (webdataset packs documents on the fly, the others have rows as samples),
twice in a process of its own, in rounds that take turns; the best epoch of all counts. mosaicml-streaming and
megatron-energon pin versions, so they are looked for in the environment of the PYTHON given, else in this one; --install
makes an environment for each in FOLDER, on top of this one.
Also: seconds to the first batch of a new process, its imports apart, at step 0 and at step 10^6, and, with --steady-steps,
how the resident memory grows from a tenth of so many steps to their end.
Prints a table and JSON; exits with 1 below a bar: BAR tokens per CPU-second, BARS times the others, FIRST_BATCH_S, GROWTH_MB.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

L, BATCH, BLOCK, EPOCHS, EOS = 2048, 32, 1 << 20, 2, 50256
BAR, FIRST_BATCH_S, GROWTH_MB = 60e6, 1.0, 64.0
BARS = {"mosaicml-streaming": 3.0, "megatron-energon": 6.0}


def documents(num_tokens: int) -> Iterator[np.ndarray]:
    """Documents of 20 to 4000 random tokens."""
    draw, left = np.random.default_rng(0), num_tokens
    while left > 0:
        size = min(int(np.exp(draw.uniform(3, 8.3))), left)
        yield draw.integers(0, EOS, size, dtype=np.uint16)
        left -= size + 1


def write_ours(folder: Path, num_tokens: int) -> None:
    """Shards as `esolm data prepare` writes them."""
    from esolm_megatron.data.shards.format import BLOCK_DTYPE, write_manifest
    from esolm_megatron.data.shards.writer import Packer, ShardWriter

    (folder / "shards").mkdir(parents=True)
    writer = ShardWriter(folder / "shards", "train-00000", 16 * BLOCK)
    packer = Packer(writer, "train-00000", BLOCK, np.dtype("<u2"), EOS)
    for ids in documents(num_tokens):
        packer.add(ids)
    packer.close()
    rows = [(0, n, *block) for n, shard in enumerate(writer.shards) for block in shard["blocks"]]
    shards = [{**shard, "split": "train", "blocks": len(shard["blocks"])} for shard in writer.shards]
    counts = {"documents": packer.documents, "tokens": packer.tokens, "blocks": len(rows)}
    manifest = {
        "tokenizer_fingerprint": "0" * 64, "vocab_size": EOS + 1, "eos_id": EOS, "dtype": "uint16", "seed": 0,
        "block_tokens": BLOCK, "validation_fraction": 0.0, "text_bytes": 0, "documents": {}, "shards": shards,
        "splits": {"train": counts, "validation": dict.fromkeys(counts, 0)},
    }  # fmt: skip
    write_manifest(folder, manifest, np.array(rows, BLOCK_DTYPE))


def rows_of(num_tokens: int) -> Iterator[np.ndarray]:
    """The documents laid end to end, in rows of L tokens."""
    stored = np.concatenate([np.append(ids, np.uint16(EOS)) for ids in documents(num_tokens)])
    yield from (stored[start : start + L] for start in range(0, len(stored) - L + 1, L))


def write_tar(folder: Path, samples: Iterator[np.ndarray]) -> None:
    import io
    import tarfile

    folder.mkdir()
    with tarfile.open(folder / "shard-000000.tar", "w") as tar:
        for n, ids in enumerate(samples):
            data = ids.tobytes()
            info = tarfile.TarInfo(f"{n:08d}.bin")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_document_tar(folder: Path, num_tokens: int) -> None:
    write_tar(folder, documents(num_tokens))


def write_mds(folder: Path, num_tokens: int) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"tokens": f"ndarray:uint16:{L}"}, hashes=["xxh64"]) as out:
        for row in rows_of(num_tokens):
            out.write({"tokens": row})


def write_energon(folder: Path, num_tokens: int) -> None:
    write_tar(folder, rows_of(num_tokens))
    words = [sys.executable, "-c", "from megatron.energon.cli.main import main; main()", "prepare", "--non-interactive",
             "--force-overwrite", "--split-ratio", "1,0,0", "--num-workers", "1", "--sample-type", "CrudeWebdataset",
             str(folder)]  # fmt: skip
    subprocess.run(words, check=True, capture_output=True, timeout=300)


def packed(samples: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Rows of L tokens of documents laid end to end."""
    parts: list[np.ndarray] = []
    size = 0
    for ids in samples:
        parts += [ids, np.array([EOS], np.uint16)]
        size += len(ids) + 1
        if size >= L:
            whole = np.concatenate(parts)
            for start in range(0, size - L + 1, L):
                yield whole[start : start + L].astype(np.int64)
            parts, size = [whole[size // L * L :]], size % L


def read_ours(folder: Path) -> Iterator[np.ndarray]:
    from esolm_megatron.data.stream import TokenStream

    data = TokenStream(folder, seq_length=L, global_batch_size=BATCH)
    for step in range(data.sources["data"].num_sequences // BATCH):
        yield data.batch(step).tokens


def read_webdataset(folder: Path) -> Iterator[np.ndarray]:
    import webdataset

    data = webdataset.WebDataset([str(p) for p in sorted(folder.glob("*.tar"))], shardshuffle=False)
    yield from packed(np.frombuffer(sample["bin"], np.uint16) for sample in data)


def read_webdataset_blocks(folder: Path) -> Iterator[np.ndarray]:
    """Its own shards of large blocks read whole: no shuffle of rows, no document boundaries, no checksums."""
    import io

    import webdataset

    data = webdataset.WebDataset([str(p) for p in sorted(folder.glob("shards/*.tar"))], shardshuffle=False)
    for sample in data:
        tokens = np.load(io.BytesIO(sample["tokens.npy"]))[:-1]
        yield tokens[: len(tokens) // L * L].astype(np.int64).reshape(-1, L)


def read_mosaic(folder: Path) -> Iterator[np.ndarray]:
    from streaming import StreamingDataset

    for sample in StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH, validate_hash="xxh64"):
        yield sample["tokens"].astype(np.int64)


def read_energon(folder: Path) -> Iterator[np.ndarray]:
    from megatron.energon import (
        DefaultTaskEncoder,
        WorkerConfig,
        get_loader,
        get_train_dataset,
        stateless,
    )
    from megatron.energon.flavors import TextSample
    from megatron.energon.task_encoder.cooking import Cooker, basic_sample_keys

    @stateless
    def cook(sample: dict[str, Any]) -> Any:
        return TextSample(**basic_sample_keys(sample), text=sample["bin"])

    class Encoder(DefaultTaskEncoder):
        cookers = (Cooker(cook),)

        def batch(self, samples: list[Any]) -> Any:
            return samples

    data = get_train_dataset(
        folder, worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0), task_encoder=Encoder(), batch_size=BATCH,
        shuffle_buffer_size=None, max_samples_per_sequence=None, repeat=False,
    )  # fmt: skip
    loader = get_loader(data)
    for samples in loader:
        for sample in samples:
            yield np.frombuffer(sample.text, np.uint16).astype(np.int64)


LOADERS = {
    "ours": (write_ours, read_ours, None),
    "webdataset, documents": (write_document_tar, read_webdataset, "webdataset"),
    "webdataset, 2 MB blocks": (write_ours, read_webdataset_blocks, "webdataset"),
    "mosaicml-streaming": (write_mds, read_mosaic, "streaming"),
    "megatron-energon": (write_energon, read_energon, "megatron.energon"),
}


def child(action: str, name: str, folder: Path, number: int, seconds: float) -> dict[str, Any]:
    """What a process of its own measures."""
    write, read, _ = LOADERS[name]
    if action == "write":
        write(folder, number)
        return {}
    if action == "read":
        return {"epochs": epochs_of(lambda: read(folder))}
    from esolm_megatron.data.stream import TokenStream

    began = time.perf_counter()
    data = TokenStream(folder, seq_length=L, global_batch_size=BATCH)
    if action == "first":
        data.batch(number)
        return {"seconds": time.perf_counter() - began}
    early = 0.0
    with data.prefetch(0, number) as batches:
        for step, _ in enumerate(batches):
            time.sleep(seconds)
            if step == number // 10:
                early = resident_mb()
    return {"steps": number, "growth_mb": resident_mb() - early}


def epochs_of(read: Any) -> list[dict[str, float]]:
    """Of each of EPOCHS epochs, what it cost; the first also imports."""
    found = []
    for _ in range(EPOCHS):
        wall, cpu, count = time.perf_counter(), cpu_seconds(), 0
        for rows in read():
            count += rows.size
        cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
        found.append({"tokens": count, "cpu_s": cpu, "wall_s": wall, "tokens_per_cpu_s": count / cpu})
    return found


def cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def measured(python: str, *words: Any) -> dict[str, Any] | str:
    """What a child says, or the last line of its error."""
    done = subprocess.run([python, __file__, "--child", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["died"])[-1][:150]
    return json.loads(done.stdout.strip().splitlines()[-1])


def installed(package: str, folder: Path) -> str:
    """The interpreter of an environment in `folder` that has `package`, on top of this one."""
    home = folder / package
    if not (home / "bin/python").exists():
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        (site,) = home.glob("lib/python*/site-packages")
        (site / "zz_base.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
        subprocess.run([home / "bin/python", "-m", "pip", "install", "-q", package], check=False)
    return str(home / "bin/python")


def pythons(options: argparse.Namespace) -> dict[str, str]:
    """The interpreter of each loader."""
    given = {"mosaicml-streaming": options.mosaicml_python, "megatron-energon": options.energon_python}
    if options.install:
        folder = Path(options.install).resolve()
        given = {name: python or installed(name, folder) for name, python in given.items()}
    return {name: given.get(name) or sys.executable for name in LOADERS}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What all children found; of a loader that cannot be measured, why."""
    found: dict[str, Any] = {"loaders": {}}
    loaders, use = found["loaders"], pythons(options)
    for name, (write, _, module) in LOADERS.items():
        test = [use[name], "-c", f"import {module or 'numpy'}"]
        if subprocess.run(test, capture_output=True, check=False).returncode:
            loaders[name] = "not installed"
        elif not (folder / write.__name__).exists():
            problem = measured(use[name], "write", name, folder / write.__name__, options.tokens, 0)
            if isinstance(problem, str):
                loaders[name] = problem
    for _ in range(options.rounds):
        for name, (write, _, _) in LOADERS.items():
            if isinstance(loaders.get(name), str):
                continue
            new = measured(use[name], "read", name, folder / write.__name__, 0, 0)
            if isinstance(new, str):
                loaders[name] = new
                continue
            before = [loaders[name]] if name in loaders else []
            loaders[name] = max([*before, *new["epochs"]], key=lambda x: x["tokens_per_cpu_s"])
    found["loaders"] = {name: loaders[name] for name in LOADERS}
    ours = folder / write_ours.__name__
    found["first_batch_s"] = {
        step: measured(sys.executable, "first", "ours", ours, step, 0)["seconds"] for step in (0, 10**6)  # type: ignore[index]
    }  # fmt: skip
    if options.steady_steps:
        found["memory"] = measured(sys.executable, "steady", "ours", ours, options.steady_steps, options.step_seconds)
    return found


def missed_bars(found: dict[str, Any]) -> list[str]:
    rates = {n: x["tokens_per_cpu_s"] for n, x in found["loaders"].items() if isinstance(x, dict)}
    ours = rates.get("ours", 0.0)
    out = [f"ours: {ours / 1e6:.1f}M tokens per CPU-second, the bar is {BAR / 1e6:g}M"] if ours < BAR else []
    out += [f"{name}: {x}" for name, x in found["loaders"].items() if isinstance(x, str) and x != "not installed"]
    for name, times in BARS.items():
        if name in rates and ours < times * rates[name]:
            out.append(f"ours is {ours / rates[name]:.1f} times {name}, the bar is {times:g}")
    out += [f"first batch of step {s}: {t:.2f} s" for s, t in found["first_batch_s"].items() if t > FIRST_BATCH_S]
    if found.get("memory", {}).get("growth_mb", 0.0) > GROWTH_MB:
        out.append(f"memory grew by {found['memory']['growth_mb']:.0f} MB")
    return out


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        action, name, folder, number, seconds = sys.argv[2:]
        print(json.dumps(child(action, name, Path(folder), int(number), float(seconds))))
        return 0
    grammar = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    grammar.add_argument("--tokens", type=int, default=40_000_000)
    grammar.add_argument("--rounds", type=int, default=3)
    grammar.add_argument("--install", default=None, metavar="FOLDER")
    grammar.add_argument("--mosaicml-python", default=None, metavar="PYTHON")
    grammar.add_argument("--energon-python", default=None, metavar="PYTHON")
    grammar.add_argument("--steady-steps", type=int, default=0)
    grammar.add_argument("--step-seconds", type=float, default=0.0)
    grammar.add_argument("--folder", default=None)
    grammar.add_argument("--json", default=None)
    options = grammar.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(options, Path(folder))
    table = Table("loader", "M tokens per CPU-second", "ours is times that", "CPU s", "wall s")
    ours = found["loaders"]["ours"]
    for name, x in found["loaders"].items():
        cells = [x, "", "", ""]
        if isinstance(x, dict):
            times = ours["tokens_per_cpu_s"] / x["tokens_per_cpu_s"] if isinstance(ours, dict) else 0.0
            cells = [f"{x['tokens_per_cpu_s'] / 1e6:.1f}", f"{times:.1f}", f"{x['cpu_s']:.2f}", f"{x['wall_s']:.2f}"]
        table.add_row(name, *cells)
    Console().print(table)
    found["missed"] = missed_bars(found)
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        Path(options.json).write_text(text)
    return 1 if found["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
