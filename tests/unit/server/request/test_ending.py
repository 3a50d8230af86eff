"""A request that nobody waits for any more ends with an error that says why."""

from __future__ import annotations

from time import monotonic

import pytest

from scumble.errors import Cancelled, DeadlineExceeded, Unavailable
from scumble_server.request.ending import check_wanted, stopping


def test_it_is_wanted_until_it_is_cancelled_or_too_late() -> None:
    check_wanted(lambda: False, None)
    check_wanted(lambda: False, monotonic() + 60)
    with pytest.raises(Cancelled):
        check_wanted(lambda: True, None)
    with pytest.raises(DeadlineExceeded):
        check_wanted(lambda: False, monotonic() - 1)


def test_who_cancels_is_told_so_even_when_it_is_too_late() -> None:
    with pytest.raises(Cancelled):
        check_wanted(lambda: True, monotonic() - 1)


def test_a_server_that_stops_is_unavailable() -> None:
    assert type(stopping()) is Unavailable
