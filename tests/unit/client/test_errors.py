"""The tree of errors: codes are stable and its own, and an error survives the wire."""

from __future__ import annotations

import pytest

from scumble import errors
from scumble.errors import Incompatible, OutOfMemory, QueueFull, Refused, ScumbleError, from_dict


def tree(kind: type[ScumbleError] = ScumbleError) -> list[type[ScumbleError]]:
    return [
        kind,
        *(each for child in kind.__subclasses__() if child.__module__ == errors.__name__ for each in tree(child)),
    ]


@pytest.mark.parametrize("kind", tree())
def test_every_error_comes_back_from_its_words(kind: type[ScumbleError]) -> None:
    sent = kind("no room", retry_after=2)
    read = from_dict(sent.to_dict())
    assert (type(read), read.message, read.fields, str(read)) == (kind, "no room", {"retry_after": 2}, "no room")


def test_no_two_errors_have_one_code_and_children_exit_as_their_parents() -> None:
    kinds = tree()
    assert len({kind.code for kind in kinds}) == len(kinds)
    assert Incompatible.exit_status == Refused.exit_status == 4
    assert OutOfMemory.exit_status == QueueFull.exit_status == 6


def test_a_newer_servers_error_is_an_error_still() -> None:
    read = from_dict({"code": "on_fire", "message": "hot"})
    assert (type(read), read.message) == (ScumbleError, "hot")
    assert from_dict({}).message == ""
    assert "fields" not in ScumbleError("a").to_dict()
