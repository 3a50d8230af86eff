"""What a step needs of a device so that it allocates nothing: buffers that stay where they are, graphs captured once,
uploads beside it.

A CUDA graph replays kernels with the addresses that they were captured with. So inputs are copied into buffers whose
addresses never change, and a graph is known by what it runs, its profile, the shapes and the addresses: (context,
profile, shapes, addresses). What has not changed since the last step is not copied again.

On a CPU there is nothing to capture and nothing to overlap: the same code runs, and tests see its bookkeeping.
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
"""Bytes: what TensorRT and CUDA ask of an address."""


class Buffers:
    """Device memory by name. `take` gives a view of a buffer's beginning, always at the same address; only where more
    is asked of it than ever before is it made anew. Owned by one thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[str, Tensor] = {}
        self._filled: dict[str, weakref.ref[Tensor]] = {}
        self.allocations = 0
        """How often memory was asked for: a step like the one before asks for none."""

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for held in self._held.values())

    def reserve(self, name: str, nbytes: int) -> bool:
        """At least so many bytes. True if its address is new. Raises OutOfMemory; then the old one is gone."""
        if name in self._held and self._held[name].nbytes >= nbytes:
            return False
        self._held.pop(name, None)  # first, so that both need not fit
        self._filled.pop(name, None)
        with faults(f"{nbytes} bytes for {name}"):
            self.allocations += 1
            self._held[name] = aligned(-(-nbytes // ALIGNMENT) * ALIGNMENT, self._device)
        return True

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A view of that shape; whatever stands there."""
        nbytes = prod(shape) * dtype.itemsize
        self.reserve(name, nbytes)
        return self._held[name][:nbytes].view(dtype).view(shape)

    def fill(self, name: str, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A view that holds `values`, which nobody writes to: the same tensor again is not copied again.

        A `torch.nn.Buffer`, as a pool's pages are, stays where it is and is read there.
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
        """Give everything back."""
        self._held.clear()
        self._filled.clear()


def aligned(nbytes: int, device: torch.device) -> Tensor:
    """So many bytes that begin where TensorRT and CUDA want it; whatever stands there."""
    memory = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + nbytes]


class Graphs:
    """Captured work, by key; the least recently used goes when there are too many. One thread runs it; any may drop."""

    def __init__(self, capture: Capture, most: int = 64) -> None:
        self._capture, self._most = capture, most
        self._known: OrderedDict[Hashable, Replay] = OrderedDict()
        self._lock = threading.RLock()  # finalizers drop, and may begin while this thread holds it
        self.captured = 0
        """How many captures there were: a step that is captured over and over is no better than none."""

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do `work`, as it was captured under this key. It must read and write what the key says, and nothing else."""
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
        """Forget the graphs whose key begins with `owner`: what they read is gone. For any thread."""
        with self._lock:
            for key in list(self._known):
                if isinstance(key, tuple) and key and key[0] is owner:
                    self._known.pop(key, None)

    def keys(self) -> AbstractSet[Hashable]:
        with self._lock:
            return set(self._known)


def uncaptured(work: Callable[[], None]) -> Replay:
    """A capture where there are no graphs: the work itself."""
    return work


class CudaCapture:
    """Captures with torch. All graphs of one share a pool, because they never run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Replay:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()  # once before: libraries choose kernels and make their workspaces
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on using the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph.replay


def capture_on(device: torch.device) -> Capture:
    return CudaCapture() if device.type == "cuda" else uncaptured


class Uploads:
    """Tensors on their way from the host, out of pinned memory, on a stream beside the one that steps run on.

    For one thread; whoever reads what was sent is another, which is why `send` returns when it has arrived.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, *tensors: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """The same on the device; what is there already is not copied. Raises OutOfMemory."""
        with faults(f"{sum(tensor.nbytes for tensor in tensors)} bytes to upload"):
            if self._stream is None:
                return tuple(tensor.to(self._device, dtype or tensor.dtype) for tensor in tensors)
            with self._beside_steps():
                return tuple(self._start(tensor, dtype or tensor.dtype) for tensor in tensors)

    def write(self, into: Sequence[Tensor], values: Sequence[Tensor], rows: Sequence[int]) -> None:
        """values[i] (n, …) to those n rows of into[i] (N, …), which nobody reads yet. Raises OutOfMemory."""
        sent = [self.send(each, dtype=target.dtype)[0] for each, target in zip(values, into, strict=True)]
        index = torch.tensor(rows, device=self._device)
        with self._beside_steps():
            for target, each in zip(into, sent, strict=True):
                target.index_copy_(0, index, each)

    @contextmanager
    def _beside_steps(self) -> Iterator[None]:
        """On the stream beside; it has arrived behind the block."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()  # the sender waits, not the step

    def after_steps(self) -> None:
        """What is sent from now on comes behind the steps so far, whose memory it may be given."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).synchronize()

    def _start(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if tensor.device == self._device:
            return tensor.to(dtype)
        return tensor.to(dtype).pin_memory().to(self._device, non_blocking=True)


@cache
def uploads(device: str) -> Uploads:
    """Those of the one thread that sends: the one that conditions."""
    return Uploads(torch.device(device))


@contextmanager
def faults(what: str) -> Iterator[None]:
    """torch's errors as ours: OutOfMemory, after what torch holds without need is given back."""
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
    # Out here, where the failed call's frames, and the tensors in them, are gone.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise OutOfMemory(f"{message}; a smaller picture, fewer images or fewer adapters need less")


def structure(record: object) -> Hashable:
    """Everything of a record but its tensors' values. Records of equal structure can share a captured graph."""
    if isinstance(record, Tensor):
        return tuple(record.shape), record.dtype
    if has_parts(record):
        return type(record), tuple((name, structure(value)) for name, value in parts_of(record))
    return record if isinstance(record, Hashable) else id(record)


@dataclass(frozen=True, slots=True)
class Stepping:
    """What all executors of a device share, because one thread steps them one after the other: the loop's."""

    buffers: Buffers
    graphs: Graphs

    @classmethod
    def on(cls, device: torch.device) -> Stepping:
        return cls(Buffers(device), Graphs(capture_on(device)))


class Captured:
    """A function of a record of tensors, replayed as a graph for every structure that it has met. For one thread."""

    def __init__(self, stepping: Stepping, compute: Callable[[Any], Tensor]) -> None:
        self._buffers, self._graphs, self._compute = stepping.buffers, stepping.graphs, compute
        self._results: dict[Hashable, Tensor] = {}  # where each graph writes
        self._owner = object()
        weakref.finalize(self, self._graphs.drop, self._owner)

    def __call__(self, record: object) -> Tensor:
        """The result stays as it is until the next call."""
        fixed = {path: self._buffers.fill(path, tensor) for path, tensor in tensors_of(record)}
        key = self._owner, structure(record), tuple(tensor.data_ptr() for tensor in fixed.values())
        held, compute, results = with_tensors(record, fixed), self._compute, self._results

        def work() -> None:
            results[key] = compute(held)

        self._graphs.run(key, work)
        for gone in results.keys() - self._graphs.keys():
            del results[gone]
        return results[key]
