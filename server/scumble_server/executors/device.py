"""Device resources that let a step run without allocations: fixed buffers, captured CUDA graphs, concurrent uploads.

A CUDA graph replays kernels with the addresses that they were captured with. So inputs are copied into buffers whose
addresses do not change, and a graph's key is (context, profile, shapes, addresses). A tensor that has not changed since
the last step is not copied again.

On a CPU nothing is captured and nothing overlaps, but the same code runs, so tests can check it.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from scumble.errors import OutOfMemory
from scumble_build.graphs.tensors import has_parts, parts_of, tensors_of, with_tensors

Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]
ALIGNMENT = 256
"""Alignment in bytes that TensorRT and CUDA require."""


class Buffers:
    """Device memory by name. `take` returns a view of a buffer's beginning, always at the same address. A buffer is
    reallocated only if a larger size is requested than ever before. Owned by one thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[str, Tensor] = {}
        self._filled: dict[str, weakref.ref[Tensor]] = {}
        self.allocations = 0
        """Number of allocations so far; a step with the shapes of the last one makes none."""

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for held in self._held.values())

    def reserve(self, name: str, nbytes: int) -> bool:
        """Make the buffer at least `nbytes` large; return whether its address changed.

        Raises OutOfMemory; the old buffer is then gone.
        """
        if name in self._held and self._held[name].nbytes >= nbytes:
            return False
        self._held.pop(name, None)  # first, so that old and new need not both fit
        self._filled.pop(name, None)
        with faults(f"{nbytes} bytes for {name}"):
            self.allocations += 1
            self._held[name] = aligned(-(-nbytes // ALIGNMENT) * ALIGNMENT, self._device)
        return True

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a view of this shape, uninitialised."""
        nbytes = prod(shape) * dtype.itemsize
        self.reserve(name, nbytes)
        return self._held[name][:nbytes].view(dtype).view(shape)

    def fill(self, name: str, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Copy `values` into the buffer and return a view of it. The same tensor is not copied twice, so it must not
        change.

        A `torch.nn.Buffer`, such as a pool's pages, is not copied but returned.
        """
        if isinstance(values, torch.nn.Buffer) and values.dtype == (dtype or values.dtype):
            return values
        view = self.take(name, tuple(values.shape), dtype or values.dtype)
        known = self._filled.get(name)
        if known is None or known() is not values:
            view.copy_(values, non_blocking=True)
            self._filled[name] = weakref.ref(values)
        return view

    def forget(self) -> None:
        """Free all buffers."""
        self._held.clear()
        self._filled.clear()


def aligned(nbytes: int, device: torch.device) -> Tensor:
    """Allocate `nbytes` at an address aligned for TensorRT and CUDA, uninitialised."""
    memory = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + nbytes]


class Graphs:
    """Captured work by key, at most `most` entries, least recently used dropped first. One thread calls `run`; any may
    call `drop`.
    """

    def __init__(self, capture: Capture, most: int = 64) -> None:
        self._capture, self._most = capture, most
        self._known: OrderedDict[Hashable, Replay] = OrderedDict()
        self._lock = threading.RLock()  # reentrant: finalizers call `drop`, perhaps in this thread
        self.captured = 0
        """Number of captures so far. It should not grow from step to step."""

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Run `work`, captured on the first call with this key. It must read and write only the
        addresses of the key.
        """
        with self._lock:
            replay = self._known.pop(key, None)
        if replay is None:
            replay = self._capture(work)
            self.captured += 1
        with self._lock:
            self._known[key] = replay
            while len(self._known) > self._most:
                self._known.popitem(last=False)
        replay()

    def forget(self) -> None:
        with self._lock:
            self._known.clear()

    def drop(self, owner: object) -> None:
        """Drop the graphs whose key begins with `owner`, as its memory is gone. Any thread may call it."""
        with self._lock:
            for key in list(self._known):
                if isinstance(key, tuple) and key and key[0] is owner:
                    self._known.pop(key, None)

    def keys(self) -> AbstractSet[Hashable]:
        with self._lock:
            return set(self._known)


def uncaptured(work: Callable[[], None]) -> Replay:
    """Return the work itself, on devices without graphs."""
    return work


class CudaCapture:
    """Captures CUDA graphs with torch. They share one memory pool, because they never run concurrently."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Replay:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()  # warm-up: libraries choose kernels and allocate workspaces
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph.replay


def capture_on(device: torch.device) -> Capture:
    return CudaCapture() if device.type == "cuda" else uncaptured


class Uploads:
    """Uploads tensors from pinned host memory, on a stream of its own beside the one that steps run on.

    Owned by one thread. Another thread reads what was sent, so `send` returns after it has arrived.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, *tensors: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Return the tensors on the device; those that are there already are not copied. Raises OutOfMemory."""
        with faults(f"{sum(tensor.nbytes for tensor in tensors)} bytes to upload"):
            if self._stream is None:
                return tuple(tensor.to(self._device, dtype or tensor.dtype) for tensor in tensors)
            with self._beside_steps():
                return tuple(self._start(tensor, dtype or tensor.dtype) for tensor in tensors)

    def write(self, into: Sequence[Tensor], values: Sequence[Tensor], rows: Sequence[int]) -> None:
        """Write values[i] (n, …) to n rows of into[i] (N, …), which no step reads yet. Raises OutOfMemory."""
        sent = [self.send(source, dtype=target.dtype)[0] for source, target in zip(values, into, strict=True)]
        index = torch.tensor(rows, device=self._device)
        with self._beside_steps():
            for target, source in zip(into, sent, strict=True):
                target.index_copy_(0, index, source)

    @contextmanager
    def _beside_steps(self) -> Iterator[None]:
        """Run the block on the upload stream, and wait for the stream at its end."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()  # this thread waits, the step does not

    def after_steps(self) -> None:
        """Wait for the steps so far, so that later uploads may reuse their memory."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).synchronize()

    def _start(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if tensor.device == self._device:
            return tensor.to(dtype)
        return tensor.to(dtype).pin_memory().to(self._device, non_blocking=True)


@cache
def uploads(device: str) -> Uploads:
    """Return the uploads of the conditioning thread, the only one that sends."""
    return Uploads(torch.device(device))


@contextmanager
def faults(what: str) -> Iterator[None]:
    """Turn torch's out-of-memory errors into OutOfMemory, after freeing torch's unused memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        message = f"device memory ran out ({what}): {str(error).splitlines()[0]}"
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        message = f"memory ran out ({what}): {str(error).splitlines()[0]}"
    else:
        return
    # After the except block, because it keeps the failed call's frames, and the tensors in them, alive.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise OutOfMemory(f"{message}; use a smaller picture, fewer images or fewer adapters")


def structure(record: object) -> Hashable:
    """Return everything of a record except its tensors' values. Records of equal structure can share a
    captured graph.
    """
    if isinstance(record, Tensor):
        return tuple(record.shape), record.dtype
    if has_parts(record):
        return type(record), tuple((name, structure(value)) for name, value in parts_of(record))
    return record if isinstance(record, Hashable) else id(record)


@dataclass(frozen=True, slots=True)
class Stepping:
    """Buffers and graphs that all executors of a device share, because one thread, the loop's, runs their steps in
    turn.
    """

    buffers: Buffers
    graphs: Graphs

    @classmethod
    def on(cls, device: torch.device) -> Stepping:
        return cls(Buffers(device), Graphs(capture_on(device)))


class Captured:
    """A function of a record of tensors, captured once per structure and then replayed. Owned by one thread."""

    def __init__(self, stepping: Stepping, compute: Callable[[Any], Tensor]) -> None:
        self._buffers, self._graphs, self._compute = stepping.buffers, stepping.graphs, compute
        self._results: dict[Hashable, Tensor] = {}  # the output of each graph
        self._owner = object()
        weakref.finalize(self, self._graphs.drop, self._owner)

    def __call__(self, record: object) -> Tensor:
        """Run the function. The result is overwritten by the next call."""
        fixed = {path: self._buffers.fill(path, tensor) for path, tensor in tensors_of(record)}
        key = self._owner, structure(record), tuple(tensor.data_ptr() for tensor in fixed.values())
        held, compute, results = with_tensors(record, fixed), self._compute, self._results

        def work() -> None:
            results[key] = compute(held)

        self._graphs.run(key, work)
        for gone in results.keys() - self._graphs.keys():
            del results[gone]
        return results[key]
