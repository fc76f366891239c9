"""A trained model on one device: `load_pretrained(folder)`, then likelihoods with gradients, and samples."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from esolm_megatron.config import ConfigError, ModelConfig
from esolm_megatron.data.tokenizer import Tokenizer, load_tokenizer
from esolm_megatron.inference.request import SampleRequest
from esolm_megatron.inference.sampler import Sampler, Samples, Watch, of_one_length, sample_rows
from esolm_megatron.model import flash
from esolm_megatron.model.int8 import with_int8_weights
from esolm_megatron.model.pretrained import load_model, read_config
from esolm_megatron.model.transformer import EsoLM
from esolm_megatron.objective.likelihood import log_likelihood


class PretrainedEsoLM:
    """A network with what is needed to use it.

    config: its shape. model: the network; its parameters take gradients. alpha_0: share of tokens made by diffusion in
    training. folder: where it was loaded from, if it was. cross_document: whether attention crossed the boundaries of
    documents in training; if not, give rows of several documents with their `documents`.
    """

    def __init__(self, model: EsoLM, alpha_0: float, folder: Path | None = None, *, cross_document: bool = True):
        self.model, self.alpha_0, self.folder, self.cross_document = model, alpha_0, folder, cross_document
        self.config: ModelConfig = model.shape
        self.kept: list[Sampler] = []
        """What the last call has recorded, if anything, see `sample_rows`."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embedding.weight.device

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer, read when first used.

        Raises:
            ValueError: there is no folder, or no tokenizer in it.
        """
        if self.folder is None:
            raise ValueError("tokenizer: this model was not loaded from a folder; use load_pretrained(folder)")
        return load_tokenizer(self.folder.resolve())

    def log_likelihood(
        self, tokens: Tensor, order: Tensor, scored: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """log p(tokens | order) of each row, one token a step: (B,), exact, with gradients, on the model's device.

        tokens, order: (B, L) int64; `order[k]` is the position generated k-th. scored: (B, L) bool, the positions whose
        log-probabilities are summed, all by default: leave out a prompt (first in the order) or padding (last in it).
        documents: (B, L) int64 from 0, the document of each position, where a token may see only its own; a model that was
        trained with data.cross_document=false expects it of rows that hold several.

        Raises:
            ValueError: shapes differ, a row of `order` is no permutation, or a token is outside the vocabulary.
        """
        tokens, order = tokens.to(self.device, torch.int64), order.to(self.device, torch.int64)
        if scored is not None:
            if scored.shape != tokens.shape:
                raise ValueError(f"scored {tuple(scored.shape)} must have the shape of tokens, {tuple(tokens.shape)}")
            scored = scored.to(self.device, torch.bool)
        return log_likelihood(self.model, tokens, order, scored=scored, documents=documents)

    def request(
        self, num_samples: int, length: int, steps: int | None = None, alpha_0: float | None = None, **fields: Any
    ) -> SampleRequest:
        """A request to this model. steps: one for each place by default. alpha_0: the trained value by default."""
        steps, alpha_0 = length if steps is None else steps, self.alpha_0 if alpha_0 is None else alpha_0
        return SampleRequest(num_samples, length, alpha_0, steps, **fields)

    def sample(
        self,
        num_samples: int,
        length: int,
        steps: int | None = None,
        *,
        watch: Watch | None = None,
        batch_size: int | None = None,
        **fields: Any,
    ) -> Samples:
        """(tokens (B, L) int64, log_probs (B, L)) as `Samples`, which also tells the order and the passes it took.

        The fields are those of `SampleRequest`. steps: diffusion steps, one for each of the `length` places by default.
        alpha_0: share of tokens made by diffusion, the trained value by default. watch: called after each pass.
        batch_size: rows sampled at once, all by default; it does not change the samples.

        Raises:
            ValueError: an argument out of its range, said with the fix.
        """
        request = self.request(num_samples, length, steps, **fields)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: must be at least 1, or None for all rows at once")
        size = batch_size or num_samples
        parts = [
            sample_rows(
                self.model,
                request.part(first, min(size, num_samples - first)),
                watch if watch is None or first == 0 else _shifted(watch, first),
                self.kept,
            )
            for first in (range(0, num_samples, size) if num_samples > 0 else [0])
        ]
        if len(parts) == 1:
            return parts[0]
        tokens, log_probs, orders, saved = (
            torch.cat(x) for x in zip(*((*p, p.order, p.saved) for p in parts), strict=True)
        )
        ks = of_one_length([ks for part in parts for ks in part.ks]) if request.own_schedules else parts[0].ks
        shapes, seconds = (sum(x) for x in zip(*(p.recorded for p in parts), strict=True))
        passes = max(p.num_forward_passes for p in parts)
        return Samples(tokens, log_probs, orders, ks, passes, saved, (shapes, seconds))


def _shifted(watch: Watch, first: int) -> Watch:
    return lambda count, rows, positions, tokens: watch(count, rows + first, positions, tokens)


def load_pretrained(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    weights: Literal["full", "int8"] = "full",
) -> PretrainedEsoLM:
    """The model that `esolm convert` wrote to `folder`, ready to score and sample.

    weights: int8 holds the matrices of blocks in 8 bits, which take no gradients (model/int8.py).

    Raises:
        ValueError: the folder holds no such model, or a damaged one.
        KernelError: a GPU's attention kernels are wrong, or cannot run.
    """
    info = read_config(folder)
    model = load_model(folder, dtype, device)
    model = with_int8_weights(model) if weights == "int8" else model
    flash.choose(torch.device(device))  # what scores texts are the kernels of training
    return PretrainedEsoLM(model, info.alpha_0, Path(folder), cross_document=info.cross_document)


HOLE = re.compile(r"\[\[(\d+)\]\]")


def parse_infill(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[int], int]:
    """Token ids, their positions and the whole length of a text with [[n]] holes; a piece after a hole goes on.

    Raises:
        ConfigError: there is no hole.
    """
    parts = HOLE.split(text)
    if len(parts) == 1:
        raise ConfigError(f"infill = {text!r}: has no hole; write [[12]] for 12 tokens to be filled in")
    ids: list[int] = []
    positions: list[int] = []
    length = 0
    for index, part in enumerate(parts):
        if index % 2:
            length += int(part)
            continue
        new = (tokenizer.encode_later if length else tokenizer.encode)(part) if part else []
        ids += new
        positions += range(length, length + len(new))
        length += len(new)
    return ids, positions, length
