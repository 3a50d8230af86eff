"""LoRAs that are named in a prompt."""

from __future__ import annotations

import pytest

from scumble.errors import InvalidRequest
from scumble_server.prompts.grammar.tags import find_tag, parse_tags

CASES = {
    "<lora:ns/ink>": ("ns/ink", 1.0, 1.0),
    "<lora:ns/ink:0.8>": ("ns/ink", 0.8, 0.8),
    "<lora:ns/ink@2:0.8:0.5>": ("ns/ink@2", 0.5, 0.8),
    "<lyco:ns/ink@prod:-1>": ("ns/ink@prod", -1.0, -1.0),
    "<lora:ns/ink:te=0.2>": ("ns/ink", 0.2, 0.2),
    "<lora:ns/ink:0.3:unet=0.7>": ("ns/ink", 0.7, 0.3),
    f"<lora:ns/ink@sha256:{'ab' * 32}:0.5>": (f"ns/ink@sha256:{'ab' * 32}", 0.5, 0.5),
}


@pytest.mark.parametrize("tag", CASES)
def test_a_tag_is_taken_out_and_read(tag: str) -> None:
    text, tags = parse_tags(f"a cat {tag}, ink")
    assert text == "a cat , ink"
    assert [(each.ref, each.weight, each.text_weight) for each in tags] == [CASES[tag]]
    assert find_tag(f"a cat {tag}, ink") == tag


@pytest.mark.parametrize("text", ["a <cat>", "<cat:1>", "a < b: c >", "<lora>"])
def test_what_is_no_tag_stays(text: str) -> None:
    assert parse_tags(text) == (text, [])
    assert find_tag(text) is None


@pytest.mark.parametrize(
    ("tag", "says"),
    [
        ("<lora:ink:0.8>", "namespace and name"),
        ("<lora:>", "namespace and name"),
        ("<lora:ns/ink:much>", "not a finite number"),
        ("<lora:ns/ink:inf>", "not a finite number"),
        ("<lora:ns/ink:1:1:1>", "two weights"),
        ("<lora:ns/ink:1:dyn=4>", "'dyn' is unknown"),
        ("<hypernet:ns/ink:1>", "in adapters"),
    ],
)
def test_a_tag_that_cannot_be_read_is_refused(tag: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        parse_tags(tag)
    assert caught.value.fields["field"] == "prompt"
    assert tag in str(caught.value)
