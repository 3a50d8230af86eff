"""Several processes train one model: each computes its share of the batch, gradients are averaged.

On a processor shared with other programs two processes of one thread each do nearly twice the work of one
process with two threads, because they wait for each other once a step and not at every layer.
`torchrun` starts them and sets the environment that `join_workers` reads.
"""

from __future__ import annotations

import os

import torch
from torch import distributed, nn


def join_workers() -> None:
    """Meets the other processes that `torchrun` started; alone, does nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def rank() -> int:
    """This process's number; 0 writes files and speaks."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def average_gradients(module: nn.Module) -> None:
    """Replaces every gradient by its mean over the processes, in one message."""
    if count() == 1:
        return
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= count()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view(gradient.shape))
