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
from weakref import WeakSet

import numpy as np
import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import Field, model_validator
from starlette.exceptions import HTTPException

from esolm_megatron.config import ConfigError, Section
from esolm_megatron.inference.decoding.scheduler import RowPlan, plan_rows
from esolm_megatron.inference.decoding.speculative import spare_slots
from esolm_megatron.inference.loaded_model import PretrainedEsoLM, parse_infill
from esolm_megatron.inference.pieces import Transcript
from esolm_megatron.inference.request import MOST, Cache, Propose, SamplingParams, most_proposed
from esolm_megatron.inference.sampler import Sampler
from esolm_megatron.model.cache import PAGE


@dataclass(frozen=True)
class Limits:
    """rows: texts at once. length: tokens of a text, prompt included. queue: texts waiting. body: bytes. cache: see `Cache`.

    propose: tokens that a request may propose at once, for which memory is kept; "auto" for all up to its most.
    places: memory for tokens of all texts together; None for rows x length.
    """

    rows: int = 16
    length: int = 1024
    queue: int = 64
    body: int = 1_000_000
    cache: Cache = "full"
    propose: Propose = 1
    places: int | None = None

    def __post_init__(self) -> None:
        need = self.length + spare_slots(most_proposed(self.propose))
        need = -(-need // PAGE) * PAGE
        if self.places is not None and self.places < need:
            raise ConfigError(
                f"places = {self.places}: one text of length = {self.length} with propose = {self.propose} takes {need}, in pages "
                f"of {PAGE}; set places to at least that, or length to less"
            )


class StreamOptions(Section):
    """What a stream tells besides."""

    include_usage: bool = False


class Completion(SamplingParams):
    """What is asked for: a prompt and `max_tokens` after it, or a text with [[12]] holes in `infill`.

    stop: end at the end-of-text token (true), or there and before any of these strings. echo: the text that comes back holds
    its prompt; with holes it always does. logprobs: log p of each token. A field that is null has its default.
    """

    prompt: str = ""
    infill: str | None = None
    max_tokens: int = Field(64, ge=1, le=MOST)
    n: int = Field(1, ge=1, le=MOST)
    stop: bool | str | list[str] = True
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    model: str | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        return {k: v for k, v in fields.items() if v is not None} if isinstance(fields, dict) else fields

    @property
    def stop_texts(self) -> list[str]:
        """Strings before which a text ends."""
        texts = self.stop if isinstance(self.stop, list) else [self.stop] if isinstance(self.stop, str) else []
        return [text for text in texts if text]


@dataclass(eq=False)
class Job:
    """One text: its plan, and the queue of the request that its news go to."""

    index: int
    plan: RowPlan
    text: Transcript
    news: asyncio.Queue[dict[str, Any]]
    loop: asyncio.AbstractEventLoop
    follows: bool = True
    """Whether somebody reads along: else only the end is told."""
    given_up: bool = False
    heard: float = field(default_factory=time.monotonic)
    """When it was asked for, or its last tokens came."""

    def tell(self, **event: Any) -> None:
        """Put news into the request's queue, from the model's thread."""
        _tell([(self, event)])


def _tell(news: list[tuple[Job, dict[str, Any]]]) -> None:
    """Put news of jobs of one event loop into their requests' queues, from the model's thread: the loop is woken once."""

    def put() -> None:
        for job, event in news:
            job.news.put_nowait({"index": job.index, **event})

    try:
        if news:
            news[0][0].loop.call_soon_threadsafe(put)
    except RuntimeError:  # the loop is closed: nobody is left to hear it
        for job, _ in news:
            job.given_up = True


class Refused(Exception):
    """A request that is not taken: HTTP status and reason."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Meters:
    """What /metrics tells, in Prometheus' text format."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.tokens = Counter("esolm_tokens", "tokens made", registry=self.registry)
        self.passes = Counter("esolm_row_passes", "passes, counted once for each text in them", registry=self.registry)
        self.waiting = Gauge("esolm_waiting", "texts that wait for a row", registry=self.registry)
        self.at_work = Gauge("esolm_at_work", "texts being written", registry=self.registry)
        self.first = Histogram("esolm_time_to_first_token_seconds", "from the request on", registry=self.registry)
        self.between = Histogram(
            "esolm_time_between_tokens_seconds",
            "of a text, a pass that makes several divided by them",
            registry=self.registry,
        )
        self._begun: WeakSet[Job] = WeakSet()

    def passed(self, job: Job, count: int) -> None:
        """`count` tokens of a text have come."""
        now = time.monotonic()
        self.tokens.inc(count)
        self.passes.inc()
        if job in self._begun:
            self.between.observe((now - job.heard) / count)
        else:
            self._begun.add(job)
            self.first.observe(now - job.heard)
        job.heard = now


@dataclass
class Worker:
    """The thread that owns the model: takes jobs in between passes. passes: how many it has made."""

    model: PretrainedEsoLM
    limits: Limits
    waiting: deque[Job] = field(default_factory=deque)
    at_work: dict[int, Job] = field(default_factory=dict)
    meters: Meters = field(default_factory=Meters)
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
                limits, most = self.limits, most_proposed(self.limits.propose)
                sampler = Sampler(
                    self.model.model, limits.rows, limits.length, cache=limits.cache, most=most, places=limits.places
                )
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
            while self.waiting and (self.waiting[0].given_up or sampler.takes(self.waiting[0].plan)):
                job = self.waiting.popleft()
                if not job.given_up:
                    self.at_work[sampler.add(job.plan)] = job
            return not self.closing

    def _step(self, sampler: Sampler) -> None:
        done = [row for row in self.at_work if not sampler.at_work(row)]  # those with nothing to fill
        news: list[tuple[Job, dict[str, Any]]] = []
        filled = sampler.step()
        self.passes = sampler.passes
        if filled is not None:
            for row in np.unique(filled.rows).tolist():
                mine, job = filled.rows == row, self.at_work[row]
                if job.follows:
                    made = {"positions": filled.positions[mine].tolist(), "tokens": filled.tokens[mine].tolist()}
                    news.append((job, made))
                self.meters.passed(job, int(mine.sum()))
            done += filled.done
        for row in done:
            tokens, log_probs = sampler.result(row)
            finite = bool(log_probs.isfinite().all())
            facts = {"tokens": tokens.tolist(), "log_prob": log_probs.sum().item(), "saved": int(sampler.saved[row])}
            facts["log_probs"] = log_probs.tolist()
            sampler.release(row)
            with self.changed:
                job = self.at_work.pop(row)
            news.append((job, {"done": facts} if finite else {"error": "the model's logits are not finite numbers"}))
        _tell(news)


def plans_of(model: PretrainedEsoLM, limits: Limits, asked: Completion) -> list[RowPlan]:
    """The plan of each text of a request: that of `sample` with the same arguments.

    Raises:
        Refused: a text is longer than the server allows.
        ValueError: an argument out of its range.
    """
    if asked.infill is not None:
        if asked.prompt:
            raise ConfigError("prompt and infill: give one of them; infill may start with text")
        ids, positions, length = parse_infill(asked.infill, model.tokenizer)
    else:
        ids = model.tokenizer.encode(asked.prompt) if asked.prompt else []
        positions, length = list(range(len(ids))), len(ids) + asked.max_tokens
    if length > limits.length or asked.n > limits.rows + limits.queue:
        raise Refused(
            413, f"n = {asked.n} texts of {length} tokens: at most {limits.rows + limits.queue} of {limits.length}"
        )
    if most_proposed(asked.propose) > most_proposed(limits.propose):
        raise ConfigError(
            f"propose = {asked.propose}: this server was started with propose={limits.propose}, for which it keeps memory; "
            "ask for less, or start it with more"
        )
    if not length:
        raise ConfigError("infill: has no token and no hole")
    request = model.request(
        asked.n, length, prompt=torch.tensor(ids, dtype=torch.int64),
        prompt_positions=torch.tensor(positions, dtype=torch.int64),
        stop_id=None if asked.stop is False else model.tokenizer.eos_id, **asked.sampling(),
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

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> JSONResponse:
        return refusal(error.status_code, str(error.detail))

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

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        worker.meters.waiting.set(len(worker.waiting))
        worker.meters.at_work.set(len(worker.at_work))
        return PlainTextResponse(generate_latest(worker.meters.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "local"}]}

    @app.post("/v1/completions")
    async def complete(asked: Completion, request: Request) -> Any:
        news: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        try:
            plans = await asyncio.to_thread(plans_of, model, limits, asked)
            loop = asyncio.get_running_loop()
            jobs = [
                Job(i, plan, Transcript(model.tokenizer, plan, asked), news, loop, asked.stream)
                for i, plan in enumerate(plans)
            ]
            worker.submit(jobs)
        except Refused as error:
            return refusal(error.status, str(error))
        except ValueError as error:
            return refusal(400, str(error))
        head = {"id": f"cmpl-{next(numbers)}", "object": "text_completion", "created": int(time.time()), "model": name}
        answer = Answer(asked, head, jobs, news)
        if asked.stream:
            return StreamingResponse(answer.events(), media_type="text/event-stream")
        return await answer.whole(request)

    return app


@dataclass
class Answer:
    """What goes back to a client."""

    asked: Completion
    head: dict[str, Any]
    jobs: list[Job]
    news: asyncio.Queue[dict[str, Any]]
    made: int = 0

    def choice(self, index: int, facts: dict[str, Any]) -> dict[str, Any]:
        """A finished text."""
        job = self.jobs[index]
        self.made += len(facts["tokens"]) - facts["saved"] - len(job.plan.given)
        log_probs = facts.pop("log_probs")
        out = {"index": index, **job.text.finished(facts["tokens"]), **facts}
        if self.asked.logprobs is not None:
            out["logprobs"] = {
                "tokens": job.text.texts(facts["tokens"]),
                "token_logprobs": log_probs,
                "top_logprobs": None,
            }
        return out

    @property
    def usage(self) -> dict[str, int]:
        """Tokens given and made."""
        given = sum(len(job.plan.given) for job in self.jobs)
        return {"prompt_tokens": given, "completion_tokens": self.made, "total_tokens": given + self.made}

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
        return {**self.head, "choices": sorted(choices, key=lambda c: c["index"]), "usage": self.usage}

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events: places as they are filled, out of order, with the text that goes on from the left."""
        left = len(self.jobs)
        try:
            while left:
                event = await self.news.get()
                if "done" in event:
                    left -= 1
                    done = self.choice(event["index"], event["done"])
                    event = {**done, "whole": done["text"], "text": self.jobs[event["index"]].text.rest(done["text"])}
                elif "tokens" in event:
                    event |= self.jobs[event["index"]].text.add(event["positions"], event["tokens"])
                    event["finish_reason"] = None
                elif "error" in event:
                    left = 0
                yield self._event([event])
            if self.asked.stream_options.include_usage:
                yield self._event([], usage=self.usage)
            yield "data: [DONE]\n\n"
        finally:
            self._leave()

    def _event(self, choices: list[Any], **more: Any) -> str:
        return f"data: {json.dumps({**self.head, 'choices': choices, **more})}\n\n"

    def _leave(self) -> None:
        for job in self.jobs:
            job.given_up = True
