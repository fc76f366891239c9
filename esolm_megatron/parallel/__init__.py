"""The only room that knows megatron-core and DeepSpeed.

They are imported here first: they read the environment when they are, and warn many times of what is not installed, which
`esolm doctor` says once, with what it costs.
"""

import os
import warnings

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # megatron-core overlaps communication by launch order

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    import megatron.core.models.backends
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel.schedules
    import megatron.core.transformer.transformer_config

warnings.filterwarnings("ignore", message="full scope is deprecated", category=UserWarning)
warnings.filterwarnings("ignore", message=".*is deprecated. Please use .torch.distributed", category=FutureWarning)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # 20 s of compilation at the first start, for nothing
