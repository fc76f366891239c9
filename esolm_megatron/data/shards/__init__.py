"""Shards: their format, written and read; remote ones kept on a local disk; what a checkpoint remembers of them."""

from typing import TYPE_CHECKING

from esolm_megatron.lazy import hand_on

if TYPE_CHECKING:
    from esolm_megatron.data.shards.format import Manifest, ShardCorrupt, ShardEntry, ShardMissing, ShardReader
else:
    __getattr__ = hand_on(__name__, format="Manifest ShardCorrupt ShardEntry ShardMissing ShardReader")
