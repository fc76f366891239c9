"""`esolm_megatron.sample.Sampler` and `sample`, under the name that users were given before they moved to `inference`."""

from esolm_megatron.inference.sampler import Sampler, sample  # noqa: F401
