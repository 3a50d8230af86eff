"""What a request brings beside words is decoded once, and all that is brought is named by something."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scumble.errors import InvalidRequest
from scumble.request import Request
from scumble_server.admission.inputs import Inputs


def png(colour: str = "red", size: tuple[int, int] = (9, 5)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, "PNG")
    return content.getvalue()


def request(**changes: Any) -> Request:
    return Request.parse({"prompt": "a", **changes})


def test_pictures_are_decoded_and_the_original_is_one_of_them() -> None:
    asked = request(images={"a": png(), "m": png("white")}, options={"image": "a", "mask": "m"})
    inputs = Inputs.of(asked, inpaints=False)
    assert inputs.pictures["a"].pixels.shape == (5, 9, 3)
    assert inputs.original is not None
    assert inputs.original.picture is inputs.pictures["a"]
    assert inputs.original.mask is inputs.pictures["m"]
    assert Inputs.of(request(), inpaints=False).original is None


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        ({"images": {"a": png()}}, "images.a", "nothing names it"),
        ({"tensors": {"t": np.ones(2, np.float32)}}, "tensors.t", "nothing names it"),
        (
            {"images": {"a": png()}, "tensors": {"a": np.ones(2, np.float32)}, "options": {"image": "a"}},
            "images",
            "a picture and a tensor",
        ),
        ({"options": {"image": "b"}}, "options.image", "does not bring"),
        ({"images": {"a": png()}, "options": {"image": "a", "mask": "b"}}, "options.mask", "its pictures are"),
        (
            {"tensors": {"t": np.array([np.nan], np.float32)}, "adapters": [{"ref": "a/b", "images": ["t"]}]},
            "tensors.t",
            "finite",
        ),
        (
            {"tensors": {"t": np.array([1])}, "adapters": [{"ref": "a/b", "images": ["t"]}]},
            "tensors.t",
            "floating point",
        ),
        ({"images": {"a": b"no"}, "options": {"image": "a"}}, "images.a", "no picture"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(changes: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as refused:
        Inputs.of(request(**changes), inpaints=False)
    assert refused.value.fields["field"] == field


def test_a_base_that_fills_masks_needs_one() -> None:
    with pytest.raises(InvalidRequest, match="fills masked parts"):
        Inputs.of(request(), inpaints=True)
