"""A trained model on one device: loaded, sampled from with a KV cache, asked for likelihoods, and served."""

from esolm_megatron.inference.loaded_model import PretrainedEsoLM, load_pretrained, parse_infill
from esolm_megatron.inference.sampler import Sampler, Samples, sample
