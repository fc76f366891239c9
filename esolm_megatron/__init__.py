"""Esoteric Language Models: training on many devices, and KV-cached sampling on one."""

from typing import Any

from esolm_megatron.version import __version__

__all__ = ["__version__", "load_pretrained"]


def __getattr__(name: str) -> Any:
    """`load_pretrained`, imported when first used: configuration and planning must start without torch."""
    if name == "load_pretrained":
        from esolm_megatron.inference import load_pretrained

        return load_pretrained
    raise AttributeError(name)
