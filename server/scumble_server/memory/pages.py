"""Rank pages in memory (`scumble_build/layout.py`): who is bound where.

A pool holds the pages of every set of LoRAs that is resident, so that a batch of strangers is a table of page numbers:
nothing is copied when rows join or leave, and a set takes its own rank's worth of memory, whatever its neighbours take.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from scumble.errors import Refused
from scumble_build.graphs.layout import PAGE, Extent
from scumble_server.executors.device import Uploads, aligned, faults

_FIRST = 8
"""Pages that a pool begins with."""


class Paged(Protocol):
    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """A (P, PAGE·Σin) and B (P, PAGE·Σout)."""


@dataclass(frozen=True, slots=True, eq=False)
class PageSet:
    """A set's pages, in the order of its columns, and where they are."""

    holder: Paged
    pages: tuple[int, ...]

    @classmethod
    def own(cls, A: Tensor, B: Tensor) -> PageSet:
        """Of tensors that hold nothing else: all their pages."""
        return cls(_Own((A, B)), tuple(range(len(A))))


@dataclass(frozen=True, slots=True, eq=False)
class _Own:
    tensors: tuple[Tensor, Tensor]


class Pool:
    """Pages of one width, on one device, in one dtype. Page 0 is zeros and belongs to nobody: rows whose set is
    narrower than the batch's widest read it.

    What it holds only ever grows, by half at least: then the pages move, and whoever stacked the old ones keeps them.
    `put` is called by the thread that conditions, the rest by any.
    """

    def __init__(self, extent: Extent, device: torch.device, dtype: torch.dtype, most: int | None = None) -> None:
        """`most` pages, if the graphs that read them take no more."""
        self._widths = PAGE * extent.total_in, PAGE * extent.total_out
        self._device, self._dtype, self._most = device, dtype, most
        self._uploads = Uploads(device)
        self._lock = threading.Lock()
        self._tensors = self._make(min(_FIRST, most or _FIRST))
        self._free = list(range(len(self._tensors[0]) - 1, 0, -1))

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """As they are now. Graphs read them where they are (`Buffers.fill`)."""
        return self._tensors

    @property
    def free(self) -> int:
        return len(self._free)

    def put(self, A: Tensor, B: Tensor) -> PageSet:
        """A (n, PAGE·Σin) and B (n, PAGE·Σout), from wherever they are. Raises OutOfMemory, Refused."""
        with self._lock:
            if len(self._free) < len(A):
                self._grow(len(A) - len(self._free))
            pages = tuple(self._free.pop() for _ in range(len(A)))
            tensors = self._tensors
        held = PageSet(self, pages)
        try:
            self._uploads.write(tensors, (A, B), pages)
        except BaseException:
            self.drop(held)
            raise
        return held

    def drop(self, held: PageSet) -> None:
        """Nobody steps with them any more."""
        with self._lock:
            self._free.extend(held.pages)

    def _grow(self, needed: int) -> None:
        old, count = self._tensors, len(self._tensors[0])
        size = count + max(needed, count // 2)
        if self._most is not None and size > self._most:
            if count + needed > self._most:
                raise Refused(
                    f"the LoRAs in memory need more than the {self._most} rank pages that the engines were built for; "
                    "serve with a smaller --device-cache, or build with a wider --profile"
                )
            size = self._most
        new = self._make(size)
        for mine, theirs in zip(new, old, strict=True):
            mine[:count] = theirs
        self._uploads.after_steps()
        self._tensors = new
        self._free.extend(range(len(new[0]) - 1, count - 1, -1))

    def _make(self, count: int) -> tuple[Tensor, Tensor]:
        with faults(f"{count} rank pages"):
            A, B = (
                aligned(count * width * self._dtype.itemsize, self._device).view(self._dtype).view(count, width)
                for width in self._widths
            )
        A[0] = B[0] = 0
        return torch.nn.Buffer(A, persistent=False), torch.nn.Buffer(B, persistent=False)


class Pools:
    """One for each width, device and dtype that is asked for: bases of one kind, and their checkpoints, share one. Used
    by the thread that conditions.
    """

    def __init__(self) -> None:
        self._pools: dict[tuple[Extent, torch.device, torch.dtype, int | None], Pool] = {}

    def of(self, extent: Extent, device: torch.device, dtype: torch.dtype, most: int | None = None) -> Pool:
        key = extent, device, dtype, most
        if key not in self._pools:
            self._pools[key] = Pool(*key)
        return self._pools[key]


def table(sets: Sequence[PageSet | None], width: int) -> Tensor:
    """Of each set its pages, then zeros: `(sets, width)` int64."""
    rows = [each.pages if each is not None else () for each in sets]
    return torch.tensor([[*pages, *(0,) * (width - len(pages))] for pages in rows], dtype=torch.int64)
