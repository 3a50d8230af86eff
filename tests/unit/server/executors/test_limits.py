"""Which sizes engines take: of several profiles one must take all, of several graphs one must do."""

from __future__ import annotations

import pytest

from scumble.errors import Refused
from scumble_server.executors.limits import GraphLimits, check_any


def sides(least: int, most: int) -> dict[str, range]:
    return dict.fromkeys(("height", "width"), range(least, most + 1))


SMALL = GraphLimits("unet.small", (sides(32, 64),))
BARE = GraphLimits("unet.bare", (sides(32, 64), sides(128, 128)))


def test_one_profile_must_take_all_sizes_together() -> None:
    BARE.check({"height": 128, "width": 128})
    BARE.check({"height": 40, "width": 64, "tokens": 9000})
    with pytest.raises(Refused, match=r"unet\.bare .*height of the latents \(pixels / 8\) 128 is not within 32 to 64"):
        BARE.check({"height": 128, "width": 64})


def test_a_size_that_one_graph_takes_is_not_refused_at_the_edge() -> None:
    check_any((SMALL, BARE), {"height": 128, "width": 128})
    check_any((), {"height": 9000, "width": 1})
    with pytest.raises(Refused, match=r"unet\.small was built for"):
        check_any((SMALL, BARE), {"height": 96, "width": 96})
