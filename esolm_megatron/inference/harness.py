"""A model for EleutherAI's lm-evaluation-harness, under the name `esolm`.

The harness has no entry point for models: whoever imports this module has registered it, as `esolm lm-eval` does.
https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/model_guide.md
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from esolm_megatron.config import ConfigError
from esolm_megatron.data.tokenizer import TokenizerError
from esolm_megatron.inference.loaded_model import load_pretrained
from esolm_megatron.objective.esolm import draw_orders
from esolm_megatron.objective.likelihood import importance_weighted, ordered_batch

Pair = tuple[list[int], list[int]]
"""Tokens that are given, at least one, and tokens that are scored."""
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "auto": torch.float32,
}


@register_model("esolm")
class EsoLMHarness(TemplateLM):
    """Exact log-likelihoods of continuations, prompt first, and texts by the sampler."""

    def __init__(
        self,
        pretrained: str,
        alpha_0: float | None = None,
        steps: int | None = None,
        orders: int = 0,
        batch_size: int | str = 8,
        device: str | None = None,
        dtype: str = "fp32",
        max_length: int | None = None,
        max_gen_toks: int = 64,
        seed: int = 0,
        max_batch_size: int | None = None,
    ):
        """As `--model_args` have it.

        pretrained: a folder of `esolm convert`. orders: 0 scores a continuation left to right, K by the mean probability of K
        orders that alpha_0 gives (random ones at 1), which bounds it from below. alpha_0, steps: of what is generated, and
        of those orders; the trained value, and one token a pass, by default. max_length: the trained length by default.

        Raises:
            ConfigError: a value out of its range. PretrainedError: no such folder.
        """
        super().__init__()
        if not int(orders) >= 0 or dtype not in DTYPES:
            raise ConfigError(f"orders = {orders}, dtype = {dtype!r}: orders from 0, and one of {', '.join(DTYPES)}")
        place = device or "cuda"
        if (
            place.startswith("cuda") and not torch.cuda.is_available()
        ):  # which is what the harness itself asks for by default
            logging.getLogger(__name__).warning("device = %s: torch sees no GPU here; the CPU is used", place)
            place = "cpu"
        self.model = load_pretrained(pretrained, DTYPES[dtype], place)
        self.alpha_0 = self.model.alpha_0 if alpha_0 is None else float(alpha_0)
        self.steps, self.orders, self.seed = steps, int(orders), int(seed)
        self.rows = 8 if batch_size == "auto" else int(batch_size)
        self.max_length, self.max_gen_toks = max_length or self.model.config.seq_length, int(max_gen_toks)

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, after which another document begins."""
        return self.model.tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
        """Ids without any that the text does not have."""
        return self.model.tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> Pair:
        """As `esolm score` cuts prompt and text, after the harness's rule for spaces between them."""
        bare = context.rstrip()
        text = context[len(bare) :] + continuation
        try:
            return self.model.tokenizer.encode_pair(bare, text)
        except TokenizerError:  # a token lies across: both are encoded for themselves
            return self.tok_encode(bare), self.model.tokenizer.encode_later(text)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **more: Any
    ) -> list[tuple[float, bool]]:
        found = self._scored([(given, text) for _, given, text in requests], disable_tqdm)
        for (key, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts: each token once, in windows of the model's length, after an end-of-text token."""
        windows, owners = list[Pair](), list[int]()
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, 1):
                windows.append(make_disjoint_window(window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (log_p, _) in zip(owners, self._scored(windows, disable_tqdm), strict=True):
            totals[owner] += log_p
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts after their contexts, up to the first of the strings in `until`, or end of text."""
        alike = defaultdict(list)  # with prompts of one length, drawn in one way
        for number, request in enumerate(requests):
            context, options = request.args
            count = int(options.get("max_gen_toks", self.max_gen_toks))
            if count >= self.max_length:
                raise ConfigError(f"max_gen_toks = {count}: the model's length is {self.max_length}; ask for fewer")
            ids = (self.tok_encode(context) or [self.prefix_token_id])[count - self.max_length :]
            asked = {name: options[name] for name in ("temperature", "top_p", "top_k") if name in options}
            if not options.get("do_sample", asked.get("temperature", 0) > 0):
                asked = {"temperature": 0.0}
            alike[len(ids), count, tuple(sorted(asked.items()))].append((number, ids))
        texts = [""] * len(requests)
        bar = tqdm(total=len(requests), desc="esolm generate_until", disable=disable_tqdm)
        for (width, count, draw), rows in alike.items():
            for part in _parts(rows, self.rows):
                made, _ = self.model.sample(
                    len(part), width + count, self.steps, alpha_0=self.alpha_0, prompt=torch.tensor([ids for _, ids in part]),
                    stop_id=self.eot_token_id, seed=self.seed, first_row=part[0][0], **dict(draw),
                )  # fmt: skip
                for (number, _), row in zip(part, made[:, width:].tolist(), strict=True):
                    ids = row[: row.index(self.eot_token_id)] if self.eot_token_id in row else row
                    texts[number] = _cut(
                        self.model.tokenizer.decode_later(ids), requests[number].args[1].get("until", ())
                    )
                bar.update(len(part))
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    @torch.inference_mode()
    def _scored(self, pairs: Sequence[Pair], disable_tqdm: bool) -> list[tuple[float, bool]]:
        """log p of the second given the first, and whether it is what drawing the likeliest from the left gives."""
        pairs = [(given[-max(self.max_length - len(text), 1) :], text) for given, text in pairs]
        for given, text in pairs:
            if len(given) + len(text) > self.max_length:
                raise ConfigError(f"a continuation has {len(text)} tokens: the model's length is {self.max_length}")
        order = sorted(range(len(pairs)), key=lambda n: -sum(map(len, pairs[n])))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        bar = tqdm(total=len(pairs), desc="esolm loglikelihood", disable=disable_tqdm)
        for part in _parts(order, self.rows):
            log_p, greedy = self._rows_scored([pairs[n] for n in part], part)
            for n, *answer in zip(part, log_p.tolist(), greedy, strict=True):
                found[n] = (answer[0], answer[1])
            bar.update(len(part))
        return found

    def _rows_scored(self, pairs: Sequence[Pair], numbers: Sequence[int]) -> tuple[Tensor, list[bool]]:
        """Of some pairs as rows of one length; padding comes last in every order, where nobody sees it."""
        length = max(len(given) + len(text) for given, text in pairs)
        tokens = np.full((len(pairs), length), self.eot_token_id)
        scored = np.zeros(tokens.shape, bool)
        for row, (given, text) in enumerate(pairs):
            tokens[row, : len(given) + len(text)] = given + text
            scored[row, len(given) : len(given) + len(text)] = True
        left_to_right = np.tile(np.arange(length), (len(pairs), 1))
        log_p, greedy = self._in_order(tokens, left_to_right, scored)
        if self.orders:
            each = [self._in_order(tokens, self._order(scored, numbers, k), scored)[0] for k in range(self.orders)]
            log_p = importance_weighted(torch.stack(each))
        return log_p, greedy

    def _order(self, scored: np.ndarray, numbers: Sequence[int], k: int) -> np.ndarray:
        """(B, L): what is given, the scored places as the model generates, padding."""
        drawn = draw_orders(
            scored, np.array(numbers), self.alpha_0, self.seed, "harness", k
        )  # what is not scored is last
        count = scored.sum(1)
        out = np.empty_like(drawn)
        for row, (places, n) in enumerate(zip(drawn, count, strict=True)):
            first = int(scored[row].argmax()) if n else len(places)
            out[row] = [*range(first), *places[:n], *range(first + n, len(places))]
        return out

    def _in_order(self, tokens: np.ndarray, order: np.ndarray, scored: np.ndarray) -> tuple[Tensor, list[bool]]:
        """log p (B,) fp64 of the scored tokens in this order, and whether each of them is the likeliest one."""
        network = self.model.model
        batch = ordered_batch(tokens, order, scored.astype(np.float64), network.shape.mask_id).to(self.model.device)
        logits = network(batch.tokens, batch.positions, batch.attend, places=batch.places, last=batch.last)
        own = logits.gather(1, batch.targets[:, None])[:, 0]
        sums = torch.zeros(len(tokens), dtype=torch.float64, device=own.device)
        sums.index_add_(0, batch.sources, (own - logits.logsumexp(1)).double())
        wrong = torch.zeros(len(tokens), dtype=torch.int64, device=own.device)
        wrong.index_add_(0, batch.sources, (logits.argmax(1) != batch.targets).long())
        return sums.cpu(), (wrong == 0).tolist()


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[at : at + size] for at in range(0, len(items), size))


def _cut(text: str, until: str | Sequence[str]) -> str:
    """The text before the first of these strings."""
    stops = [until] if isinstance(until, str) else until
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]
