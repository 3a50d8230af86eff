"""Device resources that let a step run without allocations: fixed buffers, captured work, uploads beside steps.

A CUDA graph replays kernels with the addresses that they were captured with. So inputs are copied into buffers whose
addresses do not change, and a graph's key is (context, profile, shapes, addresses). A tensor that has not changed since
the last step is not copied again.

On a CPU nothing is captured and nothing overlaps, but the same code runs, so tests can check it.
"""

from __future__ import annotations

import logging
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
from scumble_server.executors.cuda import CudaCapture, alone, give_back_memory, ran_out_of_memory, settle

log = logging.getLogger(__name__)

Replay = Callable[[], Any]
"""Runs captured work again and returns what it returned when it was captured."""
Capture = Callable[[Callable[[], Any]], Replay]
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

    Work is captured when it comes for the second time: a structure that never comes again is not worth the time.
    """

    def __init__(self, capture: Capture | None, most: int = 64) -> None:
        """`capture` None: nothing is ever captured."""
        self._capture, self._most = capture, most
        self._known: OrderedDict[Hashable, Replay] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._doomed: list[Replay] = []
        self._lock = threading.RLock()  # reentrant: finalizers call `drop`, perhaps in this thread
        self._capturing = False
        self.captured = 0
        """Number of captures so far. It should not grow from step to step."""

    def run(
        self, key: Hashable, work: Callable[[], Any], to_capture: Callable[[], Callable[[], Any] | None] | None = None
    ) -> Any:
        """Return what `work` returns; a replay returns the same object each time. `work` must read and write only the
        addresses of the key, and what it makes itself.

        `to_capture` makes what is captured in place of `work` and lives as long as the graph; None: it cannot be.
        """
        with self._lock:
            replay = self._known.get(key)
            if replay is not None:
                self._known.move_to_end(key)
        if replay is None:
            replay = self._try_to_capture(key, work, to_capture or (lambda: work))
        return replay()

    def _try_to_capture(
        self, key: Hashable, work: Callable[[], Any], to_capture: Callable[[], Callable[[], Any] | None]
    ) -> Replay:
        """Return the captured work, or the work itself: at its first time, and where it cannot be captured."""
        if self._capture is None or self._is_new(key):
            return work
        captured = to_capture()
        if captured is None:
            return work
        self._capturing = True
        try:
            with alone():
                replay = self._capture(captured)
        except Exception as error:
            if ran_out_of_memory(error) or isinstance(error, OutOfMemory):
                raise
            self._capture = None
            log.warning("a step cannot be captured as a CUDA graph, so steps run without graphs from now on: %s", error)
            return work
        finally:
            self._capturing = False
            with self._lock:
                self._doomed.clear()
        self.captured += 1
        with self._lock:
            self._known[key] = replay
            while len(self._known) > self._most:
                self._known.popitem(last=False)
        return replay

    def _is_new(self, key: Hashable) -> bool:
        is_new = key not in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        while len(self._seen) > 4 * self._most:
            self._seen.popitem(last=False)
        return is_new

    @property
    def captures(self) -> bool:
        """Whether work is captured at all."""
        return self._capture is not None

    def forget(self) -> None:
        with self._lock:
            self._known.clear()
            self._seen.clear()

    def drop(self, owner: object) -> None:
        """Drop the graphs whose key begins with `owner`, as its memory is gone. Any thread may call it."""
        with alone(), self._lock:
            for key in list(self._known):
                if isinstance(key, tuple) and key and key[0] is owner:
                    replay = self._known.pop(key)
                    if self._capturing:  # in this thread: a graph that is freed now would end the capture
                        self._doomed.append(replay)

    def keys(self) -> AbstractSet[Hashable]:
        with self._lock:
            return set(self._known)


def uncaptured(work: Callable[[], Any]) -> Replay:
    """Return the work itself, on devices without graphs."""
    return work


def capture_on(device: torch.device) -> Capture:
    return CudaCapture() if device.type == "cuda" else uncaptured


class Uploads:
    """Uploads tensors from pinned host memory, on the stream of the thread that owns it, beside the steps'.

    Another thread reads what was sent, so `send` and `write` return after it has arrived.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def send(self, *tensors: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Return the tensors on the device; those that are there already are not copied. Raises OutOfMemory."""
        with faults(f"{sum(tensor.nbytes for tensor in tensors)} bytes to upload"):
            sent = tuple(self._start(tensor, dtype or tensor.dtype) for tensor in tensors)
        settle(self._device)  # this thread waits, the step does not
        return sent

    def write(self, into: Sequence[Tensor], values: Sequence[Tensor], rows: Sequence[int]) -> None:
        """Write values[i] (n, …) to n rows of into[i] (N, …), which no step reads yet. Raises OutOfMemory."""
        sent = [self.send(source, dtype=target.dtype)[0] for source, target in zip(values, into, strict=True)]
        index = torch.tensor(rows, device=self._device)
        for target, source in zip(into, sent, strict=True):
            target.index_copy_(0, index, source)
        settle(self._device)

    def _start(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if self._device.type != "cuda" or tensor.device.type == "cuda":
            return tensor.to(self._device, dtype)
        return tensor.to(dtype).pin_memory().to(self._device, non_blocking=True)


@cache
def uploads(device: str) -> Uploads:
    """Return the uploads of the conditioning thread, the only one that sends."""
    return Uploads(torch.device(device))


@contextmanager
def faults(what: str) -> Iterator[None]:
    """Turn the libraries' out-of-memory errors into OutOfMemory, after freeing torch's unused memory."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        message = f"device memory ran out ({what}): {str(error).splitlines()[0]}"
    else:
        return
    # After the except block, because it keeps the failed call's frames, and the tensors in them, alive.
    give_back_memory()
    raise OutOfMemory(f"{message}; use a smaller picture, fewer images or fewer adapters")


def structure(record: object) -> Hashable:
    """Return everything of a record except its tensors' values. Records of equal structure can share a captured graph.

    A module counts as itself: its weights are read where they are. The key does not keep it alive, and equals no other
    key once it is gone. Raises TypeError for what else may hold memory, which a graph would read unseen.
    """
    if isinstance(record, Tensor):
        return tuple(record.shape), record.dtype
    if isinstance(record, torch.nn.Module):
        return weakref.ref(record)
    if has_parts(record):
        return type(record), tuple((name, structure(value)) for name, value in parts_of(record))
    if record is None or isinstance(record, bool | int | float | str):
        return record
    raise TypeError(f"a {type(record).__name__} cannot be an input of a captured step: only tensors, modules, numbers")


@dataclass(frozen=True, slots=True)
class Stepping:
    """Buffers and graphs that all executors of a device share, because one thread, the loop's, runs their steps in
    turn.
    """

    buffers: Buffers
    graphs: Graphs

    @classmethod
    def on(cls, device: torch.device, *, graphs: bool = True) -> Stepping:
        """`graphs` False: nothing is captured."""
        return cls(Buffers(device), Graphs(capture_on(device) if graphs else None))


class Captured:
    """A function of a record of tensors, captured once per structure and then replayed. Owned by one thread."""

    def __init__(self, stepping: Stepping, compute: Callable[[Any], Any], prefix: str = "") -> None:
        """Name the buffers of the record's tensors `prefix` and their path: functions that take turns in a step, and
        read other tensors, are to have others.
        """
        self._buffers, self._graphs, self._compute, self._prefix = stepping.buffers, stepping.graphs, compute, prefix
        self._owner = object()
        weakref.finalize(self, self._graphs.drop, self._owner)

    @property
    def captures(self) -> bool:
        """False where every call runs as it is."""
        return self._graphs.captures

    def __call__(self, record: object) -> Any:
        """Run the function. The result is overwritten by the next call."""
        fixed = {path: self._buffers.fill(self._prefix + path, tensor) for path, tensor in tensors_of(record)}
        key = self._owner, structure(record), tuple(tensor.data_ptr() for tensor in fixed.values())
        held, compute = with_tensors(record, fixed), self._compute
        return self._graphs.run(key, lambda: compute(held))

    def outputs(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return memory to be part of a record, for the function to write results to: what many graphs return in memory
        of their own adds up.
        """
        taken = (self._buffers.take(f"{self._prefix}out.{index}", shape, dtype) for index, shape in enumerate(shapes))
        return tuple(torch.nn.Buffer(each, persistent=False) for each in taken)
