"""The denoise loop: steps are batched, not requests. Rows join and leave between two steps.

One thread runs `run`; `add` and `close` may be called from any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

import torch

from scumble.errors import Cancelled, ScumbleError, Unavailable
from scumble.events import Failed
from scumble_server.batch import Batch
from scumble_server.counters import Counters
from scumble_server.executors import Executor
from scumble_server.rows import Progress, Row

log = logging.getLogger(__name__)


class Loop:
    """Owns the rows that are being denoised. At most `max_images` of them are active."""

    def __init__(self, executor: Executor, max_images: int, counters: Counters) -> None:
        self._executor = executor
        self._max_images = max_images
        self._counters = counters
        self._waiting: deque[Row] = deque()
        self._active: list[Row] = []
        self._batches: dict[tuple[int, int], Batch] = {}
        self._turn = 0
        self._changed = threading.Condition()
        self._closing = False

    def add(self, progress: Progress) -> None:
        """Queue the rows of a request whose conditioning is resident."""
        with self._changed:
            if self._closing:
                progress.fail(Failed(Unavailable("the server is stopping")))
                return
            self._waiting.extend(progress.rows)
            self._changed.notify()

    def close(self) -> None:
        """Let the running step end, fail whatever is left, and end `run`."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def run(self) -> None:
        while self._wait_for_work():
            self._drop_cancelled()
            self._join()
            batch = self._next_batch()
            if batch is not None:
                self._step(batch)
                self._leave(batch)
        for row in [*self._active, *self._waiting]:
            row.progress.fail(Failed(Unavailable("the server is stopping")))

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not (self._waiting or self._active or self._closing):
                self._changed.wait()
            return not self._closing

    def _drop_cancelled(self) -> None:
        """Asked once a step and request, for rows that wait as for rows that run."""
        with self._changed:
            requests = {id(row.progress): row.progress for row in [*self._active, *self._waiting]}
        for progress in requests.values():
            if progress.is_cancelled():
                self._end(progress, Cancelled("the request was cancelled by its caller"))

    def _join(self) -> None:
        with self._changed:
            while self._waiting and len(self._active) < self._max_images:
                row = self._waiting.popleft()
                row.progress.join()
                self._active.append(row)
                self._batches.pop(row.size, None)

    def _next_batch(self) -> Batch | None:
        """Sizes take turns, so that a rare one is not starved by a busy one."""
        sizes = sorted({row.size for row in self._active})
        if not sizes:
            return None
        self._turn = (self._turn + 1) % len(sizes)
        size = sizes[self._turn]
        if size not in self._batches or self._batches[size].is_stale():
            self._batches[size] = Batch([row for row in self._active if row.size == size], self._executor)
        return self._batches[size]

    def _step(self, batch: Batch) -> None:
        start = time.monotonic()
        try:
            with torch.inference_mode():
                batch.advance()
        except Exception as error:
            self._blame(batch, error)
            return
        self._counters.step(len(batch.rows), batch.model_rows, batch.mixed(), time.monotonic() - start)
        finite = torch.stack([row.sample.isfinite().all() for row in batch.rows]).tolist()
        for row, is_finite in zip(batch.rows, finite, strict=True):
            if not is_finite:
                self._end(row.progress, ScumbleError(f"the picture became NaN or infinite in step {row.step}"))

    def _blame(self, batch: Batch, error: Exception) -> None:
        """A step that fails touched no row. Rows try it alone, so that only the one to blame ends."""
        log.error("a step of %d images failed", len(batch.rows), exc_info=error)
        if len(batch.rows) > 1:
            for row in batch.rows:
                self._step(Batch([row], self._executor))
        else:
            self._end(batch.rows[0].progress, ScumbleError(f"the step failed on the server: {error}"))

    def _leave(self, batch: Batch) -> None:
        """Report progress, and hand requests whose images are all done to the decoder."""
        for progress in {id(row.progress): row.progress for row in batch.rows}.values():
            if progress.ended:
                continue
            progress.report()
            if all(row.done for row in progress.rows):
                progress.ended = True
                progress.finished_at = time.monotonic()
                progress.on_denoised(progress)
        if any(row.done or row.progress.ended for row in batch.rows):
            self._forget(lambda row: row.done or row.progress.ended)

    def _end(self, progress: Progress, error: ScumbleError) -> None:
        progress.fail(Failed(error))
        self._forget(lambda row: row.progress is progress)

    def _forget(self, gone: Callable[[Row], bool]) -> None:
        with self._changed:
            self._waiting = deque(row for row in self._waiting if not gone(row))
        for row in self._active:
            if gone(row):
                self._batches.pop(row.size, None)
        self._active = [row for row in self._active if not gone(row)]
