"""Requests: equal where they would be drawn the same, and every bad field is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scumble.errors import InvalidRequest
from scumble.request import MAX_ADAPTERS, Adapter, Request, parse_adapter


def test_requests_are_equal_where_tensors_have_equal_values() -> None:
    def request(*values: float) -> Request:
        return Request(prompt="a", tensors={"t": np.array(values)})

    assert request(1, 2) == request(1, 2)
    assert request(1, 2) != request(1, 3)
    assert request(1, 2) != Request(prompt="a")
    assert request(1, 2) != "a"
    with pytest.raises(TypeError):
        hash(request(1))


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "width": 12}, "width"),
        ({"prompt": "a", "steps": 0}, "steps"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale"),
        ({"prompt": "a", "size": 8}, "size"),
        ({"prompt": "a", "options": {"tiling": True}}, "options.tiling"),
        ({"prompt": "a", "options": {"hires": {"scale": 1.0}}}, "options.hires.scale"),
        ({"prompt": "a", "adapters": [{"ref": "a/b", "start": 2}]}, "adapters.0.start"),
        ({"prompt": "a", "adapters": [{"ref": "a/b", "token": " "}]}, "adapters.0.token"),
        ({"prompt": "a", "adapters": [{"ref": "a/b"}] * (MAX_ADAPTERS + 1)}, "adapters"),
    ],
)
def test_a_bad_field_is_named(data: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        Request.parse(data)
    assert refused.value.fields["field"] == field


def test_all_bad_fields_are_named_at_once() -> None:
    with pytest.raises(InvalidRequest, match=r"width: .*; steps: |steps: .*; width: "):
        Request.parse({"prompt": "a", "width": 12, "steps": 0})


def test_one_picture_may_be_named_without_a_list() -> None:
    assert Adapter.model_validate({"ref": "a/b", "image": "x", "mask": "y"}) == Adapter(
        ref="a/b", images=("x",), masks=("y",)
    )


@given(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1))
def test_an_adapter_acts_in_one_stretch_of_steps(steps: int, one: float, other: float) -> None:
    start, end = sorted((one, other))
    active = [Adapter(ref="a/b", start=start, end=end).is_active(step, steps) for step in range(steps)]
    text = "".join("x" if each else "." for each in active)
    assert "x" not in text.strip(".").replace("x", "") and "." not in text.strip(".")
    assert all(Adapter(ref="a/b").is_active(step, steps) for step in range(steps))


@pytest.mark.parametrize(
    ("text", "ref", "weight"),
    [
        ("styles/ink", "styles/ink", 1.0),
        ("styles/ink@2:0.8", "styles/ink@2", 0.8),
        ("styles/ink:-1", "styles/ink", -1.0),
        ("styles/ink@sha256:abcd", "styles/ink@sha256:abcd", 1.0),
        ("styles/ink@sha256:abcd:0.5", "styles/ink@sha256:abcd", 0.5),
    ],
)
def test_an_adapter_on_the_command_line(text: str, ref: str, weight: float) -> None:
    adapter = parse_adapter(text)
    assert (adapter.ref, adapter.weight) == (ref, weight)


@pytest.mark.parametrize("text", ["styles/ink:much", "styles/ink:", "styles/ink:nan", "styles/ink:inf"])
def test_a_weight_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="REF:WEIGHT"):
        parse_adapter(text)
