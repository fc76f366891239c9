"""`esolm_megatron.score.score`, under the name that users were given before it moved to `inference`."""

from esolm_megatron.inference.scoring import score  # noqa: F401
