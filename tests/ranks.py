"""Runs a function on several real gloo processes.

A fork server imports torch, megatron-core, DeepSpeed and the trainer once; each rank is forked from it in a fraction of a
second, and no thread of the test process is ever forked.
"""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "esolm_megatron.train.trainer", "matplotlib.pyplot"])
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _child(function, rank, world_size, folder, args):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
        result = ("ok", function(*args))
        dist.barrier()
    except BaseException:
        result = ("error", traceback.format_exc())
    Path(folder, f"{rank}.new").write_bytes(pickle.dumps(result))
    os.rename(f"{folder}/{rank}.new", f"{folder}/{rank}.result")
    os._exit(0)  # gloo's threads outlive a failed rank


def run_ranks(function, world_size, *args, timeout=120):
    """What `function(*args)` returns on each of `world_size` processes; fails with the tracebacks of those that fail."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            CONTEXT.Process(target=_child, args=(function, rank, world_size, folder, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        for process in processes:
            if process.is_alive():
                process.kill()
        results = []
        for rank in range(world_size):
            path = Path(folder, f"{rank}.result")
            results.append(
                pickle.loads(path.read_bytes()) if path.exists() else ("error", "no answer: it hung or died")
            )
    failed = [f"rank {rank}:\n{text}" for rank, (status, text) in enumerate(results) if status == "error"]
    if failed:
        raise AssertionError("\n".join(failed))
    return [value for _, value in results]
