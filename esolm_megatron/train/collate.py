"""What the next step will be fed, made while the present one computes: read, noised, packed, cut, and in pinned memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from esolm_megatron.config import Config
from esolm_megatron.data.stream import Batch
from esolm_megatron.model.size import run_capacity
from esolm_megatron.objective.esolm import Noised, document_numbers, draw_step
from esolm_megatron.parallel.engine import Engine
from esolm_megatron.train.feed import Feed

T = TypeVar("T")


class CollateAhead(Generic[T]):
    """Steps made ahead in one thread. `drawn` counts those used, `again` those made anew after a refused step.

    Which step a batch makes is known only when the one before it is done: a refused step is not counted. So a batch is
    made ready for the likely step; being a function of batch and step alone, it is made again in the other case.
    """

    def __init__(self, feed: Feed, first: int, make: Callable[[Batch, int], T]):
        self.drawn = self.again = 0
        self.waited = 0.0
        """Seconds in `next` so far: what reading and drawing cost the steps."""
        self._feed, self._make = feed, make
        self._batches = feed.batches(first)
        self._pool = ThreadPoolExecutor(1, "ahead")
        self._coming: Future[tuple[int, Batch, T]] | None = None
        self._for = 0

    def next(self, step: int) -> tuple[int, T]:
        """(number of the next batch, what `make` gives for it and `step`), and start on the one for the next step."""
        began = time.perf_counter()
        if self._coming is None:
            self._start(step)
        assert self._coming is not None
        number, batch, made = self._coming.result()
        if self._for == step:
            self.drawn += 1
        else:
            self.again += 1
            made = self._make(batch, step)
        self._start(step + 1)
        self.waited += time.perf_counter() - began
        return number, made

    def _start(self, step: int) -> None:
        """Where ranks share what one of them reads, all of them take it here, between two steps: it is a collective."""
        self._for = step
        found = next(self._batches) if self._feed.engine.shares_rows else None

        def work() -> tuple[int, Batch, T]:
            number, batch = found or next(self._batches)
            return number, batch, self._make(batch, step)

        self._coming = self._pool.submit(work)

    def __enter__(self) -> CollateAhead[T]:
        return self

    def __exit__(self, *error: object) -> None:
        """Stop reading, also where the thread waits for a batch."""
        self._feed.stop_reading()
        self._pool.shutdown(wait=True)
        self._batches.close()


def noising(config: Config, engine: Engine) -> Callable[[Batch, int], Noised]:
    """A function of this rank's batch and the step (from 1) it makes: the batch with the noise of that step."""
    top, t = engine.topology, config.train
    capacity = run_capacity(config)

    def noised(batch: Batch, step: int) -> Noised:
        return draw_step(
            batch.tokens,
            batch.valid,
            batch.rows,
            config.objective,
            mask_id=config.model.mask_id,
            global_batch_size=t.global_batch_size,
            num_micro_batches=t.global_batch_size // (t.micro_batch_size * top.data_size),
            capacity=capacity,
            key=(config.seed, step),
            documents=None if config.data.cross_document else document_numbers(batch.documents, batch.valid),
        )

    return noised
