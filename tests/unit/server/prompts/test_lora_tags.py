"""LoRAs that a prompt names become adapters of the request, where it says so; elsewhere a tag is refused."""

from __future__ import annotations

from typing import Any

import pytest

from scumble.errors import InvalidRequest
from scumble.request import Request
from scumble_server.prompts.lora_tags import without_tags

TAGGED = "a red <lora:styles/ink:0.8> apple <lora:styles/oil:0.5:0.2>"


def request(prompt: str, **changes: Any) -> Request:
    options = {"grammar": "webui", "lora_tags": True, **changes.pop("options", {})}
    return Request.parse({"prompt": prompt, "options": options, **changes})


def test_tags_become_adapters_behind_those_that_are_asked_for() -> None:
    made = without_tags(request(TAGGED, adapters=[{"ref": "styles/wash"}], seed=3))
    assert [adapter.ref for adapter in made.adapters] == ["styles/wash", "styles/ink", "styles/oil"]
    assert made.adapters[1].weight == 0.8
    assert "<lora" not in made.prompt and "red" in made.prompt and "apple" in made.prompt
    assert made.seed == 3


def test_what_it_makes_has_no_tags_left() -> None:
    once = without_tags(request(TAGGED))
    assert without_tags(once) == once


def test_other_grammars_read_a_tag_as_text() -> None:
    plain = request(TAGGED, options={"grammar": "plain", "lora_tags": False})
    assert without_tags(plain) is plain


def test_a_prompt_without_tags_stays_as_it_is() -> None:
    asked = request("a (red:1.2) apple")
    assert without_tags(asked) is asked


@pytest.mark.parametrize(
    ("asked", "field", "says"),
    [
        (request(TAGGED, options={"lora_tags": False}), "prompt", "set the option lora_tags"),
        (request("a", negative_prompt="<lora:styles/ink:1>"), "negative_prompt", "in the prompt alone"),
    ],
)
def test_tags_that_would_not_act_are_refused(asked: Request, field: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as refused:
        without_tags(asked)
    assert refused.value.fields["field"] == field
