"""An adapter of a request: which weight it has in the text encoders, and when it never acts."""

from __future__ import annotations

from typing import Any

import pytest

from scumble.request import Adapter
from scumble_server.request.adapter import ResolvedAdapter

NO_VERSION: Any = None


def resolved(**fields: Any) -> ResolvedAdapter:
    return ResolvedAdapter(Adapter(ref="a/b", **fields), NO_VERSION, None)


def test_the_text_encoders_follow_the_weight_unless_they_have_their_own() -> None:
    assert resolved(weight=0.5).text_weight == 0.5
    assert resolved(weight=0.5, text_weight=0.0).text_weight == 0.0


def test_one_that_is_named_twice_is_two() -> None:
    spec = Adapter(ref="a/b")
    assert ResolvedAdapter(spec, NO_VERSION, None) != ResolvedAdapter(spec, NO_VERSION, None)


@pytest.mark.parametrize(
    ("fields", "steps", "reason"),
    [
        ({"weight": 0.0}, 4, "weight 0"),
        ({"start": 0.3, "end": 0.4}, 4, "no step of 4 lies between start 0.3 and end 0.4"),
        ({"start": 0.3, "end": 0.4}, 10, None),
        ({"weight": -1.0}, 1, None),
    ],
)
def test_why_it_never_acts(fields: dict[str, Any], steps: int, reason: str | None) -> None:
    assert resolved(**fields).why_never(steps) == reason
