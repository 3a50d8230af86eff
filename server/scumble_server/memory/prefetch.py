"""Work that is done ahead, while its request still waits: reading what it will need."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)
CAPACITY = 64


class Prefetcher:
    """Owns one thread. Nothing depends on it: what fails here fails again, and is told, where it is needed."""

    def __init__(self) -> None:
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue(CAPACITY)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], None]) -> None:
        """Do it soon, or not at all if there is too much. For any thread; never waits."""
        try:
            self._work.put_nowait(work)
        except queue.Full:
            log.debug("too much to prefetch")

    def close(self) -> None:
        """Let the running work end, forget the rest."""
        self._closing = True
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if self._closing:
                continue
            try:
                work()
            except Exception as error:  # noqa: BLE001 - the request itself will meet it again
                log.debug("prefetching failed: %s", error)
