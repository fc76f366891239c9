"""A trained model on one device: loaded, sampled from with a KV cache, asked for likelihoods, and served."""

from typing import TYPE_CHECKING

from esolm_megatron.lazy import hand_on

if TYPE_CHECKING:
    from esolm_megatron.inference.loaded_model import PretrainedEsoLM, load_pretrained, parse_infill
    from esolm_megatron.inference.request import SampleRequest
    from esolm_megatron.inference.sampler import Sampler, Samples, loss_of_cache, sample
else:
    __getattr__ = hand_on(
        __name__,
        loaded_model="PretrainedEsoLM load_pretrained parse_infill",
        request="SampleRequest",
        sampler="Sampler Samples loss_of_cache sample",
    )
