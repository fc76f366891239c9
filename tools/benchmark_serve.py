r"""The server's throughput with many clients, against the same rows as one offline batch, in one run.

    python tools/benchmark_serve.py                              # 256-wide network, 64 clients, a CPU
    python tools/benchmark_serve.py --shape 124m --device cuda --dtype bf16 --length 1024 --steps 128

`esolm serve` runs as a process of its own, with a row for each client; the clients are threads of another process, and speak
HTTP on loopback. Each asks for one text, and for the next when that has come. A served text is the one that `sample` draws, which
is checked; they take turns, and the best of --repeats counts. --bar: least share of the offline tokens a second, else exit 1.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from benchmark_sample import SHAPES

from esolm_megatron import load_pretrained
from esolm_megatron.config import ModelConfig
from esolm_megatron.data.tokenizer import load_tokenizer
from esolm_megatron.model.layers import PlainLinears
from esolm_megatron.model.pretrained import save_model
from esolm_megatron.model.transformer import EsoLM, initialise

CLIENTS = """
import json, sys, time, urllib.request
from concurrent.futures import ThreadPoolExecutor
url, clients, each, body = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
def ask(seed):
    data = json.dumps(body | {"seed": seed}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=3600) as answer:
        text = answer.read().decode()
    if body["stream"]:
        events = [json.loads(x[6:])["choices"][0] for x in text.splitlines() if x.startswith("data: {")]
        return sum(len(x["tokens"]) for x in events if not x.get("finish_reason"))  # the last one has the whole text
    return json.loads(text)["choices"][0]["tokens"]
def client(number):
    return [ask(number * each + turn) for turn in range(each)]
ask(10**6)
begun = time.monotonic()
with ThreadPoolExecutor(clients) as pool:
    texts = list(pool.map(client, range(clients)))
print(json.dumps({"seconds": time.monotonic() - begun, "texts": texts}))
"""


def write_model(folder: Path, shape: str, length: int) -> None:
    """Random weights of a shape, with a tokenizer of bytes: texts are made of its first 257 ids and of others."""
    tokenizer = load_tokenizer("bytes")
    config = ModelConfig(**(SHAPES[shape] | {"vocab_size": tokenizer.vocab_size + 1, "seq_length": length}))
    model = EsoLM(config, PlainLinears())
    initialise(model, 0)
    tokenizer.save(folder / "tokenizer")
    save_model(folder / "model", config, 0.5, model.named_parameters(), tokenizer_folder=folder / "tokenizer")


def start(folder: Path, args: argparse.Namespace) -> tuple[subprocess.Popen[str], str]:
    """The server and its address."""
    words = [f"rows={args.clients}", f"length={args.length}", f"queue={args.clients}", "port=0"]
    words += [f"device={args.device}", f"dtype={args.dtype}"]
    command = [sys.executable, "-m", "esolm_megatron", "serve", str(folder / "model"), *words]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for line in server.stderr:
        if found := re.search(r"running on (http://\S+)", line):
            break
    else:
        raise SystemExit("the server ended before it listened")
    ThreadPoolExecutor(1).submit(server.stderr.read)  # it must not wait for a reader
    return server, f"{found[1]}/v1/completions"


def main() -> int:
    """Measure, print a table, and write it as JSON where it is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="toy")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--each", type=int, default=2, help="texts that a client asks for")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bar", type=float, default=0.0)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    best: dict[str, float] = {}
    texts: list[list[list[int]]] = []
    with tempfile.TemporaryDirectory() as top:
        write_model(Path(top), args.shape, args.length)
        types = {"fp32": torch.float32, "bf16": torch.bfloat16}
        model = load_pretrained(Path(top) / "model", types[args.dtype], args.device)
        server, url = start(Path(top), args)
        try:
            number, body = args.clients * args.each, {"max_tokens": args.length, "steps": args.steps, "stop": False}
            for _ in range(args.repeats):
                for name, stream in (("served whole", False), ("served streamed", True)):
                    words = [url, str(args.clients), str(args.each), json.dumps(body | {"stream": stream})]
                    done = subprocess.run(
                        [sys.executable, "-c", CLIENTS, *words], capture_output=True, text=True, check=True
                    )
                    found = json.loads(done.stdout)
                    made = sum(x if stream else len(x) for texts in found["texts"] for x in texts)
                    assert made == number * args.length, f"{name}: {made} tokens came"
                    best[name] = max(best.get(name, 0.0), made / found["seconds"])
                    texts = found["texts"] if not stream else texts
                if args.device == "cuda":
                    torch.cuda.synchronize()
                begun = time.monotonic()
                for turn in range(args.each):  # served texts have schedules of their own, too
                    model.sample(args.clients, args.length, args.steps, seed=turn, own_schedules=True)[0].tolist()
                best["offline"] = max(best.get("offline", 0.0), number * args.length / (time.monotonic() - begun))
            one = model.sample(1, args.length, args.steps, seed=args.each)[0][0].tolist()
            assert one == texts[1][0], "a served text is not the one that `sample` draws"
        finally:
            server.terminate()
            server.wait()
    shares = {name: rate / best["offline"] for name, rate in best.items()}
    rows = [{"what": name, "tokens/s": round(rate, 1), "share": round(shares[name], 3)} for name, rate in best.items()]
    missed = [f"{x['what']}: {x['share']} of offline, the bar is {args.bar}" for x in rows if x["share"] < args.bar]
    for row in rows:
        print(f"{row['what']:16} {row['tokens/s']:10.0f} tokens/s  {row['share']:5.2f} of offline")
    if args.json:
        arguments = {name: value for name, value in vars(args).items() if name != "json"}
        Path(args.json).write_text(
            json.dumps({"arguments": arguments, "rows": rows, "missed": missed}, indent=1) + "\n"
        )
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
