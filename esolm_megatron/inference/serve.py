"""A small server: texts over HTTP, whole or as a stream, from one model whose passes all requests share.

Requests that wait are taken in as soon as rows are free, each with its own length, order, schedule and way of drawing;
no request waits for another to end. A thread owns the model. Needs the extra `serve`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import Field

from esolm_megatron.config import ConfigError
from esolm_megatron.inference.decoding.scheduler import RowPlan, plan_rows
from esolm_megatron.inference.loaded_model import PretrainedEsoLM, parse_infill
from esolm_megatron.inference.request import SamplingParams
from esolm_megatron.inference.sampler import Sampler


@dataclass(frozen=True)
class Limits:
    """rows: texts written at once. length: tokens of a text, prompt included. queue: texts that may wait. body: bytes."""

    rows: int = 16
    length: int = 1024
    queue: int = 64
    body: int = 1_000_000


class Completion(SamplingParams):
    """What is asked for: a prompt and `max_tokens` after it, or a text with [[12]] holes in `infill`."""

    prompt: str = ""
    infill: str | None = None
    max_tokens: int = Field(64, ge=1)
    n: int = Field(1, ge=1)
    stop: bool = True
    stream: bool = False
    model: str | None = None


@dataclass(eq=False)
class Job:
    """One text: its plan, and the queue of the request that its news go to."""

    index: int
    plan: RowPlan
    news: asyncio.Queue[dict[str, Any]]
    loop: asyncio.AbstractEventLoop
    given_up: bool = False

    def tell(self, **event: Any) -> None:
        """Put news into the request's queue, from the model's thread."""
        try:
            self.loop.call_soon_threadsafe(self.news.put_nowait, {"index": self.index, **event})
        except RuntimeError:  # the loop is closed: nobody is left to hear it
            self.given_up = True


class Refused(Exception):
    """A request that is not taken: HTTP status and reason."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


@dataclass
class Worker:
    """The thread that owns the model: takes jobs in between passes. passes: how many it has made."""

    model: PretrainedEsoLM
    limits: Limits
    waiting: deque[Job] = field(default_factory=deque)
    at_work: dict[int, Job] = field(default_factory=dict)
    passes: int = 0
    closing: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)

    def start(self) -> None:
        """Begin to work."""
        self.thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self.thread.start()

    def submit(self, jobs: list[Job]) -> None:
        """Queue the texts of a request.

        Raises:
            Refused: the queue has no room for all of them, or the server is ending.
        """
        with self.changed:
            if self.closing:
                raise Refused(503, "the server is shutting down")
            free = self.limits.rows - len(self.at_work)
            if len(self.waiting) + len(jobs) > self.limits.queue + free:
                raise Refused(
                    429, f"{len(self.waiting)} texts are waiting, of at most {self.limits.queue}; try again later"
                )
            self.waiting.extend(jobs)
            self.changed.notify()

    def close(self) -> None:
        """Give up what is waiting or being written, and end the thread."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()

    def _run(self) -> None:
        with torch.inference_mode():
            try:
                sampler = Sampler(self.model.model, self.limits.rows, self.limits.length)
                while self._take_in(sampler):
                    self._step(sampler)
            finally:
                self.closing = True
                for job in [*self.at_work.values(), *self.waiting]:
                    job.tell(error="the server is shutting down")

    def _take_in(self, sampler: Sampler) -> bool:
        """Fill free rows; waits while there is nothing to do. False when it is time to end."""
        with self.changed:
            self.changed.wait_for(lambda: self.closing or self.waiting or self.at_work)
            for row in [row for row, job in self.at_work.items() if job.given_up]:
                del self.at_work[row]
                sampler.release(row)
            while self.waiting and sampler.free:
                job = self.waiting.popleft()
                if not job.given_up:
                    self.at_work[sampler.add(job.plan)] = job
            return not self.closing

    def _step(self, sampler: Sampler) -> None:
        done = [row for row in self.at_work if not sampler.at_work(row)]  # those with nothing to fill
        filled = sampler.step()
        self.passes = sampler.decoder.passes
        if filled is not None:
            for row in set(filled.rows.tolist()):
                mine = filled.rows == row
                self.at_work[row].tell(positions=filled.positions[mine].tolist(), tokens=filled.tokens[mine].tolist())
            done += filled.done
        for row in done:
            tokens, log_probs = sampler.result(row)
            finite = bool(log_probs.isfinite().all())
            facts = {"tokens": tokens.tolist(), "log_prob": log_probs.sum().item(), "saved": int(sampler.saved[row])}
            sampler.release(row)
            with self.changed:
                job = self.at_work.pop(row)
            job.tell(**({"done": facts} if finite else {"error": "the model's logits are not finite numbers"}))


def plans_of(model: PretrainedEsoLM, limits: Limits, asked: Completion) -> list[RowPlan]:
    """The plan of each text of a request: that of `sample` with the same arguments.

    Raises:
        Refused: a text is longer than the server allows.
        ValueError: an argument out of its range.
    """
    encode = model.tokenizer.encode
    if asked.infill is not None:
        if asked.prompt:
            raise ConfigError("prompt and infill: give one of them; infill may start with text")
        ids, positions, length = parse_infill(asked.infill, encode)
    else:
        ids = encode(asked.prompt) if asked.prompt else []
        positions, length = list(range(len(ids))), len(ids) + asked.max_tokens
    if length > limits.length or asked.n > limits.rows + limits.queue:
        raise Refused(
            413, f"n = {asked.n} texts of {length} tokens: at most {limits.rows + limits.queue} of {limits.length}"
        )
    request = model.request(
        asked.n, length, prompt=torch.tensor(ids, dtype=torch.int64),
        prompt_positions=torch.tensor(positions, dtype=torch.int64),
        stop_id=model.tokenizer.eos_id if asked.stop else None, **asked.sampling(),
    )  # fmt: skip
    return plan_rows(request, model.config.mask_id)


def build(model: PretrainedEsoLM, limits: Limits = Limits(), name: str = "esolm") -> FastAPI:
    """The application: POST /v1/completions, GET /v1/models, GET /health."""
    worker, numbers = Worker(model, limits), itertools.count()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.close)

    app = FastAPI(title="esolm", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.worker = worker

    def refusal(status: int, reason: str) -> JSONResponse:
        return JSONResponse({"error": {"message": reason, "type": "refused", "code": status}}, status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        lines = [f"{'.'.join(str(p) for p in e['loc'][1:])}: {e['msg']}" for e in error.errors()]
        return refusal(400, "; ".join(lines))

    @app.middleware("http")
    async def small_bodies(request: Request, call_next: Any) -> Any:
        size = request.headers.get("content-length")
        if request.method == "POST" and (size is None or not size.isdigit()):
            return refusal(411, "send Content-Length")
        if size is not None and int(size) > limits.body:
            return refusal(413, f"{size} bytes: a request may have {limits.body}")
        return await call_next(request)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        ok = worker.thread.is_alive() and not worker.closing
        return {"ok": ok, "at_work": len(worker.at_work), "waiting": len(worker.waiting), "passes": worker.passes}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "local"}]}

    @app.post("/v1/completions")
    async def complete(asked: Completion, request: Request) -> Any:
        news: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        try:
            plans = await asyncio.to_thread(plans_of, model, limits, asked)
            jobs = [Job(i, plan, news, asyncio.get_running_loop()) for i, plan in enumerate(plans)]
            worker.submit(jobs)
        except Refused as error:
            return refusal(error.status, str(error))
        except ValueError as error:
            return refusal(400, str(error))
        head = {"id": f"cmpl-{next(numbers)}", "object": "text_completion", "created": int(time.time()), "model": name}
        answer = Answer(model, head, jobs, news)
        if asked.stream:
            return StreamingResponse(answer.events(), media_type="text/event-stream")
        return await answer.whole(request)

    return app


@dataclass
class Answer:
    """What goes back to a client."""

    model: PretrainedEsoLM
    head: dict[str, Any]
    jobs: list[Job]
    news: asyncio.Queue[dict[str, Any]]

    def choice(self, index: int, facts: dict[str, Any]) -> dict[str, Any]:
        """A finished text; its prompt is part of it, since a hole may stand anywhere."""
        tokens = facts["tokens"]
        stop = self.jobs[index].plan.stop_id
        given = set(self.jobs[index].plan.order[: len(self.jobs[index].plan.given)].tolist())
        ends = [i for i, t in enumerate(tokens) if t == stop and i not in given]
        text = self.model.tokenizer.decode(tokens[: ends[0]] if ends else tokens)
        return {"index": index, "text": text, "finish_reason": "stop" if ends else "length", **facts}

    async def whole(self, request: Request) -> Any:
        """All texts in one JSON document; they are given up if the client leaves."""
        choices: list[dict[str, Any]] = []
        try:
            while len(choices) < len(self.jobs):
                try:
                    event = await asyncio.wait_for(self.news.get(), 1.0)
                except TimeoutError:
                    if await request.is_disconnected():
                        return None
                    continue
                if "error" in event:
                    body = {"error": {"message": event["error"], "type": "server", "code": 503}}
                    return JSONResponse(body, 503)
                if "done" in event:
                    choices.append(self.choice(event["index"], event["done"]))
        finally:
            self._leave()
        given = sum(len(job.plan.given) for job in self.jobs)
        made = sum(len(c["tokens"]) - c["saved"] for c in choices) - given
        usage = {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}
        return {**self.head, "choices": sorted(choices, key=lambda c: c["index"]), "usage": usage}

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events: places as they are filled, out of order, and each text when it is done."""
        left = len(self.jobs)
        try:
            while left:
                event = await self.news.get()
                if "done" in event:
                    left -= 1
                    event = self.choice(event["index"], event["done"])
                elif "tokens" in event:
                    event["pieces"] = [self.model.tokenizer.decode([t]) for t in event["tokens"]]
                elif "error" in event:
                    left = 0
                yield f"data: {json.dumps({**self.head, 'choices': [event]})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self._leave()

    def _leave(self) -> None:
        for job in self.jobs:
            job.given_up = True
