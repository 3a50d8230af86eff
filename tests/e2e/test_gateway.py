"""The gateway in front of a real server, as product backends call it: plain HTTP, openai, a lost connection."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from scumble import Client
from scumble_server.triton.running import RunningServer

SCUMBLE = str(Path(sys.executable).with_name("scumble"))
SMALL: dict[str, Any] = {"prompt": "a red apple", "seed": 3, "steps": 4, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def url(server: RunningServer) -> Iterator[str]:
    command = [SCUMBLE, "gateway", "--grpc", server.grpc_url, "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = json.loads(process.stdout.readline())["gateway"]
            wait_until(lambda: httpx.get(f"{address}/readyz").status_code == 200)
            yield address
        finally:
            process.terminate()


def wait_until(true: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def web(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def their(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none")


def picture(content: bytes | str | None) -> Image.Image:
    """Of a file, or of its base64."""
    assert content is not None
    file = base64.b64decode(content) if isinstance(content, str) else content
    return Image.open(io.BytesIO(file)).convert("RGB")


def pixels(answer: dict[str, Any]) -> list[bytes]:
    """Files differ by the times in their receipts."""
    return [picture(each).tobytes() for each in answer["images"]]


def test_json_has_the_files_and_the_receipt_of_the_same_request_over_grpc(web: httpx.Client, client: Client) -> None:
    asked = {**SMALL, "num_images": 2, "adapters": ["l/a:0.5"]}
    answer = web.post("/v1/generate", json=asked)
    assert answer.status_code == 200
    assert answer.headers["x-request-id"]
    found, expected = answer.json(), client.images.generate(**asked).pil()
    assert pixels(found) == [each.tobytes() for each in expected]
    assert found["receipt"]["seeds"] == [3, 4]
    assert found["receipt"]["adapters"][0]["name"] == "l/a"


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_accept_says_what_comes(web: httpx.Client, kind: str) -> None:
    answer = web.post("/v1/generate", json=SMALL, headers={"Accept": f"image/{kind}"})
    assert answer.headers["content-type"] == f"image/{kind}"
    assert Image.open(io.BytesIO(answer.content)).format == kind.upper()


def test_an_input_picture_in_base64(web: httpx.Client) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    asked = {**SMALL, "options": {"image": "start", "strength": 0.5}}
    plain, as_url = (
        pixels(web.post("/v1/generate", json={**asked, "images": {"start": each}}).json())
        for each in (text, f"data:image/png;base64,{text}")
    )
    assert plain == as_url
    refused = web.post("/v1/generate", json={**asked, "images": {"start": "not base64!"}})
    assert (refused.status_code, refused.json()["field"]) == (400, "images")


def test_events_tell_steps_and_previews_and_end_with_the_same_json(web: httpx.Client) -> None:
    asked = {**SMALL, "options": {"preview_every": 2}}
    with web.stream("POST", "/v1/generate", json=asked, headers={"Accept": "text/event-stream"}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = events_of("".join(answer.iter_text()))
    names = [name for name, _ in events]
    assert names[-1] == "done"
    assert {"step", "preview"} < set(names)
    assert pixels(events[-1][1]) == pixels(web.post("/v1/generate", json=SMALL).json())
    (preview,) = [data for name, data in events if name == "preview"][:1]
    assert picture(preview["images"][0]).size == (8, 8)


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    blocks = [block.split("\n") for block in text.split("\n\n") if block.startswith("event:")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"setps": 4}, 400, "did you mean steps"),
        ({"steps": 0}, 400, "steps"),
        ({"adapters": ["no/such"]}, 404, "no/such"),
        ({"base": "no/base"}, 404, "no/base"),
        ({"options": {"deadline_ms": 1}, "steps": 500}, 504, "deadline"),
        ({"tensors": {}}, 400, "over gRPC only"),
    ],
)
def test_errors_have_true_statuses_and_say_what_to_do(
    web: httpx.Client, changes: dict[str, Any], status: int, says: str
) -> None:
    answer = web.post("/v1/generate", json={**SMALL, **changes})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    told = answer.json()
    assert told["status"] == status
    assert says in told["detail"]
    assert told["request_id"] == answer.headers["x-request-id"]


def test_errors_in_a_stream_are_told_as_its_last_event(web: httpx.Client) -> None:
    asked = {**SMALL, "adapters": ["no/such"]}
    answer = web.post("/v1/generate", json=asked, headers={"Accept": "text/event-stream"})
    assert [(name, data["code"]) for name, data in events_of(answer.text)] == [("failed", "not_found")]


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_a_closed_connection_cancels(url: str, client: Client, accept: str) -> None:
    before = client.stats()
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    body = json.dumps({**SMALL, "steps": 500})
    connection.request("POST", "/v1/generate", body, {"Content-Type": "application/json", "Accept": accept})
    wait_until(lambda: client.stats().steps > before.steps + 2)
    connection.sock.close()
    wait_until(lambda: client.stats().open_requests == 0, 5)
    after = client.stats()
    assert after.steps - before.steps < 450
    assert after.failed == before.failed + 1


def test_openais_client_draws(their: openai.OpenAI, web: httpx.Client) -> None:
    extra = {"seed": 3, "steps": 4, "guidance_scale": 2.0}
    found = their.images.generate(
        model="tiny/base+l/a:0.5", prompt="a red apple", size="64x64", n=2, response_format="b64_json", extra_body=extra
    )
    same = web.post("/v1/generate", json={**SMALL, **extra, "adapters": ["l/a:0.5"], "num_images": 2}).json()
    assert found.data is not None
    assert [picture(each.b64_json).tobytes() for each in found.data] == pixels(same)
    assert found.size == "64x64"


def test_openais_client_streams(their: openai.OpenAI) -> None:
    events = list(
        their.images.generate(
            prompt="a red apple", size="64x64", stream=True, partial_images=2, extra_body={"steps": 6, "seed": 1}
        )
    )
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:-1]] == [0, 1]  # type: ignore[union-attr]
    assert picture(events[-1].b64_json).size == (64, 64)


def test_openais_async_client_draws_several_at_once(url: str) -> None:
    async def draw() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as their:
            asked = [
                their.images.generate(prompt="a red apple", size="64x64", extra_body={"steps": 4, "seed": seed})
                for seed in range(4)
            ]
            return await asyncio.gather(*asked)

    drawn = [answer.data[0].b64_json for answer in asyncio.run(draw())]
    assert len(set(drawn)) == 4


def file_of(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


RED = file_of(Image.new("RGB", (64, 64), (200, 40, 40)))
LEFT = Image.new("L", (64, 64), 0)
LEFT.paste(255, (0, 0, 32, 64))
TRANSPARENT_LEFT = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
TRANSPARENT_LEFT.putalpha(Image.eval(LEFT, lambda value: 255 - value))


@pytest.mark.parametrize("mask", [None, "transparent", "white"])
def test_openais_client_edits(their: openai.OpenAI, web: httpx.Client, mask: str | None) -> None:
    given = {"transparent": TRANSPARENT_LEFT, "white": LEFT}
    files = {} if mask is None else {"mask": ("mask.png", file_of(given[mask]), "image/png")}
    edited = their.images.edit(
        image=("red.png", RED, "image/png"),
        prompt="a red apple",
        size="64x64",
        n=2,
        extra_body={"seed": 3, "steps": 4, "options": {"strength": 0.5}, "adapters": ["l/a:0.5"]},
        **files,  # type: ignore[arg-type]
    )
    options = {"image": "image", "strength": 0.5} | ({} if mask is None else {"mask": "mask"})
    images = {"image": RED} | ({} if mask is None else {"mask": file_of(LEFT)})
    same = web.post(
        "/v1/generate",
        json={
            **SMALL,
            "num_images": 2,
            "adapters": ["l/a:0.5"],
            "options": options,
            "images": {name: base64.b64encode(content).decode() for name, content in images.items()},
        },
    ).json()
    assert edited.data is not None
    assert [picture(each.b64_json).tobytes() for each in edited.data] == pixels(same)


def test_openais_client_draws_variations(their: openai.OpenAI) -> None:
    varied = their.images.create_variation(image=RED, n=2, size="64x64", extra_body={"steps": 4})  # type: ignore[arg-type]
    assert varied.data is not None
    assert len({each.b64_json for each in varied.data}) == 2


def test_openais_client_streams_edits(their: openai.OpenAI) -> None:
    asked = {"steps": 6, "options": {"strength": 1.0}}
    events = list(
        their.images.edit(image=RED, prompt="a", size="64x64", stream=True, partial_images=1, extra_body=asked)
    )
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_edits_that_cannot_be_are_refused_by_name(their: openai.OpenAI, web: httpx.Client) -> None:
    for changes, param in (
        ({"mask": b"no picture"}, "mask"),
        ({"image": b"no picture"}, None),
        ({"extra_body": {"markup": "x"}}, "markup"),
        ({"extra_body": {"steps": "many"}}, "steps"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            their.images.edit(**{"image": RED, "prompt": "a", "size": "64x64", **changes})  # type: ignore[call-overload]
        assert param is None or refused.value.param == param
    form = {"Content-Type": "multipart/form-data"}
    assert web.post("/v1/images/edits", content=b"x", headers=form).status_code == 400
    assert web.post("/v1/images/edits", json={"prompt": "a"}).json()["error"]["param"] == "Content-Type"


def test_openais_client_raises_its_own_errors(their: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        their.images.generate(prompt="a", background="transparent")
    assert refused.value.param == "background"
    with pytest.raises(openai.BadRequestError, match="did you mean steps"):
        their.images.generate(prompt="a", extra_body={"setps": 3})
    with pytest.raises(openai.NotFoundError):
        their.images.generate(prompt="a", model="no/base")
    with pytest.raises(openai.BadRequestError, match="b64_json"):
        their.images.generate(prompt="a", response_format="url")


def test_openais_client_lists_the_bases(their: openai.OpenAI) -> None:
    assert [model.id for model in their.models.list()] == ["tiny/base"]
    assert their.models.retrieve("tiny/base").owned_by == "scumble"
    with pytest.raises(openai.NotFoundError):
        their.models.retrieve("dall-e-3")


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Host": ""}]
)
def test_a_page_in_the_browser_cannot_call(web: httpx.Client, headers: dict[str, str]) -> None:
    for answer in (web.post("/v1/generate", json=SMALL, headers=headers), web.get("/v1/models", headers=headers)):
        assert answer.status_code == 421
        assert answer.json()["code"] == "refused"


def test_a_page_of_this_machine_may(web: httpx.Client, url: str) -> None:
    assert web.get("/v1/models", headers={"Origin": url}).status_code == 200


def test_health_and_documentation(web: httpx.Client) -> None:
    assert web.get("/healthz").json() == {"status": "ok"}
    assert web.get("/readyz").json() == {"status": "ready"}
    paths = web.get("/openapi.json").json()["paths"]
    assert {"/v1/generate", "/v1/images/generations", "/v1/models"} <= paths.keys()
    assert web.get("/no/such").headers["content-type"] == "application/problem+json"
