"""What a LoRA's header tells people."""

from __future__ import annotations

import json

import pytest

from scumble_registry.formats.lora import metadata as header_metadata


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"trigger_words": '["ink", "wash"]'}, ("ink", "wash")),
        ({"modelspec.trigger_phrase": "ink, wash"}, ("ink", "wash")),
        ({"ss_tag_frequency": json.dumps({"10_ink": {"sks ink": 20, "tree": 7}})}, ("sks ink",)),
        ({"ss_tag_frequency": json.dumps({"1_a": {f"tag{i}": 5 for i in range(9)}})}, ()),
        ({"ss_tag_frequency": "{"}, ()),
        ({"ss_tag_frequency": '{"a": {"b": "c"}}'}, ()),
        ({"trigger_words": "a" * 300 + ", in\x07k, wash"}, ("wash",)),
        ({}, ()),
    ],
)
def test_trigger_words(metadata: dict[str, str], words: tuple[str, ...]) -> None:
    assert header_metadata.trigger_words(metadata) == words
