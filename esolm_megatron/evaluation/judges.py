"""Who tells how likely a written text is: another causal model, of `transformers` or of ours, with its own tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from esolm_megatron.config import ConfigError
from esolm_megatron.errors import of_setting, optional
from esolm_megatron.inference.loaded_model import PretrainedEsoLM, load_pretrained
from esolm_megatron.objective.likelihood import log_likelihood

_PARTS = "texts tokenized anew, in parts of at most {} tokens that do not overlap"


@dataclass(frozen=True)
class Judgement:
    """Of some texts, each (texts,). nats: sums of -log p over `tokens` judged ones. features: (texts, H), what they ended in."""

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    features: NDArray[np.float32] | None = None


class Judge(Protocol):
    """said: what it is, with its context, for the report. sees: whether it gives features, which MAUVE compares."""

    said: str
    sees: bool

    def __call__(self, texts: list[str]) -> Judgement:
        """-log p of each text's tokens but the first of each context, which nothing comes before."""
        ...


def load_judge(folder: str, context: int | None, device: torch.device) -> Judge:
    """The model in `folder`: one that `esolm convert` wrote judges left to right, others are read by `transformers`.

    context: tokens that it sees at most; a longer text is judged in parts of so many. By default what it was trained with.

    Raises:
        ConfigError: there is none, `transformers` is not installed, or the context is longer than the model knows.
    """
    with of_setting("judge", folder):
        if not Path(folder).is_dir():
            raise ConfigError("is no folder; download the model first, nothing is fetched here")
        config = Path(folder) / "config.json"
        if config.is_file() and '"alpha_0"' in config.read_text(encoding="utf-8"):
            return _Ours(load_pretrained(folder, device=device), folder, context)
        return _Transformers(folder, context, device)


def _length(known: int | None, wanted: int | None) -> int:
    if wanted is not None and not 2 <= wanted <= (known or wanted):
        raise ConfigError(f"judge_length = {wanted}: must be 2 to {known}, the tokens that the judge was trained with")
    if wanted is None and known is None:
        raise ConfigError(
            "judge_length: the judge's configuration does not say it; give the tokens that it sees at most"
        )
    return wanted or known or 0


class _Ours:
    sees = False

    def __init__(self, model: PretrainedEsoLM, folder: str, context: int | None):
        self.model, self.length = model, _length(model.config.seq_length, context)
        self.said = f"{folder}, left to right, {_PARTS.format(self.length)}"

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> Judgement:
        nats, tokens = np.zeros(len(texts)), np.zeros(len(texts), np.int64)
        for number, text in enumerate(texts):
            for ids in torch.tensor(self.model.tokenizer.encode(text), device=self.model.device).split(self.length):
                if len(ids) > 1:
                    order = torch.arange(len(ids), device=ids.device)[None]
                    nats[number] -= float(log_likelihood(self.model.model, ids[None], order, scored=order > 0))
                    tokens[number] += len(ids) - 1
        return Judgement(nats, tokens)


class _Transformers:
    sees = True

    def __init__(self, folder: str, context: int | None, device: torch.device):
        transformers = optional("transformers", "judge")
        kind: dict[str, Any] = {"local_files_only": True}
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **kind)
        self.model = (
            transformers.AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **kind).to(device).eval()
        )
        config = self.model.config
        self.length = _length(getattr(config, "max_position_embeddings", None), context)
        self.said = f"{folder} ({config.model_type}), {_PARTS.format(self.length)}"

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> Judgement:
        """After the first end-of-text no more of them are counted, as the reference does."""
        nats, tokens, features = np.zeros(len(texts)), np.zeros(len(texts), np.int64), []
        for number, text in enumerate(texts):
            ids = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
            last = torch.zeros(self.model.config.hidden_size)
            for part in ids.to(self.model.device).split(self.length) if len(ids) else ():
                out = self.model(part[None], output_hidden_states=True)
                last = out.hidden_states[-1][0, -1].float().cpu()
                ends = part == self.tokenizer.eos_token_id
                counted = (~ends | (ends.cumsum(0) == 1))[1:]
                losses = torch.nn.functional.cross_entropy(out.logits[0, :-1].float(), part[1:], reduction="none")
                nats[number] += float(losses[counted].double().sum())
                tokens[number] += int(counted.sum())
            features.append(last.numpy())
        return Judgement(nats, tokens, np.stack(features))
