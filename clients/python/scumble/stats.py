"""What a server has done since it started."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Counts(BaseModel):
    """A newer server may count more."""

    model_config = ConfigDict(extra="allow", frozen=True)


class CacheStats(_Counts):
    """One cache: how much is in it now, and how often it was asked."""

    entries: int
    bytes: int
    held_bytes: int
    """Of `bytes`, what running requests use."""
    budget: int
    """Bytes."""
    hits: int
    misses: int
    evictions: int
    waits: int
    """Values that had to wait until others made space."""


class LoopStats(_Counts):
    """The denoise loop's counters."""

    requests: int
    """Accepted."""
    images: int
    """Finished."""
    failed: int
    """Requests that ended without a picture."""
    steps: int
    """Each for all images that share it."""
    rows: int
    """One for an image's step, two where it is guided."""
    mixed_steps: int
    """Steps in which images with different adapters shared the batch."""
    failed_steps: int
    """Steps that raised and were tried again image by image."""
    out_of_memory: int
    """Steps that were tried again in smaller parts."""
    batch_sizes: dict[int, int]
    """Images in a step → steps."""
    step_seconds: float


class Stats(LoopStats):
    """The whole server's, as `Client.stats()` gives them."""

    open_requests: int
    """That wait or run."""
    base: str
    """For requests that name none."""
    bases: list[str]
    host_cache: CacheStats
    device_cache: CacheStats
    weights_cache: CacheStats
    alive: bool
    """False once one of the server's threads has died."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, the keys of `batch_sizes` as texts."""
        return self.model_dump(mode="json")
