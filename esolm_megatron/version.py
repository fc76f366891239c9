"""The version, which checkpoints and exports remember."""

__version__ = "0.1.0"
