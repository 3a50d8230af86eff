from __future__ import annotations

import pytest

from scumble.errors import NotFound
from scumble_demo.emoji.concepts import BASE_STYLES, HELD_OUT_STYLES, STYLES, base_concepts, concepts, style


def test_concepts_differ_in_name_and_code() -> None:
    assert len({concept.name for concept in concepts()}) == len(concepts())
    assert len({concept.code for concept in concepts()}) == len(concepts())


def test_some_concepts_and_two_styles_are_held_out() -> None:
    assert len(base_concepts()) == 120
    assert len(concepts()) - len(base_concepts()) == 14
    assert {s.name for s in HELD_OUT_STYLES} == {"openmoji", "ink"}
    assert set(BASE_STYLES) | set(HELD_OUT_STYLES) == set(STYLES)


def test_an_unknown_style_is_refused_with_the_known_ones() -> None:
    with pytest.raises(NotFound, match="noto, twemoji, fluent, openmoji, ink"):
        style("crayon")
