"""The denoise loop: steps are batched, not requests. Rows join and leave between two steps.

One thread runs `run`; `add` and `close` may be called from any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable

import torch

from scumble.errors import Cancelled, DeadlineExceeded, OutOfMemory, ScumbleError, Unavailable
from scumble.events import Failed
from scumble_server.denoise.batch import Batch
from scumble_server.denoise.counters import Counters
from scumble_server.denoise.headroom import Room
from scumble_server.denoise.image import Progress, Row

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds of waiting that weigh as much as one level of priority, so that nobody waits for ever."""


class Loop:
    """Owns the rows that are being denoised. At most `max_images` of them are active, chosen anew before each step:
    a row that was active stays so unless others have a higher priority. A paused row keeps its place in its schedule.
    """

    def __init__(self, max_images: int, counters: Counters) -> None:
        self._max_images = max_images
        self._counters = counters
        self._arrived: list[Row] = []
        self._rows: list[Row] = []
        self._batches: dict[Hashable, list[Batch]] = {}
        self._last_turn: dict[Hashable, int] = {}
        self._turn = 0
        self._room = Room()
        self._changed = threading.Condition()
        self._closing = False

    def add(self, progress: Progress) -> None:
        """Queue the rows of a request whose conditioning is resident."""
        with self._changed:
            if self._closing:
                progress.fail(Failed(Unavailable("the server is stopping")))
                return
            self._arrived.extend(progress.rows)
            self._changed.notify()

    def close(self) -> None:
        """Let the running step end, fail whatever is left, and end `run`."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def run(self) -> None:
        while self._wait_for_work():
            self._drop_ended()
            for batch in self._next_batches(self._active()):
                self._step(batch)
                self._leave(batch)
        with self._changed:
            left = [*self._rows, *self._arrived]
        for row in left:
            row.progress.fail(Failed(Unavailable("the server is stopping")))

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not (self._arrived or self._rows or self._closing):
                self._changed.wait()
            self._rows += self._arrived
            self._arrived.clear()
            return not self._closing

    def _drop_ended(self) -> None:
        """Asked once a step and request, for rows that wait as for rows that run."""
        now = time.monotonic()
        for progress in {id(row.progress): row.progress for row in self._rows}.values():
            if progress.is_cancelled():
                self._end(progress, Cancelled("the request was cancelled by its caller"))
            elif progress.deadline is not None and now > progress.deadline:
                self._end(progress, DeadlineExceeded("the request was not done by its deadline, and was dropped"))

    def _active(self) -> list[Row]:
        """By priority and how long a row waited to join; then rows that run, the nearest deadline, first come."""
        now = time.monotonic()

        def rank(row: Row) -> tuple[float, bool, float, float]:
            progress = row.progress
            waited = (progress.joined_at or now) - progress.queued_at
            deadline = progress.deadline if progress.deadline is not None else float("inf")
            return -(progress.priority + waited // PATIENCE), row.step == 0, deadline, progress.queued_at

        active = sorted(self._rows, key=rank)[: self._max_images]
        for row in active:
            row.progress.join()
        return active

    def _next_batches(self, active: list[Row]) -> list[Batch]:
        """Groups take turns, so that a rare one is not starved by a busy one. A group that is too large for the
        executor is cut, and all its parts take their step.
        """
        groups: dict[Hashable, list[Row]] = {}
        for row in active:
            groups.setdefault(row.group, []).append(row)
        if not groups:
            self._batches.clear()
            return []
        self._last_turn = {group: self._last_turn.get(group, -1) for group in groups}
        group = min(groups, key=self._last_turn.__getitem__)
        self._turn += 1
        self._last_turn[group] = self._turn
        known = [batch for of_group in self._batches.values() for batch in of_group]
        parts = self._cut(groups[group])
        batches = [next((batch for batch in known if batch.fits(rows)), None) or Batch(rows) for rows in parts]
        self._batches = {each: self._batches[each] for each in groups if each in self._batches} | {group: batches}
        return batches

    def _step(self, batch: Batch) -> None:
        start, group = time.monotonic(), batch.rows[0].group
        try:
            with torch.inference_mode():
                batch.advance()
        except OutOfMemory as error:
            self._shrink(batch, error)
            return
        except Exception as error:
            self._blame(batch, error)
            return
        self._room.went_well(group)
        self._counters.step(len(batch.rows), batch.model_rows, batch.mixed(), time.monotonic() - start)
        finite = torch.stack([row.sample.isfinite().all() for row in batch.rows]).tolist()
        for row, is_finite in zip(batch.rows, finite, strict=True):
            if not is_finite:
                self._end(row.progress, ScumbleError(f"the picture became NaN or infinite in step {row.step}"))

    def _blame(self, batch: Batch, error: Exception) -> None:
        """A step that fails touched no row. Rows try it alone, so that only the one to blame ends."""
        log.error("a step of %d images failed", len(batch.rows), exc_info=error)
        self._counters.add("failed_steps")
        if len(batch.rows) > 1:
            for row in batch.rows:
                self._step(Batch([row]))
        else:
            typed = error if isinstance(error, ScumbleError) else None
            self._end(batch.rows[0].progress, typed or ScumbleError(f"the step failed on the server: {error}"))

    def _shrink(self, batch: Batch, error: OutOfMemory) -> None:
        """Such a step touched no row either. Its rows take it in smaller parts; one image that does not fit ends."""
        self._counters.add("out_of_memory")
        if len(batch.rows) == 1:
            log.error("one image does not fit into the device's memory: %s", error)
            self._end(batch.rows[0].progress, error)
            return
        group, executor = batch.rows[0].group, batch.rows[0].phase.executor
        self._room.ran_out(group, batch.model_rows, executor.max_rows)
        limit = self._room.limit(group, executor.max_rows)
        log.warning("device memory ran out in a step of %d rows; they go on by %d", batch.model_rows, limit)
        left = batch.rows
        while left:  # cut anew each time: what went wrong once more has made the parts smaller
            part = self._cut(left)[0]
            self._step(Batch(part))
            left = left[len(part) :]

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
        self._forget(lambda row: row.done or row.progress.ended)

    def _end(self, progress: Progress, error: ScumbleError) -> None:
        progress.fail(Failed(error))
        self._forget(lambda row: row.progress is progress)

    def _forget(self, gone: Callable[[Row], bool]) -> None:
        self._rows = [row for row in self._rows if not gone(row)]

    def _cut(self, rows: list[Row]) -> list[list[Row]]:
        """Parts of at most as many model rows as the executor takes at once and memory holds; one image always goes."""
        limit = self._room.limit(rows[0].group, rows[0].phase.executor.max_rows)
        parts: list[list[Row]] = [[]]
        filled = 0
        for row in rows:
            size = row.phase.kv.shape[0]
            if parts[-1] and filled + size > limit:
                parts.append([])
                filled = 0
            parts[-1].append(row)
            filled += size
        return parts
