"""Chooses how the torch executor adds linear layers' factors: with the fused kernel, or with batched products.

The kernel is written in the Triton language, whose package comes along with torch's CUDA wheels. Where the package is
missing, or the first use fails, batched products do the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from scumble.errors import Unavailable
from scumble_build.graphs.adapted import PagesOfLayer
from scumble_server.executors.cuda import is_lost, ran_out_of_memory

log = logging.getLogger(__name__)


class FusedKernel:
    """Adds factors with the fused kernel, until that fails once. Any thread may call it."""

    def __init__(self, add: Callable[[Tensor, Tensor, PagesOfLayer], None]) -> None:
        self._add = add
        self.works = True

    def __call__(self, x: Tensor, y: Tensor, read: PagesOfLayer) -> bool:
        if not self.works:
            return False
        try:
            self._add(x, y, read)
        except Exception as error:  # the compiler's and the driver's are of many classes
            if ran_out_of_memory(error) or is_lost(error, x.device):
                raise
            self.works = False
            log.warning("LoRAs are added without the fused kernel from now on, because it failed: %s", error)
            return False
        return True


def choose_kernel(device: torch.device, *, asked: bool | None = None) -> FusedKernel | None:
    """Return the kernel, or None for batched products. `asked` None: the kernel on CUDA, if `triton` is installed.

    Raises Unavailable if it is asked for and cannot run here.
    """
    if asked is False:
        return None
    try:
        return FusedKernel(_load(device))
    except Unavailable as error:
        if asked:
            raise
        if device.type == "cuda":
            log.warning("LoRAs are added by batched products: %s", error)
        return None


def _load(device: torch.device) -> Callable[[Tensor, Tensor, PagesOfLayer], None]:
    """Import the kernel. Raises Unavailable if it cannot run here."""
    problem = "the fused kernel for LoRAs needs {}; leave --fused-lora out"
    if device.type != "cuda":
        raise Unavailable(problem.format("--device cuda"))
    try:
        from scumble_server.executors.torch.paged_lora import add_paged
    except Exception as error:  # a broken installation raises anything
        raise Unavailable(
            problem.format(f"the package `triton`, which comes along with torch's CUDA wheels ({error})")
        ) from error
    return add_paged
