"""The network as a model of `transformers`: the same code and the same parameter names, rows instead of packed tokens."""

from __future__ import annotations

import importlib
from collections import defaultdict
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from esolm_megatron.huggingface.configuration_esolm import EsoLMConfig
from esolm_megatron.model.attention import PackedAttention, PackedLayout
from esolm_megatron.model.layers import PlainLinears
from esolm_megatron.model.transformer import EsoLM

SAMPLING = ("alpha_0", "steps", "schedule", "order", "top_p", "top_k", "temperature", "repetition_penalty")
_ELSEWHERE = ("max_new_tokens", "max_length", "do_sample", "num_return_sequences", "eos_token_id", "pad_token_id", "mask_token_id",
              "bos_token_id", "use_cache", "seed", "transformers_version")  # fmt: skip


class EsoLMForMaskedLM(PreTrainedModel, GenerationMixin):
    """Logits of masked and clean tokens, in one pass without a cache; `generate` is esolm-megatron's sampler, with one."""

    config_class = EsoLMConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True

    def __init__(self, config: EsoLMConfig):
        super().__init__(config)
        linears = PlainLinears(torch.get_default_dtype(), torch.get_default_device())
        network = EsoLM(config, linears)
        for name, child in network.named_children():
            self.add_module(name, child)
        object.__setattr__(self, "_network", network)  # no submodule: parameters keep the names of the network
        self.gradient_checkpointing = False
        self._kept_samplers: list[Any] = []
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=self.config.init_std)
            elif parameter is getattr(module, "bias", None):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embedding

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: object, **options: object) -> nn.Module:
        """The embedding as it is.

        Raises:
            ValueError: another size than that of the vocabulary, whose last id is the mask.
        """
        if new_num_tokens not in (None, self.config.vocab):
            raise ValueError(
                f"new_num_tokens = {new_num_tokens}: the vocabulary has {self.config.vocab} ids, of which the last is the mask and "
                "must stay so; train with a tokenizer that has the new tokens"
            )
        return self.embedding

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Token ids (B * num_return_sequences, P + max_new_tokens): `input_ids` (B, P) and what follows; pad after the end.

        Ids of the mask within `input_ids` are holes, and are filled as well. attention_mask: (B, P), 0 on padding, on either side.
        options: those of transformers' generation that this sampler has (max_new_tokens, max_length, do_sample,
        temperature, top_k, top_p, repetition_penalty, num_return_sequences, eos_token_id, pad_token_id), and its own: alpha_0,
        steps, schedule, order, seed; by default one drawn from torch's generator. Without do_sample, the likeliest tokens.

        Raises:
            ImportError: esolm-megatron, which has the sampler, is not installed.
            ValueError: an option that the sampler does not have, or a value out of its range.
        """
        try:
            sampling = importlib.import_module("esolm_megatron.inference")  # not copied into exports
        except ImportError as error:
            raise ImportError(
                "generate: the sampler is in the package esolm-megatron; pip install esolm-megatron"
            ) from error
        asked = deepcopy(generation_config or self.generation_config).to_diff_dict() | options
        asked = {name: value for name, value in asked.items() if value is not None}
        plain = GenerationConfig().to_dict()
        for name, value in asked.items():
            known = name in (*SAMPLING, *_ELSEWHERE) or name.startswith("_")
            if not known and value != plain.get(name) and value is not False:
                raise ValueError(f"generate: {name} = {value!r}: this sampler has no such option; leave it out")
        ids = torch.empty(1, 0, dtype=torch.int64) if input_ids is None else input_ids.cpu()
        keep = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu()
        new = asked.get("max_new_tokens") or max(asked.get("max_length", 20) - ids.shape[1], 0)
        if not new and not (ids == self.config.mask_id).any():
            raise ValueError(f"generate: max_new_tokens = {new}: there is no token to make")
        ends = asked.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        count, pad = asked.get("num_return_sequences", 1), asked.get("pad_token_id", ends[0] if ends else 0)
        fields = {name: asked[name] for name in SAMPLING if name in asked} | {
            "stop_id": ends[0] if len(ends) == 1 else None
        }
        fields["temperature"] = fields.get("temperature", 1.0) if asked.get("do_sample") else 0.0
        fields["seed"] = int(asked["seed"]) if "seed" in asked else int(torch.randint(2**31, ()))
        model = sampling.PretrainedEsoLM(self._network, fields.pop("alpha_0", self.config.alpha_0))
        model.kept = self._kept_samplers
        out = torch.full((len(ids) * count, ids.shape[1] + new), pad)
        out[:, : ids.shape[1]] = ids.repeat_interleave(count, 0)
        alike = defaultdict(list)  # rows whose given tokens stand at the same places are sampled together
        for row, kept in enumerate(keep.bool()):
            alike[tuple((ids[row, kept] != self.config.mask_id).tolist())].append(row)
        first = 0  # rows' ids name their random numbers
        for given, rows in alike.items():
            texts = torch.stack([ids[row, keep[row].bool()] for row in rows])
            at = torch.tensor([place for place, known in enumerate(given) if known], dtype=torch.int64)
            prompt = texts[:, at].repeat_interleave(count, 0)
            made = model.sample(
                len(prompt), len(given) + new, prompt=prompt, prompt_positions=at, first_row=first, **fields
            )[0].cpu().clone()  # fmt: skip
            first += len(prompt)
            drawn = torch.ones(made.shape[1], dtype=torch.bool)
            drawn[at] = False
            ended = (torch.isin(made, torch.tensor(ends)) & drawn).int().cumsum(1)
            made[(ended - torch.isin(made, torch.tensor(ends)).int() * drawn) > 0] = pad
            for place, row in enumerate(row * count + n for row in rows for n in range(count)):
                out[row, torch.cat([keep[row // count].bool(), torch.ones(new, dtype=torch.bool)])] = made[place]
        return out.to(self.device)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        order: Tensor | None = None,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **_: object,
    ) -> MaskedLMOutput:
        """Logits (B, L, V) in the order of `input_ids`, with minus infinity for the mask token.

        input_ids: (B, L), places to predict hold `config.mask_id`. order: (B, L), order[b, k] is the place that is generated
        k-th; a token sees those up to it in the order. By default the clean tokens come first, then the masks, both from
        left to right, and last what `attention_mask` leaves out. positions: (B, L), 0 to L - 1 by default.
        labels: (B, L), -100 where there is no loss; the loss is the mean over the others. num_items_in_batch: what the sum
        is divided by instead, so that micro-batches of a step add up to its mean (transformers' Trainer passes it).
        """
        batch, length = input_ids.shape
        if order is None:
            late = (input_ids == self.config.mask_id).long()
            if attention_mask is not None:
                late = late + 2 * (attention_mask == 0).long()
            order = late.argsort(dim=1, stable=True)
        places = order if positions is None else positions.gather(1, order)
        attend = PackedAttention(PackedLayout(length, batch))
        self._network.recompute_blocks = self.gradient_checkpointing and self.training
        logits = self._network(input_ids.gather(1, order).flatten(), places.flatten(), attend).view(batch, length, -1)
        logits = logits.gather(1, order.argsort(dim=1)[..., None].expand_as(logits))
        loss = None
        if labels is not None:
            how = "mean" if num_items_in_batch is None else "sum"
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction=how)
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        return MaskedLMOutput(loss=loss, logits=logits)
