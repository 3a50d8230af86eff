"""Data-parallel training: each process computes its share of the batch, gradients are averaged.

On a shared CPU, two processes of one thread are nearly twice as fast as one process with two threads, because they wait
for each other once per step and not at every layer.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

import torch
from torch import distributed, nn

# By default glibc returns large tensors to the kernel and faults them in again at each step, half of its time.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG in prctl(2)


def is_worker() -> bool:
    """Return whether `launch_workers` (or torchrun) started this process."""
    return "WORLD_SIZE" in os.environ


def launch_workers(number: int, module: str, arguments: Sequence[str]) -> None:
    """Replace this process by torchrun with `number` processes of `python -m module arguments`; does not return.

    It sets malloc's options for long runs on a CPU, which must be done before a process starts.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
    environment = {"OMP_NUM_THREADS": "1", **_KEEP_MEMORY, **os.environ}
    sys.stdout.flush()
    os.execve(sys.executable, [*torchrun, "-m", module, *arguments], environment)  # noqa: S606


def join_workers() -> None:
    """Join the other processes, if any. A worker ends when its starter is killed."""
    if not is_worker():
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM)
    if int(os.environ["WORLD_SIZE"]) > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def rank() -> int:
    """Return the rank of this process; rank 0 writes files and prints."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def wait_for_all() -> None:
    """Wait for all processes; afterwards all can read what rank 0 wrote."""
    if count() > 1:
        distributed.barrier()


def average_gradients(module: nn.Module) -> None:
    """Replace every gradient by its mean over the processes, in one message."""
    if count() == 1:
        return
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= count()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view(gradient.shape))
