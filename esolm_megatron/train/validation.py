"""Validation while a run trains."""

from __future__ import annotations

import numpy as np
import torch

from esolm_megatron.config import Config, ConfigError
from esolm_megatron.data.stream import Batch
from esolm_megatron.objective.esolm import Noised, document_numbers, draw_validation, mean_loss
from esolm_megatron.parallel.engine import Engine
from esolm_megatron.train.feed import ValidationFeed


class Validation:
    """The bound on held-out text: every sequence in both parts, the same noise each time, with averaged weights."""

    def __init__(self, config: Config, engine: Engine):
        self.config, self.engine = config, engine
        self.data = ValidationFeed(config, engine)
        self.count = min(config.evaluate.num_sequences, len(self.data))
        if self.count == 0:
            raise ConfigError(
                "data: has no validation tokens; prepare it with validation_fraction above 0, "
                "or set evaluate.every_steps=0"
            )

    def nelbo(self) -> float:
        """NELBO in nats per token, of both estimators' parts summed."""
        top, size = self.engine.topology, self.config.train.micro_batch_size
        together = self.config.parallel.pipeline_size  # micro-batches at once, so that no stage waits
        sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        with self.engine.state.averaged_weights():
            for first in range(0, self.count, size * top.data_size * together):
                places = [first + (m * size + np.arange(size)) * top.data_size + top.data_rank for m in range(together)]
                batches = self.data.rows([np.minimum(rows, self.count - 1) for rows in places])
                parts = [self._draw(rows, batch) for rows, batch in zip(places, batches, strict=True)]
                share = Noised([p.micro_batches[0] for p in parts], sum(p.num_valid for p in parts))  # type: ignore[arg-type]
                got, seen = self.engine.evaluate(share)
                sums += got.cpu()
                counts += seen.cpu()
        return float(mean_loss(sums, counts))

    def _draw(self, rows: np.ndarray, batch: Batch) -> Noised:
        valid = batch.valid & (rows < self.count)[:, None]
        return draw_validation(
            batch.tokens,
            valid,
            rows,
            self.count,
            self.config.objective,
            mask_id=self.config.model.mask_id,
            key=(self.config.seed, "validation"),
            documents=None if self.config.data.cross_document else document_numbers(batch.documents, valid),
        )
