"""What CUDA adds: a stream for each thread, steps captured as graphs, and errors after which a process is of no use.

On another device the same functions do nothing, so that one code runs everywhere.

Each thread has a stream of its own, none of them the default one: a kernel on the default stream would wait for all
others, and would end a capture. So what one thread made, another reads only after `settle` or `mark`.
"""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

T = TypeVar("T")
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "cudaErrorMemoryAllocation")
"""What torch, cuBLAS, cuDNN and CUDA call it, where they raise no error of its own."""
_alone = threading.RLock()


@contextmanager
def own_stream(device: str | torch.device, *, urgent: bool = False) -> Iterator[None]:
    """Run the block, which is all that a thread does, on a stream of its own. Kernels of an urgent one go first."""
    device = torch.device(device)
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(device, priority=-1 if urgent else 0)):
        yield


def memory_format(device: str | torch.device) -> torch.memory_format:
    """Return the layout of convolutions' weights: channels last on a GPU, as tensor cores read it; maps follow."""
    return torch.preserve_format if torch.device(device).type == "cpu" else torch.channels_last


def choose_kernels_by_time(device: str | torch.device) -> None:
    """Let cuDNN time its kernels at the first convolution of each shape, and use the quickest from then on."""
    if torch.device(device).type == "cuda":
        torch.backends.cudnn.benchmark = True


def settle(device: str | torch.device) -> None:
    """Wait until all that this thread started has been computed, so that any thread may read it."""
    if torch.device(device).type == "cuda":
        torch.cuda.current_stream(torch.device(device)).synchronize()


def mark(device: str | torch.device) -> Callable[[], None]:
    """Return what makes another thread's work wait for this thread's work so far. Neither thread waits itself."""
    if torch.device(device).type != "cuda":
        return lambda: None
    return _event().wait


def pinned(tensor: Tensor, device: str | torch.device) -> Tensor:
    """Return a host tensor in memory that the device reads by itself, so that a copy need not be waited for."""
    return tensor.pin_memory() if torch.device(device).type == "cuda" else tensor


def read_later(tensor: Tensor) -> Callable[[], list[Any]]:
    """Begin to copy a small tensor to the host; what is returned waits for this copy alone, and gives its values."""
    if tensor.device.type == "cpu":
        return tensor.tolist
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    copy.copy_(tensor, non_blocking=True)
    arrived = _event() if tensor.device.type == "cuda" else None

    def read() -> list[Any]:
        if arrived is not None:
            arrived.synchronize()
        values: list[Any] = copy.tolist()
        return values

    return read


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event


def stream_handle(device: torch.device) -> int:
    """Return the address of this thread's stream, for other libraries; 0 where there are no streams."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@contextmanager
def alone() -> Iterator[None]:
    """Let one thread at a time capture a graph, or do what waits for the whole device and would end a capture: load
    engines, give memory back. torch allows one capture at a time in a process (`torch.cuda.graphs`).
    """
    with _alone:
        yield


def give_back_memory() -> None:
    """Free what torch holds in reserve."""
    gc.collect()
    if torch.cuda.is_available():
        with alone():
            torch.cuda.empty_cache()


def ran_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    )


def is_lost(error: BaseException, device: str | torch.device) -> bool:
    """Tell whether, after this error, the device is of no more use to this process.

    After an illegal access or a hardware fault every later call raises, whatever it is asked. Other libraries' errors
    do not say so: the stream is asked.
    """
    if isinstance(error, torch.AcceleratorError):
        return not ran_out_of_memory(error)
    try:
        settle(device)
    except torch.AcceleratorError:
        return True
    return False


class CudaCapture:
    """Captures CUDA graphs, on the calling thread's stream. They share one memory pool, as they never run at once."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def __call__(self, work: Callable[[], T]) -> Callable[[], T]:
        """Capture `work`, which this thread has run before, so that libraries have chosen kernels and taken memory.

        To be called `alone`. Raises whatever a capture may: `Graphs` goes on without it then.
        """
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        if not self._graphs:  # a pool whose last graph is gone must not be used again
            self._pool = torch.cuda.graph_pool_handle()
        with _without_collection():
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")  # other threads go on
            try:
                result = work()
            except BaseException:
                with suppress(RuntimeError):  # it says that the capture failed, which the first error says better
                    graph.capture_end()
                raise
            graph.capture_end()
        self._graphs.add(graph)

        def replay() -> T:
            graph.replay()
            return result

        return replay


@contextmanager
def _without_collection() -> Iterator[None]:
    """A collection could free other graphs, which a capture does not survive."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
