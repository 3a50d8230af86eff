"""Who asked, and how the events of the loop reach them.

A request comes over the wire, or from model `scumble` inside this server. That one wants the last event
alone, and Triton 2.51 cannot cancel a call between models; so it names its call with a token, in the
parameters, and cancels with a second call that carries the same token.
"""

from __future__ import annotations

import threading
from typing import Protocol

from scumble.events import Done, Event, Failed
from scumble.wire import event_to_tensors
from scumble_server.triton.backend import Responder
from scumble_server.triton.outbox import Outbox

CALL = "scumble_call"
CANCEL = "scumble_cancel"


class Caller(Protocol):
    def on_event(self, event: Event) -> None:
        """Pass `event` on; quick, from the loop's thread."""

    def is_cancelled(self) -> bool: ...


class WireCaller:
    """Gets every event; Triton knows whether it is still there."""

    def __init__(self, responder: Responder, outbox: Outbox) -> None:
        self._responder = responder
        self._outbox = outbox

    def on_event(self, event: Event) -> None:
        self._outbox.put(self._responder, lambda: event_to_tensors(event), final=_is_last(event))

    def is_cancelled(self) -> bool:
        return self._responder.is_cancelled()


class InnerCaller:
    """Model `scumble`: gets the last event."""

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
    """The running calls of model `scumble`, by token. For any thread."""

    def __init__(self) -> None:
        self._running: dict[str, threading.Event] = {}

    def begin(self, token: str) -> threading.Event:
        return self._running.setdefault(token, threading.Event())

    def cancel(self, token: str) -> None:
        """Nothing happens if the call has ended."""
        if call := self._running.get(token):
            call.set()

    def end(self, token: str) -> None:
        self._running.pop(token, None)


def _is_last(event: Event) -> bool:
    return isinstance(event, Done | Failed)
