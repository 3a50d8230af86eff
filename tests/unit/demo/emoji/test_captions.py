from __future__ import annotations

import pytest

from scumble_demo.emoji.captions import canonical_caption, captions, validation_caption, with_article
from scumble_demo.emoji.concepts import STYLES, concepts, style


def test_the_canonical_caption_is_concept_and_style() -> None:
    assert canonical_caption(concepts()[0], style("noto")) == "a red apple, noto style"


@pytest.mark.parametrize(
    ("noun", "said"),
    [("apple", "an apple"), ("unicorn face", "a unicorn face"), ("socks", "socks"), ("sun", "the sun")],
)
def test_articles_read_naturally(noun: str, said: str) -> None:
    assert with_article(noun) == said


def test_every_caption_names_its_style_and_none_belongs_to_two_pictures() -> None:
    seen: dict[str, tuple[str, str]] = {}
    for concept in concepts():
        for hand in STYLES:
            texts = captions(concept, hand)
            assert 6 <= len(texts) <= 8
            for text in texts:
                assert hand.phrase in text
                assert text == text.lower()
                assert seen.setdefault(text, (concept.name, hand.name)) == (concept.name, hand.name)


def test_the_validation_wording_is_not_trained() -> None:
    for concept in concepts():
        assert validation_caption(concept, STYLES[0]) not in captions(concept, STYLES[0])
