"""Where memory ran out, half as many rows are tried, and later one by one more."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from scumble_server.denoise.headroom import PATIENCE, Headroom


def test_rows_are_halved_and_never_none() -> None:
    headroom = Headroom()
    rows = [16]
    for _ in range(6):
        headroom.ran_out("g", rows[-1], 16)
        rows.append(headroom.limit("g", 16))
    assert rows == [16, 8, 4, 2, 1, 1, 1]


def test_groups_do_not_hear_of_each_other() -> None:
    headroom = Headroom()
    headroom.ran_out("g", 8, 8)
    assert headroom.limit("other", 8) == 8
    headroom.went_well("other")
    assert headroom.limit("g", 8) == 4


def test_a_row_more_is_tried_after_patience_until_all_fit_again() -> None:
    headroom = Headroom()
    headroom.ran_out("g", 6, 6)
    for expected in (3, 4, 5, 6):
        assert headroom.limit("g", 6) == expected
        for _ in range(PATIENCE):
            headroom.went_well("g")


@settings(deadline=None)
@given(st.lists(st.sampled_from(["out", "well"]), max_size=300), st.integers(1, 32))
def test_a_limit_is_always_one_that_can_be_stepped(events: list[str], most: int) -> None:
    headroom = Headroom()
    for event in events:
        limit = headroom.limit("g", most)
        assert 1 <= limit <= most
        if event == "out":
            headroom.ran_out("g", limit, most)
        else:
            headroom.went_well("g")
