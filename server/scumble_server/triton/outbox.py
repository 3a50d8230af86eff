"""Queue of responses: the step loop puts them in without blocking, and one thread sends them to Triton."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

from scumble_server.triton.backend import Responder, Tensors

log = logging.getLogger(__name__)


class Outbox:
    """First in, first out, so the events of a request keep their order. Any thread may call `put`."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def put(self, responder: Responder, make_tensors: Callable[[], Tensors], *, final: bool) -> None:
        """Queue a response; its tensors are made when it is sent."""
        self._waiting.put(lambda: responder.send(make_tensors(), final=final))

    def flush(self) -> None:
        """Wait until everything in the queue has been sent, for ten seconds at most."""
        sent = threading.Event()
        self._waiting.put(sent.set)
        sent.wait(10)

    def close(self) -> None:
        """Send everything in the queue, then end the thread."""
        self._waiting.put(None)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while send := self._waiting.get():
            try:
                send()
            except Exception:  # one caller that is gone must not stop responses to others
                log.exception("a response could not be sent")
