"""Answers on their way out: the step loop drops them here and goes on; one thread hands them to Triton."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

from scumble_server.triton.backend import Responder, Tensors

log = logging.getLogger(__name__)


class Outbox:
    """First in, first out, so the events of a request keep their order. `put` is for any thread."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def put(self, responder: Responder, make_tensors: Callable[[], Tensors], *, final: bool) -> None:
        """Send later; the tensors are made then, too."""
        self._waiting.put(lambda: responder.send(make_tensors(), final=final))

    def flush(self) -> None:
        """Return when all that waits now has been sent, or after ten seconds."""
        sent = threading.Event()
        self._waiting.put(sent.set)
        sent.wait(10)

    def close(self) -> None:
        """Send what waits, then end the thread."""
        self._waiting.put(None)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while send := self._waiting.get():
            try:
                send()
            except Exception:  # a caller that is gone must not end the others' answers
                log.exception("an answer could not be sent")
