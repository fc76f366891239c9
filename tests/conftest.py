"""Settings that must be made before torch is imported."""

import os
import shutil
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton kernels then run on CPU tensors
sys.path.insert(0, str(Path(__file__).parent))  # helpers beside this file


@pytest.fixture(autouse=True)
def _of_no_run(monkeypatch):
    """A lone process that joins a group keeps a rank in its environment, which libraries of a later test would believe."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
