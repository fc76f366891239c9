"""Tokens: tokenizers, the shard format, preparation of text, and batches from any step."""
