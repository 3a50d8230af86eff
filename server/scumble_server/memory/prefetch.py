"""Reads what a request will need while it still waits in the queue."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)
CAPACITY = 64


class Prefetcher:
    """Owns one thread. Nothing depends on it: an error here is only logged, and shows again when the request is run."""

    def __init__(self) -> None:
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue(CAPACITY)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], None]) -> None:
        """Queue work, or drop it if the queue is full. Any thread may call it; never blocks."""
        try:
            self._work.put_nowait(work)
        except queue.Full:
            log.debug("the prefetch queue is full")

    def close(self) -> None:
        """Finish the running work and drop the rest."""
        self._closing = True
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if self._closing:
                continue
            try:
                work()
            except Exception as error:  # noqa: BLE001 - the request itself will raise it again
                log.debug("prefetching failed: %s", error)
