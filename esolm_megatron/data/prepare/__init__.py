"""From text to shards: documents found and cut, tokenized by worker processes, packed into blocks."""

from typing import TYPE_CHECKING

from esolm_megatron.lazy import hand_on

if TYPE_CHECKING:
    from esolm_megatron.data.prepare.preparation import prepare
    from esolm_megatron.data.prepare.prepare_config import PrepareConfig, load_prepare_config
else:
    __getattr__ = hand_on(__name__, preparation="prepare", prepare_config="PrepareConfig load_prepare_config")
