"""Pools of rank pages in memory (`scumble_build.graphs.layout`), and the pages of each set of LoRAs.

A pool holds the pages of every resident set of LoRAs, so a batch with different sets is a table of page numbers:
nothing is copied when rows join or leave, and a set takes the memory of its own rank, whatever the rank of others.
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
from scumble_server.executors.cuda import settle
from scumble_server.executors.device import Uploads, aligned, faults

_FIRST = 8
"""Initial number of pages of a pool that grows, on a CPU."""
_FIRST_SHARE = 2
"""On a GPU it starts with the pages that the budget divided by this holds."""


class Paged(Protocol):
    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """A (P, PAGE·Σin) and B (P, PAGE·Σout)."""


@dataclass(frozen=True, slots=True, eq=False)
class PageSet:
    """The pages of a set of LoRAs, in the order of its rank columns, and the tensors that hold them."""

    holder: Paged
    pages: tuple[int, ...]

    @classmethod
    def own(cls, A: Tensor, B: Tensor) -> PageSet:
        """Make a set of all pages of tensors that hold nothing else."""
        return cls(_Own((A, B)), tuple(range(len(A))))


@dataclass(frozen=True, slots=True, eq=False)
class _Own:
    tensors: tuple[Tensor, Tensor]


class Pool:
    """Pages of one width, on one device, in one dtype. Page 0 is zeros and belongs to no set: rows whose set has fewer
    pages than the batch's largest read it.

    A pool for engines takes all its pages at once, so that their axis `resident` never changes, nor the CUDA graphs.
    Another only grows, by half or more. Its pages are then copied to new tensors; batches that were stacked before keep
    the old ones, and CUDA graphs that read them are of no more use. The conditioning thread calls `put`, any thread the
    rest.
    """

    def __init__(
        self, extent: Extent, device: torch.device, dtype: torch.dtype, most: int | None = None, first: int = _FIRST
    ) -> None:
        """Make an empty pool of `most` pages, the number that the graphs accept, or of `first` pages that grows (None).

        Raises OutOfMemory.
        """
        self._widths = PAGE * extent.total_in, PAGE * extent.total_out
        self._device, self._dtype, self._most = device, dtype, most
        self._uploads = Uploads(device)
        self._lock = threading.Lock()
        self._tensors = self._make(first if most is None else most)
        self._free = list(range(len(self._tensors[0]) - 1, 0, -1))

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The current tensors. Graphs read them in place (`Buffers.fill`)."""
        return self._tensors

    @property
    def free(self) -> int:
        return len(self._free)

    def put(self, A: Tensor, B: Tensor) -> PageSet:
        """Copy A (n, PAGE·Σin) and B (n, PAGE·Σout), from any device, to free pages. Raises OutOfMemory, Refused."""
        with self._lock:
            if len(self._free) < len(A):
                self._grow(len(A) - len(self._free))
            pages = tuple(self._free.pop() for _ in range(len(A)))
            tensors = self._tensors
        page_set = PageSet(self, pages)
        try:
            self._uploads.write(tensors, (A, B), pages)
        except BaseException:
            self.drop(page_set)
            raise
        return page_set

    def drop(self, page_set: PageSet) -> None:
        """Free a set's pages, which no step reads any more."""
        with self._lock:
            self._free.extend(page_set.pages)

    def _grow(self, needed: int) -> None:
        old, count = self._tensors, len(self._tensors[0])
        if self._most is not None:
            raise Refused(
                f"the LoRAs in memory need more than the {self._most} rank pages that the engines were built for; "
                "serve with a smaller --device-cache, or build with a wider --profile"
            )
        new = self._make(count + max(needed, count // 2))
        for target, source in zip(new, old, strict=True):
            target[:count] = source
        settle(self._device)  # the loop may read the new ones at once
        self._tensors = new
        self._free.extend(range(len(new[0]) - 1, count - 1, -1))

    def _make(self, count: int) -> tuple[Tensor, Tensor]:
        # Whoever asks for the pool first: a tensor made in inference mode is not to be written outside it.
        with faults(f"{count} rank pages"), torch.inference_mode(mode=False):
            A, B = (
                aligned(count * width * self._dtype.itemsize, self._device).view(self._dtype).view(count, width)
                for width in self._widths
            )
        A[0] = B[0] = 0
        return torch.nn.Buffer(A, persistent=False), torch.nn.Buffer(B, persistent=False)


class Pools:
    """A pool for each width, device and dtype: bases with the same structure, and their checkpoints, share one. Any
    thread may call it.
    """

    def __init__(self, budget_bytes: int | None = None) -> None:
        """`budget_bytes` is what the sets in all pools may take: no pool for engines is larger, and none on a GPU much
        smaller (None: pools start small).
        """
        self._budget = budget_bytes
        self._lock = threading.Lock()
        self._pools: dict[tuple[Extent, torch.device, torch.dtype, int | None], Pool] = {}

    def of(self, extent: Extent, device: torch.device, dtype: torch.dtype, most: int | None = None) -> Pool:
        """Return the pool; its first caller makes it. `most` is the number of pages that the graphs accept.

        Raises OutOfMemory.
        """
        key = extent, device, dtype, most
        with self._lock:
            if key not in self._pools:
                self._pools[key] = self._make(*key)
            return self._pools[key]

    def _make(self, extent: Extent, device: torch.device, dtype: torch.dtype, most: int | None) -> Pool:
        first = _FIRST
        if self._budget is not None:
            fitting = self._budget // page_bytes(extent, dtype)  # and page 0, which is no set's
            most = min(most, 1 + fitting) if most is not None else None
            first = max(_FIRST, 1 + fitting // _FIRST_SHARE) if device.type == "cuda" else _FIRST
        return Pool(extent, device, dtype, most, first)


def page_bytes(extent: Extent, dtype: torch.dtype) -> int:
    """Return the size of a page."""
    return PAGE * (extent.total_in + extent.total_out) * dtype.itemsize


def table(sets: Sequence[PageSet | None], width: int) -> Tensor:
    """Return the pages of each set, then zeros: `(sets, width)` int64."""
    rows = [page_set.pages if page_set is not None else () for page_set in sets]
    return torch.tensor([[*pages, *(0,) * (width - len(pages))] for pages in rows], dtype=torch.int64)
