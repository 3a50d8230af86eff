"""The callers of model `scumble_stream`, and how the loop's events reach them.

A request comes from a client, or from model `scumble` in this server, which needs only the last event. As Triton 2.51
cannot cancel a call between models, that model puts a token into the parameters of its call, and cancels it by a second
call with the same token.
"""

from __future__ import annotations

import threading
from typing import Protocol

from scumble.events import Done, Event, Failed
from scumble.wire import event_to_tensors
from scumble_server.triton.backend import Responder
from scumble_server.triton.outbox import Outbox


class Caller(Protocol):
    def on_event(self, event: Event) -> None:
        """Pass `event` on. Called from the loop's thread, so it must not block."""

    def is_cancelled(self) -> bool: ...


class WireCaller:
    """A client, which gets every event. Triton knows whether it is still connected."""

    def __init__(self, responder: Responder, outbox: Outbox, *, as_text: bool = False) -> None:
        """`as_text`: the response goes into JSON."""
        self._responder = responder
        self._outbox = outbox
        self._as_text = as_text

    def on_event(self, event: Event) -> None:
        self._outbox.put(self._responder, lambda: event_to_tensors(event, as_text=self._as_text), final=_is_last(event))

    def is_cancelled(self) -> bool:
        return self._responder.is_cancelled()


class InnerCaller:
    """Model `scumble`, which gets the last event."""

    def __init__(self, responder: Responder, outbox: Outbox, calls: InnerCalls, token: str) -> None:
        self._wire = WireCaller(responder, outbox)
        self._calls = calls
        self._token = token
        self._cancelled = calls.begin(token)

    def on_event(self, event: Event) -> None:
        if _is_last(event):
            self._calls.end(self._token)
            self._wire.on_event(event)

    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()


class InnerCalls:
    """The running calls of model `scumble`, by token. Any thread may call it."""

    def __init__(self) -> None:
        self._running: dict[str, threading.Event] = {}

    def begin(self, token: str) -> threading.Event:
        return self._running.setdefault(token, threading.Event())

    def cancel(self, token: str) -> None:
        """Cancel a call; does nothing if it has ended."""
        if call := self._running.get(token):
            call.set()

    def end(self, token: str) -> None:
        self._running.pop(token, None)


def _is_last(event: Event) -> bool:
    return isinstance(event, Done | Failed)
