"""A server's counters since its start."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Counts(BaseModel):
    """Counters. Fields of a newer server are preserved."""

    model_config = ConfigDict(extra="allow", frozen=True)


class CacheStats(_Counts):
    """One cache's size and use."""

    entries: int
    bytes: int
    held_bytes: int
    """The part of `bytes` that running requests use."""
    budget: int
    """The limit of `bytes`."""
    hits: int
    misses: int
    evictions: int
    waits: int
    """Number of values that had to wait for space."""


class LoopStats(_Counts):
    """The denoise loop's counters."""

    requests: int
    """Number of accepted requests."""
    images: int
    """Number of finished images."""
    failed: int
    """Number of requests that ended without images."""
    steps: int
    """Number of steps; images in one batch share a step."""
    rows: int
    """Number of model rows over all steps: one for an image, two for a guided image."""
    mixed_steps: int
    """Number of steps in which images with different adapters shared the batch."""
    failed_steps: int
    """Number of steps that raised an error and were repeated image by image."""
    out_of_memory: int
    """Number of steps that ran out of memory and were repeated in smaller batches."""
    batch_sizes: dict[int, int]
    """Images in a step → number of such steps."""
    step_seconds: float


class Stats(LoopStats):
    """The whole server's counters, returned by `Client.stats()`."""

    open_requests: int
    """Number of requests that wait or run."""
    base: str
    """The base of requests that name none."""
    bases: list[str]
    host_cache: CacheStats
    device_cache: CacheStats
    weights_cache: CacheStats
    alive: bool
    """False after one of the server's threads has died."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON, with the keys of `batch_sizes` as strings."""
        return self.model_dump(mode="json")
