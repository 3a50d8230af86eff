"""The errors of a request that ends before it is drawn, in one place for all threads."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from scumble.errors import Cancelled, DeadlineExceeded, Unavailable


def check_wanted(is_cancelled: Callable[[], bool], deadline: float | None) -> None:
    """Raise Cancelled or DeadlineExceeded if nobody waits for it any more. `deadline` is in seconds of `monotonic`."""
    if is_cancelled():
        raise Cancelled("the request was cancelled by its caller")
    if deadline is not None and monotonic() > deadline:
        raise DeadlineExceeded("the request was not done by its deadline, and was dropped")


def device_lost() -> Unavailable:
    """The error of a request whose device does nothing any more, until the server has started again."""
    return Unavailable("the device failed, and the server starts again; try again in a minute", retry_after=60.0)


def stopping() -> Unavailable:
    """The error of whatever a server that stops does not do any more."""
    return Unavailable("the server is stopping")
