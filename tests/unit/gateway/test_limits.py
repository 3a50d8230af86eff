"""Bodies beyond a limit, and those that are no request, end typed before any work; nothing reaches the model."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from scumble import errors
from scumble.errors import ScumbleError
from scumble_gateway import bodies, problems
from scumble_gateway.app import create_app
from scumble_gateway.openai_images import to_our_request


class NoModel:
    """Nothing is to be drawn."""

    def draw(self, *_: Any) -> Any:
        raise AssertionError("the model was asked")

    async def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[TestClient]:
    with TestClient(create_app(NoModel()), base_url="http://127.0.0.1") as client:  # type: ignore[arg-type]
        yield client


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 400, "not JSON"),
        (b"[]", 400, "must be a JSON object"),
        (b"{", 400, "not JSON"),
        (b'{"prompt": NaN}', 400, "NaN"),
        (b"\xff", 400, "not JSON"),
        (b"[" * 15_000, 400, "not JSON"),
        (b'{"a":' + b"[" * 5_000 + b"]" * 5_000 + b"}", 400, "not JSON"),
        (b"[" + b"0," * 30_000 + b"0]", 413, "more than 20000 values"),
        (b'{"prompt": "' + b"a" * (1 << 20) + b'"}', 413, "at most 524288"),
    ],
)
def test_a_bad_body(web: TestClient, monkeypatch: pytest.MonkeyPatch, body: bytes, status: int, says: str) -> None:
    monkeypatch.setattr(bodies, "MAX_BODY_BYTES", 1 << 19)
    answer = web.post("/v1/generate", content=body, headers=JSON)
    assert answer.status_code == status
    assert says in answer.json()["detail"]


def test_a_body_without_a_length_is_counted_as_it_comes(web: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_BODY_BYTES", 1000)
    chunks = (b"a" * 100 for _ in range(100))
    assert web.post("/v1/generate", content=chunks, headers=JSON).status_code == 413


def test_another_type_is_refused(web: TestClient) -> None:
    answer = web.post("/v1/generate", data={"prompt": "a"})
    assert (answer.status_code, answer.json()["field"]) == (400, "Content-Type")


@pytest.mark.parametrize("accept", ["text/html", "image/gif"])
def test_what_is_not_offered_is_told(web: TestClient, accept: str) -> None:
    answer = web.post("/v1/generate", json={"prompt": "a"}, headers={"Accept": accept})
    assert answer.status_code == 400
    assert "text/event-stream" in answer.json()["detail"]


def test_an_image_type_holds_one_image(web: TestClient) -> None:
    answer = web.post("/v1/generate", json={"prompt": "a", "num_images": 2}, headers={"Accept": "image/png"})
    assert answer.json()["field"] == "num_images"
    asked = {"prompt": "a", "options": {"format": "webp"}}
    assert web.post("/v1/generate", json=asked, headers={"Accept": "image/png"}).json()["field"] == "options.format"


def kinds(kind: type[ScumbleError] = ScumbleError) -> Iterator[type[ScumbleError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from kinds(below)


@pytest.mark.parametrize("kind", list(kinds()))
def test_every_error_has_a_status_of_its_own(kind: type[ScumbleError]) -> None:
    answer = problems.problem(kind("why", field="f"), "id")
    assert answer.status_code == problems.STATUS[kind.code]
    assert ("retry-after" in answer.headers) == (kind.code in ("queue_full", "unavailable"))


def test_the_wait_that_a_server_asks_for_is_rounded_up() -> None:
    assert problems.problem(errors.QueueFull("full", retry_after=1.2), "id").headers["retry-after"] == "2"


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"size": "64"}, "size"),
        ({"size": "64x" + "9" * 5000}, "size"),
        ({"size": "63x64"}, "width"),
        ({"n": 17}, "num_images"),
        ({"n": "many"}, "num_images"),
        ({"style": "vivid"}, "style"),
        ({"quality": "hd"}, "quality"),
        ({"moderation": "low"}, "moderation"),
        ({"partial_images": 2}, "partial_images"),
        ({"partial_images": 9, "stream": True}, "partial_images"),
        ({"output_compression": 50}, "output_compression"),
        ({"output_compression": 50, "options": {"format": "png"}}, "output_compression"),
        ({"output_format": "png", "options": {"format": "webp"}}, "options.format"),
        ({"output_format": "gif"}, "output_format"),
        ({"model": 7}, "model"),
        ({"adapters": "l/a"}, "adapters"),
        ({"options": []}, "options"),
        ({"tensors": {}}, "tensors"),
    ],
)
def test_what_openai_has_and_we_have_not_is_refused_by_name(asked: dict[str, Any], field: str) -> None:
    with pytest.raises(errors.InvalidRequest) as refused:
        to_our_request({"prompt": "a", **asked})
    assert refused.value.fields["field"] == field


def test_openais_fields_become_ours() -> None:
    asked = {
        "model": "sd/v1-5+styles/ink@3:0.8+sd/more",
        "prompt": "a",
        "n": 3,
        "size": "512x768",
        "output_format": "webp",
        "output_compression": 70,
        "stream": True,
        "partial_images": 3,
        "steps": 40,
        "user": "someone",
        "background": "auto",
    }
    request = to_our_request(asked)
    assert (request.base, request.num_images, request.width, request.height) == ("sd/v1-5", 3, 512, 768)
    assert [(adapter.ref, adapter.weight) for adapter in request.adapters] == [("styles/ink@3", 0.8), ("sd/more", 1.0)]
    options = request.options
    assert (options.format, options.quality, options.preview_every) == ("webp", 70, 10)


def posted(web: TestClient, fields: list[tuple[str, str]], files: list[tuple[str, bytes]]) -> Any:
    parts = [(name, (None, value)) for name, value in fields] + [(name, ("f", value)) for name, value in files]
    return web.post("/v1/images/edits", files=parts).json()["error"]


@pytest.mark.parametrize(
    ("fields", "files", "says"),
    [
        ([("prompt", "a")], [], "image: takes a picture's file"),
        ([("prompt", "a"), ("prompt", "b")], [("image", b"x")], "prompt: is given twice"),
        ([("options[a]", "1"), ("options[]", "2")], [("image", b"x")], "as a list and as an object"),
        ([("adapters", "[")], [("image", b"x")], "adapters: not JSON"),
        ([("prompt", "a")], [("image", b"x"), ("other", b"x")], "other: takes no file"),
        ([("prompt", "a")], [("image", b"x"), ("mask", b"x"), ("mask", b"x")], "mask: takes one file"),
        ([("prompt", "a")], [("image", b"x")] * 17, "Too many files"),
        ([(f"a{number}", "b") for number in range(101)], [("image", b"x")], "Too many fields"),
    ],
)
def test_a_bad_form(web: TestClient, fields: list[tuple[str, str]], files: list[tuple[str, bytes]], says: str) -> None:
    assert says in posted(web, fields, files)["message"]


def test_a_large_mask_is_refused_before_it_is_decoded(web: TestClient) -> None:
    buffer = io.BytesIO()
    Image.new("LA", (5000, 5000)).save(buffer, "PNG")
    answer = web.post("/v1/images/edits", data={"prompt": "a"}, files={"image": b"x", "mask": buffer.getvalue()})
    assert answer.status_code == 413


def test_our_own_format_stands_where_openais_is_not_given() -> None:
    for asked in ({"options": {"format": "webp"}}, {"output_format": None, "options": {"format": "webp"}}):
        request = to_our_request({"prompt": "a", "output_compression": 70, **asked})
        assert (request.options.format, request.options.quality) == ("webp", 70)
