"""Exported models for `transformers`: importing this registers them, so that Auto classes need no remote code.

The files beside this one are also copied into every export, for those who have not installed this package.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from esolm_megatron.huggingface.configuration_esolm import EsoLMConfig
from esolm_megatron.huggingface.modeling_esolm import EsoLMForMaskedLM

__all__ = ["EsoLMConfig", "EsoLMForMaskedLM"]

AutoConfig.register(EsoLMConfig.model_type, EsoLMConfig, exist_ok=True)
for kind in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
    kind.register(EsoLMConfig, EsoLMForMaskedLM, exist_ok=True)
