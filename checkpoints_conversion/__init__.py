"""Converts checkpoints: training runs, the inference format, reference checkpoints."""
