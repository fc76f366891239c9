"""Batches of any step: sources mixed by exact quotas, read in an order by arithmetic, some of them ahead."""

from typing import TYPE_CHECKING

from esolm_megatron.lazy import hand_on

if TYPE_CHECKING:
    from esolm_megatron.data.stream.batch import Batch
    from esolm_megatron.data.stream.token_stream import TokenStream, ValidationSet
else:
    __getattr__ = hand_on(__name__, batch="Batch", token_stream="TokenStream ValidationSet")
