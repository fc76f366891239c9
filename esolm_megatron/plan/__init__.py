"""What a run will cost before it starts: memory, time, failures, and which layout is the fastest that fits. No torch."""

from typing import TYPE_CHECKING

from esolm_megatron.lazy import hand_on

if TYPE_CHECKING:
    from esolm_megatron.plan.cost import Plan, plan
    from esolm_megatron.plan.devices import DEVICES, Fabric
    from esolm_megatron.plan.memory import GIB, channels_per_token, micro_batches_in_flight, packed_tokens
    from esolm_megatron.plan.search import fastest_layouts, write_recipe
else:
    __getattr__ = hand_on(
        __name__,
        cost="Plan plan",
        devices="DEVICES Fabric",
        memory="GIB channels_per_token micro_batches_in_flight packed_tokens",
        search="fastest_layouts write_recipe",
    )
