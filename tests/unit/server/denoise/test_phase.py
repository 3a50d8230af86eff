"""A phase asks of a graph what all its parts ask together."""

from __future__ import annotations

from typing import Any

import torch

from scumble_build.graphs.layout import PAGE
from scumble_server.denoise.phase import Phase
from scumble_server.factors.bound_set import BoundSet
from scumble_server.factors.rows import RowFactors
from scumble_server.memory.pages import PageSet
from scumble_server.methods.ip_adapter.part import ImagesPart

NO_EXECUTOR: Any = None


def test_it_asks_what_its_parts_ask() -> None:
    pages = PageSet.own(torch.zeros(2, PAGE * 4), torch.zeros(2, PAGE * 3))
    factors = RowFactors.of(BoundSet(pages, None, (9,), (None,)), [1.0])
    images = ImagesPart(torch.zeros(2, 3, 5, 8), torch.ones(3, 5, dtype=torch.bool), torch.ones(2, 3), None)
    phase = Phase(NO_EXECUTOR, torch.zeros(2, 77, 8), factors, {"ip_adapter": images})
    assert phase.rows == 2
    assert phase.includes == {"factors", "images"}
    assert phase.axes == {"tokens": 77, "rank_pages": 2, "groups": 3, "image_tokens": 5}


def test_one_of_text_alone_asks_nothing_more() -> None:
    phase = Phase(NO_EXECUTOR, torch.zeros(1, 154, 8))
    assert (phase.includes, phase.axes, phase.everything) == (frozenset(), {"tokens": 154}, ())
