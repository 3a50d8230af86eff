"""Whoever comes from another program is told the right name."""

from __future__ import annotations

from typing import Any

import pytest

from scumble.errors import InvalidRequest
from scumble.request import Adapter, Options, Request, check_field_names
from scumble.suggestions import ELSEWHERE


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"num_inference_steps": 3}, "num_inference_steps: is unknown; did you mean steps?"),
        ({"denoising_strength": 0.3}, "did you mean options.strength?"),
        ({"size": "64x64"}, "did you mean width and height?"),
        ({"options": {"cfg": 3}}, "options.cfg: is unknown; there are priority"),
        ({"options": {"strenght": 0.3}}, "did you mean strength?"),
        ({"options": {"hires": {"scal": 2}}}, "did you mean scale?"),
        ({"adapters": [{"ref": "l/a", "strength": 1}]}, "adapters.0.strength: is unknown; did you mean weight?"),
        ({"adapters": [{"ref": "l/a", "timestep_range": 1}]}, "did you mean start and end?"),
    ],
)
def test_the_right_name_is_told(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says.replace("?", r"\?")):
        Request.parse({"prompt": "x", **given})


def test_each_name_from_elsewhere_has_a_right_one_that_exists() -> None:
    fields = {*Request.model_fields, *(f"options.{name}" for name in Options.model_fields), *Adapter.model_fields}
    for right in ELSEWHERE.values():
        assert {*right.split(" and ")} <= fields, right


def test_what_is_a_field_passes() -> None:
    check_field_names(["prompt", "steps", "options"])
    with pytest.raises(InvalidRequest, match=r"did you mean options\.eta"):
        check_field_names(["eta"])


def test_an_adapter_may_be_text() -> None:
    request = Request.parse({"prompt": "x", "adapters": ["l/a@2:0.8", {"ref": "l/b"}, "l/c"]})
    assert [(each.ref, each.weight) for each in request.adapters] == [("l/a@2", 0.8), ("l/b", 1.0), ("l/c", 1.0)]
    with pytest.raises(InvalidRequest, match="not a finite number"):
        Request.parse({"prompt": "x", "adapters": ["l/a:much"]})
