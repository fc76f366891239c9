"""The server over real HTTP: what it answers is what `sample` draws, whoever else is being served."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest
import torch
import uvicorn
from parity import random_model

from esolm_megatron import load_pretrained
from esolm_megatron.config import ConfigError
from esolm_megatron.data.tokenizer import load_tokenizer
from esolm_megatron.inference import serve
from esolm_megatron.inference.serve import Limits, build
from esolm_megatron.model.pretrained import save_model

LIMITS = Limits(rows=3, length=64, queue=4, body=2000, propose="auto")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "model"
    tokenizer = load_tokenizer("bytes")
    model = random_model(torch.float32, spread=0.5, vocab_size=tokenizer.vocab_size + 1, seq_length=64)
    save_model(path, model.shape, 0.5, model.named_parameters(), dtype=torch.float32)
    tokenizer.save(path)
    return path


class Running:
    """A server in a thread of this process; `client` speaks to it."""

    def __init__(self, model, limits):
        app = build(model, limits, "tiny")
        self.worker = app.state.worker
        self.server = uvicorn.Server(
            uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1, lifespan="on")
        )
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        wait_for(lambda: self.server.started)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def model(folder):
    return load_pretrained(folder)


@pytest.fixture(scope="module")
def served(model):
    running = Running(model, replace(LIMITS, queue=9))
    yield running
    running.stop()


def ask(served, **body):
    answer = served.client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


KINDS = [
    {"prompt": "def f", "max_tokens": 20, "seed": 1},
    {"prompt": "import", "max_tokens": 40, "seed": 2, "n": 2, "alpha_0": 1.0, "steps": 5},
    {"infill": "a = [[9]]\nb[[3]]", "seed": 3, "schedule": "uniform", "order": "block_distant", "steps": 4},
    {"max_tokens": 30, "seed": 4, "alpha_0": 0.0, "temperature": 0.7, "top_p": 0.8},
    {"max_tokens": 11, "seed": 5, "schedule": "first_hitting", "top_k": 9, "repetition_penalty": 1.3},
    {"prompt": "ab", "max_tokens": 33, "seed": 7, "n": 2, "schedule": "first_hitting", "propose": 4, "top_p": 0.9},
    {"max_tokens": 20, "seed": 8, "alpha_0": 0.3, "schedule": "first_hitting", "propose": "auto", "passes": 2},
    {"prompt": "x", "max_tokens": 50, "seed": 6, "n": 3, "order": "left_to_right"},
]


def expected(model, n=1, prompt="", infill=None, max_tokens=0, steps=None, **options):
    from esolm_megatron.inference import parse_infill

    ids = model.tokenizer.encode(prompt)
    places, length = list(range(len(ids))), len(ids) + max_tokens
    if infill:
        ids, places, length = parse_infill(infill, model.tokenizer)
    ids, places = (torch.tensor(x, dtype=torch.int64) for x in (ids, places))
    return model.sample(
        n, length, steps, prompt=ids, prompt_positions=places, stop_id=model.tokenizer.eos_id, **options
    )


def test_requests_of_every_kind_at_once_get_what_sample_draws(served, model):
    """8 requests of 12 texts over 3 rows: most enter in the middle of others."""
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: ask(served, **body), KINDS))
    for body, answer in zip(KINDS, answers, strict=True):
        tokens, log_probs = samples = expected(model, **body)
        assert [c["tokens"] for c in answer["choices"]] == tokens.tolist(), body
        assert torch.allclose(torch.tensor([c["log_prob"] for c in answer["choices"]]), log_probs.sum(1), atol=1e-2)
        assert [c["saved"] for c in answer["choices"]] == samples.saved.tolist()
        assert [c["index"] for c in answer["choices"]] == list(range(body.get("n", 1)))
        made = int((log_probs != 0).sum())
        assert answer["usage"]["completion_tokens"] == made
        for choice in answer["choices"]:  # the bytes' text, up to the end that the model put
            row = choice["tokens"][len(body.get("prompt", "")) :]
            whole = bytes(t for t in row[: row.index(256) if 256 in row else None]).decode(errors="replace")
            assert choice["text"] == whole
    assert answers[0]["object"] == "text_completion"
    assert answers[0]["model"] == "tiny"


def test_a_stream_tells_every_place_once_and_out_of_order(served, model):
    body = {"prompt": "def f", "max_tokens": 30, "seed": 1, "alpha_0": 1.0, "n": 2}
    events = []
    with served.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line:
                assert line.startswith("data: ")
                events.append(line[6:])
    assert events.pop() == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    for index in range(2):
        mine = [c for c in choices if c["index"] == index]
        pieces = sorted((p for c in mine for p in c.get("pieces", [])), key=lambda p: p["start"])
        end = expected(model, **body)[0][index].tolist()
        end = next((i for i, t in enumerate(end) if t == 256), len(end))
        assert "".join(p["text"] for p in pieces if p["start"] < end) == "def f" + mine[-1]["whole"]
        assert "".join(c["text"] for c in mine) == mine[-1]["whole"], "what is read from the left"
        assert {c["finish_reason"] for c in mine[:-1]} == {None}
    done = {c["index"]: c for c in choices if c["finish_reason"]}
    tokens = expected(model, **body)[0]
    assert [done[i]["tokens"] for i in range(2)] == tokens.tolist()
    for index in range(2):
        told = [(p, t) for c in choices if "positions" in c and c["index"] == index
                for p, t in zip(c["positions"], c["tokens"], strict=True)]  # fmt: skip
        assert sorted(told) == [(p, tokens[index, p]) for p in range(5, 5 + len(told))]
        assert [p for p, _ in told] != sorted(p for p, _ in told), "places come in the order of generation"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"max_tokens": 65}, 413, "65 tokens"),
        ({"n": 13}, 413, "n = 13"),
        ({"prompt": "a" * 3000}, 413, "a request may have 2000"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"top_q": 1}, 400, "top_q"),
        ({"order": "block_distant"}, 400, "use schedule='uniform'"),
        ({"infill": "no hole"}, 400, "has no hole"),
        ({"infill": "[[3]]", "prompt": "x"}, 400, "give one of them"),
        ("no json", 400, "JSON decode error"),
        ("\xff", 400, "JSON"),
        ("[" * 1500, 400, ""),
        ("[]", 400, ""),
        ('{"prompt": "\\ud800"}', 400, "half of a pair"),
        ('{"infill": "\\udc00[[3]]"}', 400, "half of a pair"),
        ({"infill": ""}, 400, "has no hole"),
        ({"infill": f"[[{10**30}]]"}, 413, "tokens"),
        ({"infill": "[[0]]"}, 400, "infill"),
        ({"max_tokens": 10**30}, 400, "max_tokens"),
        ({"n": 10**30}, 400, "n: "),
        ({"seed": 2**63}, 400, "seed"),
        ({"steps": 2**63}, 400, "steps"),
        ({"top_k": 2**70}, 400, "top_k"),
        ({"temperature": 1e308}, 400, "temperature"),
        ({"temperature": 1e-320}, 400, "temperature"),
        ({"repetition_penalty": 1e-300}, 400, "repetition_penalty"),
        ({"logprobs": 5}, 400, "logprobs"),
        ({"best_of": 2}, 400, "best_of"),
        ({"stop": [5]}, 400, "stop"),
        ({"propose": 10**30, "schedule": "first_hitting"}, 400, "started with propose=auto"),
        ({"propose": 4}, 400, "use schedule='first_hitting'"),
        ({"propose": "all"}, 400, "propose"),
        ({"passes": 3}, 400, "passes"),
    ],
)
def test_refusals(served, body, status, message):
    sent = {"content": body} if isinstance(body, str) else {"json": body}
    answer = served.client.post("/v1/completions", **sent, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]["message"]
    assert served.client.get("/health").json()["ok"]


def test_other_addresses_are_refused_in_the_same_form(served):
    for answer in (served.client.get("/v1/nothing"), served.client.get("/v1/completions")):
        assert answer.json()["error"]["code"] == answer.status_code >= 400


def test_a_billion_steps_cost_no_more_than_few(served, model):
    """The plan is made for places, not for steps."""
    body = {"prompt": "a", "max_tokens": 4, "steps": 1_000_000_000, "seed": 3}
    assert ask(served, **body)["choices"][0]["tokens"] == expected(model, **body)[0][0].tolist()


def test_a_field_that_is_null_has_its_default(served):
    body = {"prompt": "a", "max_tokens": 6}
    nulls = dict.fromkeys(
        ["seed", "stop", "temperature", "top_p", "n", "echo", "logprobs", "stream", "stream_options", "user"]
    )
    assert ask(served, **body, **nulls)["choices"] == ask(served, **body)["choices"]


def test_fields_that_clients_send(served):
    body = {"prompt": "ab", "max_tokens": 30, "seed": 5, "user": "someone", "stop": False}
    (plain,) = ask(served, **body)["choices"]
    (echoed,) = ask(served, **body, echo=True)["choices"]
    assert echoed["text"] == "ab" + plain["text"]
    (told,) = ask(served, **body, logprobs=1)["choices"]
    assert sum(told["logprobs"]["token_logprobs"]) == pytest.approx(plain["log_prob"], abs=1e-3)
    assert len(told["logprobs"]["tokens"]) == len(plain["tokens"])
    stop = plain["text"][7:9]
    (cut,) = ask(served, **{**body, "stop": [stop, ""]})["choices"]
    text = plain["text"]
    assert (cut["text"], cut["finish_reason"]) == (text[: text.index(stop)], "stop")
    with served.client.stream(
        "POST",
        "/v1/completions",
        json={**body, "stop": stop, "stream": True, "stream_options": {"include_usage": True}},
    ) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line and "[DONE]" not in line]
    assert "".join(c["text"] for e in events for c in e["choices"]) == cut["text"]
    assert events[-1]["usage"] == {"prompt_tokens": 2, "completion_tokens": 30, "total_tokens": 32}


def test_metrics_are_prometheus_text(served):
    from prometheus_client.parser import text_string_to_metric_families

    def values():
        answer = served.client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        families = text_string_to_metric_families(answer.text)
        return {s.name: s.value for f in families for s in f.samples if "le" not in s.labels}

    before = values()
    ask(served, max_tokens=20, n=2, stop=False, alpha_0=0.0)
    after = values()
    assert after["esolm_tokens_total"] - before["esolm_tokens_total"] == 40
    for name, count in (("first", 2), ("between", 38)):
        full = f"esolm_time_{'to_first_token' if name == 'first' else 'between_tokens'}_seconds"
        assert after[f"{full}_count"] - before[f"{full}_count"] == count
        assert after[f"{full}_sum"] > before[f"{full}_sum"]


def test_a_body_of_unknown_length_is_refused(served):
    answer = served.client.post("/v1/completions", content=iter([b"{}"]))
    assert answer.status_code == 411


class Slow:
    """The network, with a pause before each pass that a test may lengthen."""

    def __init__(self, model):
        self.model, self.may_go = model, threading.Event()
        model.register_forward_pre_hook(self.wait)

    def wait(self, *_):
        self.may_go.wait(30)


@pytest.fixture
def slow(folder):
    loaded = load_pretrained(folder)
    brake = Slow(loaded.model)
    running = Running(loaded, LIMITS)
    yield running, brake
    brake.may_go.set()
    if running.thread.is_alive():
        running.stop()


def test_a_full_queue_answers_429_and_recovers(slow):
    running, brake = slow
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, running, n=3, max_tokens=5)
        wait_for(lambda: len(running.worker.at_work) == 3)
        waiting = [pool.submit(ask, running, n=2, max_tokens=5) for _ in range(2)]
        wait_for(lambda: len(running.worker.waiting) == 4)
        refused = running.client.post("/v1/completions", json={"max_tokens": 5})
        assert refused.status_code == 429
        assert "4 texts are waiting" in refused.json()["error"]["message"]
        brake.may_go.set()
        assert len(first.result()["choices"]) == 3
        assert [len(x.result()["choices"]) for x in waiting] == [2, 2]
    assert len(ask(running, max_tokens=5)["choices"]) == 1


def test_rows_are_shared_between_requests(slow):
    """Requests that are served together take hardly more passes than the longest alone."""
    running, brake = slow
    bodies = [{"max_tokens": 40 + i, "seed": i, "alpha_0": 0.0, "stop": False} for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(ask, running, **body) for body in bodies]
        wait_for(lambda: len(running.worker.at_work) + len(running.worker.waiting) == 3)
        brake.may_go.set()
        assert [len(x.result()["choices"]) for x in answers] == [1, 1, 1]
    assert 42 <= running.worker.passes <= 45


def test_texts_wait_for_memory_where_rows_share_it(model, monkeypatch):
    """Three rows, and memory for two texts: what one gives back, the next one takes."""
    busy, step = [], serve.Worker._step
    monkeypatch.setattr(
        serve.Worker, "_step", lambda self, sampler: (busy.append(len(self.at_work)), step(self, sampler))
    )
    running = Running(model, replace(LIMITS, places=2 * serve.PAGE, propose=1))
    try:
        body = {"prompt": "ab", "max_tokens": 20, "seed": 4, "n": 5}
        answer = ask(running, **body)
        assert [c["tokens"] for c in answer["choices"]] == expected(model, **body)[0].tolist()
        assert max(busy) == 2
    finally:
        running.stop()
    with pytest.raises(
        ConfigError, match=r"places = 100: one text of length = 64 with propose = auto takes 128, in pages of 128"
    ):
        replace(LIMITS, places=100)


def test_a_client_that_leaves_gives_its_rows_back(slow):
    running, brake = slow
    with running.client.stream("POST", "/v1/completions", json={"n": 3, "max_tokens": 60, "stream": True}):
        wait_for(lambda: len(running.worker.at_work) == 3)
    wait_for(lambda: all(job.given_up for job in running.worker.at_work.values()))
    brake.may_go.set()
    wait_for(lambda: not running.worker.at_work)
    assert running.worker.passes < 30
    assert len(ask(running, max_tokens=5)["choices"]) == 1


def test_closing_tells_those_that_wait(slow):
    running, brake = slow
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(running.client.post, "/v1/completions", json={"max_tokens": 5, "n": 5})
        wait_for(lambda: running.worker.waiting)
        running.worker.closing = True
        brake.may_go.set()
        answer = asked.result()
    assert answer.status_code == 503
    assert running.client.post("/v1/completions", json={}).status_code == 503
    assert not running.client.get("/health").json()["ok"]


def test_the_verb_serves_on_loopback_and_ends_on_a_signal(folder):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "esolm_megatron", "serve", str(folder), f"port={port}", "rows=2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:

            def up():
                assert process.poll() is None, process.stderr.read()
                try:
                    return client.get("/health").json()["ok"]
                except httpx.TransportError:
                    return False

            wait_for(up, 60)
            assert client.get("/v1/models").json()["data"][0]["id"] == "model"
            assert client.post("/v1/completions", json={"max_tokens": 4}).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        said = process.stderr.read()
    finally:
        process.kill()
    assert f"http://127.0.0.1:{port}" in said
    assert "Traceback" not in said


def test_the_loop_is_woken_once_a_pass_and_not_at_all_for_texts_that_nobody_reads_along(model, monkeypatch):
    """Six whole texts at once: news of ends only. Six streamed ones: no more wakings than passes and requests."""
    running = Running(model, replace(LIMITS, rows=6, queue=6))
    try:
        seen, tell = [], serve._tell

        def counted(news):
            if news:
                seen.append([event for _, event in news])
            tell(news)

        monkeypatch.setattr(serve, "_tell", counted)
        passes = running.worker.passes
        ask(running, prompt="ab", max_tokens=20, steps=6, n=6, stop=False)
        assert all(set(event) == {"done"} for events in seen for event in events)
        assert sum(map(len, seen)) == 6
        seen.clear()
        passes = running.worker.passes
        ask(running, prompt="ab", max_tokens=20, steps=6, n=6, stop=False, seed=1)
        with running.client.stream(
            "POST", "/v1/completions", json={"max_tokens": 20, "n": 6, "stream": True, "steps": 6}
        ) as answer:
            text = "".join(answer.iter_text())
        assert text.endswith("data: [DONE]\n\n")
        assert len(seen) <= running.worker.passes - passes
        assert sum("tokens" in event for events in seen for event in events) > len(seen)
    finally:
        running.stop()
