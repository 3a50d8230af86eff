"""Every number of a request has a bound, or ends in an error that names it: a caller's mistake is never `internal`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scumble.errors import InvalidRequest, Refused, ScumbleError
from scumble.request import MAX_WEIGHT, Adapter, Request
from scumble_server.prompts.weights import check_weight
from scumble_server.request.extremes import not_finite
from support.running import Running

PLAIN: dict[str, Any] = {"prompt": "an apple", "seed": 1, "steps": 2, "width": 64, "height": 64}
NUMBERS = st.floats() | st.sampled_from([1e300, -1e300, 1e39, 65504.0, 1e5, MAX_WEIGHT, -MAX_WEIGHT, 0.0, 1e-300])


def draw(running: Running, fields: dict[str, Any]) -> ScumbleError | None:
    """Return the error, if there is one."""
    try:
        running.run([Request.parse({**PLAIN, **fields})])
    except ScumbleError as error:
        return error
    return None


def prompts(number: float) -> dict[str, tuple[str, str]]:
    """The number in each place of each grammar."""
    written = f"{number:.60f}".rstrip("0") if abs(number) < 1e300 else "9" * 300
    return {
        "emphasis": ("webui", f"a (red:{written}) apple"),
        "and": ("webui", f"an apple AND a boat :{written}"),
        "tag": ("webui", f"an apple <lora:l/a:{number}>"),
        "compel": ("compel", f"a (red){written} apple"),
        "blend": ("compel", f'("an apple", "a boat").blend({written}, 1)'),
        "conjunction": ("compel", f'("an apple", "a boat").and({written}, 1)'),
    }


@given(number=NUMBERS, where=st.sampled_from(["weight", "text_weight", "blocks", "guidance", *prompts(1.0)]))
@settings(max_examples=80, deadline=None)
def test_any_number_is_drawn_or_refused_by_name(running: Running, number: float, where: str) -> None:
    fields: dict[str, Any]
    if where == "guidance":
        fields = {"guidance_scale": number}
    elif where == "blocks":
        fields = {"adapters": [{"ref": "l/a", "blocks": {"mid_block": number}}]}
    elif where in ("weight", "text_weight"):
        fields = {"adapters": [{"ref": "l/a", where: number}]}
    else:
        grammar, prompt = prompts(number)[where]
        fields = {"prompt": prompt, "options": {"grammar": grammar, "lora_tags": grammar == "webui"}}
    error = draw(running, fields)
    assert error is None or isinstance(error, InvalidRequest | Refused), error
    assert error is None or error.fields["field"], error.message
    if where in ("weight", "text_weight", "blocks", "guidance"):
        assert error is not None or abs(number) <= MAX_WEIGHT


@pytest.mark.parametrize(
    ("grammar", "prompt", "says"),
    [
        ("webui", "(" * 5000 + "a", r"'a' has the weight 9\.19233e\+206"),
        ("webui", "(a:" + "9" * 39 + ")", r"'a' has the weight 1e\+39"),
        ("webui", "(" * 60 + "a red boat", "'a red boat' has the weight 304"),
        ("webui", "a boat AND a cat :101", "' ?a cat' has the weight 101"),
        ("webui", "a boat <lora:l/a:101>", "'101' is not a finite number up to 100"),
        ("compel", '("a","b").blend(0,0)', "'a' has the weight inf"),
        ("compel", '("a","b").blend(100,-99.99)', "'a' has the weight 10000"),
        ("compel", "a (red)101 boat", "'red' has the weight 101"),
        ("compel", '("a","b").and(1000, 1)', "'a' has the weight 1000"),
    ],
)
def test_weights_of_words_are_bounded_in_every_grammar(running: Running, grammar: str, prompt: str, says: str) -> None:
    options = {"grammar": grammar, "lora_tags": grammar == "webui"}
    with pytest.raises(InvalidRequest, match=says) as caught:
        running.run([Request.parse({**PLAIN, "prompt": prompt, "options": options})])
    assert caught.value.fields["field"] == "prompt"


def test_long_words_are_cut_in_a_message() -> None:
    with pytest.raises(InvalidRequest, match=r"'a{40}…' has the weight nan"):
        check_weight(float("nan"), "a" * 5000, "prompt")


@pytest.mark.parametrize("scale", [1e300, (1.0, float("nan")), {"up": {"block_1": [0.0, 101.0]}}])
def test_scales_are_bounded_wherever_they_are_nested(scale: object) -> None:
    with pytest.raises(InvalidRequest, match="between -100 and 100") as caught:
        Request.parse({**PLAIN, "adapters": [{"ref": "l/a", "scale": scale}]})
    assert caught.value.fields["field"].startswith("adapters.0.scale")


@pytest.mark.parametrize("value", [1e5, np.inf, np.nan])
def test_tensors_hold_numbers_that_encoders_make(running: Running, value: float) -> None:
    fields = {"adapters": [{"ref": "l/a", "images": ["a"]}], "tensors": {"a": np.full((1, 4), value, np.float32)}}
    error = draw(running, fields)
    assert isinstance(error, InvalidRequest)
    assert error.fields["field"] == "tensors.a"


@pytest.mark.parametrize(
    ("fields", "kind", "says"),
    [
        ({"adapters": [Adapter(ref="l/a", weight=50)]}, InvalidRequest, "l/a has the weight 50, which is far from"),
        ({"adapters": [Adapter(ref="l/a", blocks=(4.0, 1.0))]}, InvalidRequest, "l/a has a block weight of 4"),
        ({"guidance_scale": 90.0}, InvalidRequest, "guidance_scale is 90"),
        ({"adapters": [Adapter(ref="l/a"), Adapter(ref="l/b")]}, Refused, r"\(l/a, l/b\) does not suit this base"),
        ({"options": {"grammar": "webui"}}, InvalidRequest, "weight the words of the prompt less"),
        ({}, ScumbleError, "the server's precision"),
    ],
)
def test_a_picture_that_becomes_nan_is_told_with_what_is_extreme_in_its_request(
    fields: dict[str, Any], kind: type[ScumbleError], says: str
) -> None:
    error = not_finite(3, Request.parse({**PLAIN, **fields}))
    assert type(error) is kind
    assert error.message.startswith("the picture became NaN or infinite in step 3; ")
    with pytest.raises(kind, match=says):
        raise error


def test_the_loop_tells_it_so(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = running.executor
    denoise = executor.denoise
    monkeypatch.setattr(executor, "denoise", lambda *step: torch.full_like(denoise(*step), torch.nan))
    error = draw(running, {"adapters": [{"ref": "l/a", "weight": 50}], "steps": 3})
    assert isinstance(error, InvalidRequest)
    assert error.fields["field"] == "adapters.0.weight"


def test_a_vae_that_overflows_is_told_and_draws_no_black_picture(running: Running) -> None:
    vae = running.executor.vae
    with pytest.raises(Refused, match=r"the VAE made NaN or infinite pixels in float32: name one in options\.vae"):
        vae.decode(torch.full((1, 4, 8, 8), 3e38))
