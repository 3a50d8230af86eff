"""What the server refuses: an error with a code for its sender, and pictures for everybody else."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from scumble import Client
from scumble.request import Request

from .conftest import Stream


def text(value: str | bytes) -> np.ndarray:
    return np.array([value.encode() if isinstance(value, str) else value], np.object_)


def number(value: int) -> np.ndarray:
    return np.array([value], np.int64)


GOOD = Request(prompt="still here", seed=1, steps=1)
PROMPT = {"prompt": text("x")}
REFUSED = {
    "unknown adapter": ({"adapters": text('[{"ref": "l/none"}]')}, "not_found"),
    "malformed reference": ({"adapters": text('[{"ref": "not a ref@@"}]')}, "invalid_request"),
    "weight is no number": ({"adapters": text('[{"ref": "l/a", "weight": "much"}]')}, "invalid_request"),
    "adapters are no JSON": ({"adapters": text("[{")}, "invalid_request"),
    "a base as adapter": ({"adapters": text('[{"ref": "tiny/base"}]')}, None),
    "unknown base": ({"base": text("no/base")}, "not_found"),
    "an adapter as base": ({"base": text("l/a")}, None),
    "no multiple of eight": ({"width": number(65)}, "invalid_request"),
    "too large": ({"width": number(4096)}, "invalid_request"),
    "no steps": ({"steps": number(0)}, "invalid_request"),
    "steps beyond 32 bits": ({"steps": number(2**32 + 1)}, "invalid_request"),
    "width beyond 32 bits": ({"width": number(2**32 + 64)}, "invalid_request"),
    "unknown scheduler": ({"scheduler": text("magic")}, "invalid_request"),
    "unknown option": ({"options": text('{"magic": 1}')}, "invalid_request"),
    "no text": ({"prompt": text(b"\xff\xfe")}, "invalid_request"),
    "pictures": ({"images": text(b"\x89PNG")}, "invalid_request"),
    "tensors": ({"tensors": text(b"")}, "invalid_request"),
    "negative seed": ({"seed": np.array([-1], np.int64)}, "invalid_request"),
    "guidance is no number": ({"guidance_scale": np.array([np.nan], np.float32)}, "invalid_request"),
}


@pytest.mark.parametrize(("fields", "code"), REFUSED.values(), ids=REFUSED)
def test_a_bad_request_is_refused_with_a_code(
    infer_http: Callable[..., Any], infer_grpc: Callable[..., Any], fields: dict[str, np.ndarray], code: str | None
) -> None:
    for infer in (infer_http, infer_grpc):
        result = infer(PROMPT | fields)
        error = json.loads(result.as_numpy("error")[0])
        assert error["code"] == code or (code is None and error["code"] in {"refused", "invalid_request"})
        assert error["message"]
        assert result.as_numpy("receipt") is None
    assert infer_grpc(GOOD).as_numpy("images").shape == (1, 64, 64, 3)


def test_a_request_without_prompt_is_refused_with_a_code(infer_grpc: Callable[..., Any]) -> None:
    error = json.loads(infer_grpc({"steps": number(1)}).as_numpy("error")[0])
    assert error["code"] == "invalid_request"
    assert error["fields"]["field"] == "prompt"


MALFORMED = {
    "type": {"prompt": number(3)},
    "shape": {"prompt": np.array([b"a", b"b"], np.object_)},
    "unknown input": PROMPT | {"magic": text("x")},
}


@pytest.mark.parametrize("tensors", MALFORMED.values(), ids=MALFORMED)
def test_malformed_tensors_are_an_error_of_triton(
    infer_http: Callable[..., Any], infer_grpc: Callable[..., Any], tensors: dict[str, np.ndarray]
) -> None:
    for infer in (infer_http, infer_grpc):
        with pytest.raises(InferenceServerException):
            infer(tensors)
    assert infer_grpc(GOOD).as_numpy("images").shape == (1, 64, 64, 3)


def test_a_bad_request_leaves_the_others_on_its_stream_alone(stream: Stream) -> None:
    stream.send(Request(prompt="good", steps=20))
    stream.send(PROMPT | {"base": text("no/base")})
    outcomes = []
    while len(outcomes) < 2:
        outcomes.append(json.loads(stream.take_all()[-1].as_numpy("event")[0])["type"])
    assert sorted(outcomes) == ["done", "failed"]


def test_a_full_queue_says_when_to_come_again(infer_grpc: Callable[..., Any], client: Client) -> None:
    with ThreadPoolExecutor(24) as threads:
        results = list(threads.map(infer_grpc, [Request(prompt="x", steps=60)] * 24))
    errors = [json.loads(result.as_numpy("error")[0]) for result in results if result.as_numpy("error") is not None]
    assert len(errors) == 24 - 16
    assert {error["code"] for error in errors} == {"queue_full"}
    assert all(error["fields"]["retry_after"] > 0 for error in errors)
    assert client.stats().open_requests == 0


@pytest.mark.parametrize("call", ["load_model", "unload_model"])
def test_nobody_loads_models(http: Any, grpc: Any, call: str) -> None:
    for api in (http, grpc):
        with pytest.raises(InferenceServerException):
            getattr(api, call)("scumble")


def test_millions_of_values_are_refused_before_they_are_read(infer_grpc: Callable[..., Any]) -> None:
    values = np.full(2_000_000, b"", np.object_)
    with pytest.raises(InferenceServerException, match="images has 2000000 values, at most 1024 are read"):
        infer_grpc(PROMPT | {"images": values})
