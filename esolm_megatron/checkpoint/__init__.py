"""Checkpoints: folders that say what they hold, the boxes of tensors in them, and safetensors files."""

from esolm_megatron.checkpoint.folder import Checkpoint, CheckpointError, Piece, complete_steps, newest, step_folder
