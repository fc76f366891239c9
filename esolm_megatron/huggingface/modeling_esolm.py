"""The network as a model of `transformers`: the same code and the same parameter names, rows instead of packed tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from esolm_megatron.huggingface.configuration_esolm import EsoLMConfig
from esolm_megatron.model.attention import PackedAttention, PackedLayout
from esolm_megatron.model.layers import PlainLinears
from esolm_megatron.model.transformer import EsoLM


class EsoLMForMaskedLM(PreTrainedModel):
    """Logits of masked and clean tokens, in one pass without a cache. esolm-megatron samples, with one."""

    config_class = EsoLMConfig
    base_model_prefix = ""

    def __init__(self, config: EsoLMConfig):
        super().__init__(config)
        linears = PlainLinears(torch.get_default_dtype(), torch.get_default_device())
        network = EsoLM(config, linears)
        for name, child in network.named_children():
            self.add_module(name, child)
        object.__setattr__(self, "_network", network)  # no submodule: parameters keep the names of the network
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
        logits = self._network(input_ids.gather(1, order).flatten(), places.flatten(), attend).view(batch, length, -1)
        logits = logits.gather(1, order.argsort(dim=1)[..., None].expand_as(logits))
        loss = None
        if labels is not None:
            how = "mean" if num_items_in_batch is None else "sum"
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction=how)
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        return MaskedLMOutput(loss=loss, logits=logits)
