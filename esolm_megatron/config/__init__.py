"""The configuration of a run: the tree of sections that one file fills, and which layouts of devices are legal."""

from typing import TYPE_CHECKING

from esolm_megatron.lazy import hand_on

if TYPE_CHECKING:
    from esolm_megatron.config.layouts import world_problems
    from esolm_megatron.config.section import Section
    from esolm_megatron.config.sections import DataConfig, is_remote
    from esolm_megatron.config.tree import Config, ModelConfig, ObjectiveConfig, check, dump, load, with_values
    from esolm_megatron.errors import ConfigError, UserError
else:
    __getattr__ = hand_on(
        __name__,
        layouts="world_problems",
        section="Section",
        sections="DataConfig is_remote",
        tree="Config ConfigError ModelConfig ObjectiveConfig UserError check dump load with_values",
    )
