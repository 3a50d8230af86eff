"""What a device reaches in products, copies and uploads: the floors that arithmetic sets under a figure."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Rates:
    """Measured, not a data sheet's: operations, bytes read and written, bytes from pinned host memory, per second."""

    flops: float
    bytes: float
    uploaded_bytes: float

    @property
    def report(self) -> dict[str, float]:
        return asdict(self)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    side, count = (8192, 1 << 29) if device.type == "cuda" else (256, 1 << 20)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source, target = (torch.empty(count, dtype=torch.uint8, device=device) for _ in range(2))
    host = torch.empty(count, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return Rates(
        2 * side**3 / _seconds(device, lambda: torch.mm(a, b)),
        2 * count / _seconds(device, lambda: target.copy_(source)),
        count / _seconds(device, lambda: target.copy_(host)),
    )


def _seconds(device: torch.device, run: Callable[[], object], rounds: int = 10) -> float:
    """The least of a few: a floor is not to be above what can be reached."""
    least = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        least = min(least, time.perf_counter() - start)
    return least
