"""The only room that knows megatron-core and DeepSpeed."""
