"""Settings that must be made before torch is imported."""

import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton kernels then run on CPU tensors
sys.path.insert(0, str(Path(__file__).parent))  # helpers beside this file
