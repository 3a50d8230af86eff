"""Model `scumble`: one request, one response, over HTTP and gRPC, from NVIDIA's own clients."""

from __future__ import annotations

import base64
import io
import json
import queue
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from PIL import Image

from scumble import Client
from scumble.request import Adapter, Options, Request
from scumble_server.triton.running import RunningServer
from support.every_kind import coarse_png

from .conftest import inputs_of
from .test_stream import wait_until

APPLE = Request(prompt="a red apple", seed=7, steps=4, num_images=2)


def test_http_and_grpc_answer_with_the_same_pictures(
    infer_http: Callable[..., Any], infer_grpc: Callable[..., Any]
) -> None:
    over_http, over_grpc = infer_http(APPLE), infer_grpc(APPLE)
    assert over_http.as_numpy("images").shape == (2, 64, 64, 3)
    assert over_http.as_numpy("images").dtype == np.uint8
    np.testing.assert_array_equal(over_http.as_numpy("images"), over_grpc.as_numpy("images"))
    assert over_http.as_numpy("error") is None


def test_the_stream_makes_the_same_pictures(infer_grpc: Callable[..., Any], client: Client) -> None:
    np.testing.assert_array_equal(infer_grpc(APPLE).as_numpy("images"), client.images.generate(APPLE).images)


def test_the_receipt_comes_along(infer_http: Callable[..., Any]) -> None:
    request = APPLE.model_copy(update={"adapters": (Adapter(ref="l/a", weight=0.5),)})
    receipt = json.loads(infer_http(request).as_numpy("receipt")[0])
    assert receipt["request"]["seed"] == 7
    assert receipt["adapters"][0]["ref"].startswith("l/a")


@pytest.mark.parametrize("protocol", ["infer_http", "infer_grpc"])
def test_eight_at_once_share_steps(protocol: str, request: pytest.FixtureRequest, client: Client) -> None:
    infer = request.getfixturevalue(protocol)
    adapters = [(), (Adapter(ref="l/a"),), (Adapter(ref="l/b", weight=0.3),), (Adapter(ref="l/a"), Adapter(ref="l/b"))]
    requests = [
        Request(prompt=f"number {i}", seed=i, steps=30 + i, adapters=adapters[i % len(adapters)]) for i in range(8)
    ]
    before = client.stats()
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(infer, requests))
    after = client.stats()
    assert all(result.as_numpy("images").shape == (1, 64, 64, 3) for result in results)
    assert after.images - before.images == 8
    assert after.mixed_steps > before.mixed_steps
    assert after.steps - before.steps < sum(each.steps or 0 for each in requests)


def test_an_empty_prompt_is_a_prompt(infer_http: Callable[..., Any]) -> None:
    assert infer_http(Request(prompt="", steps=1)).as_numpy("images").shape == (1, 64, 64, 3)


def test_curl_is_client_enough(server: RunningServer) -> None:
    body = json.dumps({"prompt": "a red apple", "steps": 1, "width": 8, "height": 8, "seed": 1}).encode()
    call = urllib.request.Request(f"{server.http_url}/v2/models/scumble/generate", body)
    with urllib.request.urlopen(call, timeout=60) as response:
        answer = json.load(response)
    assert len(answer["images"]) == 8 * 8 * 3
    assert json.loads(answer["receipt"])["request"]["seed"] == 1


def generate(server: RunningServer, model: str = "scumble", **body: Any) -> dict[str, Any]:
    call = urllib.request.Request(
        f"{server.http_url}/v2/models/{model}/generate", json.dumps({"steps": 1, "seed": 7} | body).encode()
    )
    with urllib.request.urlopen(call, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


@pytest.mark.parametrize(
    ("field", "right"),
    [
        ("lora", "adapters"),
        ("negative", "negative_prompt"),
        ("num_inference_steps", "steps"),
        ("strength", "options.strength"),
        ("hieght", "height"),
    ],
)
@pytest.mark.parametrize("model", ["scumble", "scumble_stream"])
def test_an_unknown_field_is_refused_with_the_right_one(
    server: RunningServer, model: str, field: str, right: str
) -> None:
    error = json.loads(generate(server, model, prompt="x", **{field: "3"})["error"])
    assert error["code"] == "invalid_request"
    assert error["fields"]["field"] == field
    assert f"{field}: is unknown; did you mean {right}?" in error["message"]


def test_an_unknown_parameter_is_refused_over_grpc_and_tritons_own_are_not(grpc: Any) -> None:
    inputs = inputs_of(tritonclient.grpc, Request(prompt="x", steps=1))
    refused = grpc.infer("scumble", inputs, parameters={"lora": "a"})
    assert json.loads(refused.as_numpy("error")[0])["fields"]["field"] == "lora"
    drawn = grpc.infer("scumble", inputs, priority=1, timeout=60_000_000, headers={"x-mine": "1"})
    assert drawn.as_numpy("images").shape == (1, 64, 64, 3)


@pytest.mark.parametrize(
    "adapters",
    [["l/a:0.5"], ["l/a:0.5", '{"ref": "l/b"}'], '["l/a:0.5"]', '[{"ref": "l/a", "weight": 0.5}]', "l/a:0.5"],
)
def test_adapters_are_given_in_any_spelling(server: RunningServer, adapters: Any) -> None:
    receipt = json.loads(generate(server, prompt="x", adapters=adapters)["receipt"])
    first = receipt["adapters"][0]
    assert (first["name"], first["weight"]) == ("l/a", 0.5)
    assert len(receipt["adapters"]) == (2 if "l/b" in str(adapters) else 1)


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
@pytest.mark.parametrize("model", ["scumble", "scumble_stream"])
def test_a_file_in_json_is_base64(
    server: RunningServer, infer_http: Callable[..., Any], infer_grpc: Callable[..., Any], model: str, kind: Any
) -> None:
    asked = Request(prompt="x", steps=1, seed=7, options=Options(format=kind))
    if model == "scumble":
        content = base64.b64decode(generate(server, prompt="x", options=json.dumps({"format": kind}))["encoded"])
    else:
        body = {"prompt": "x", "steps": 1, "seed": 7, "options": json.dumps({"format": kind})}
        call = urllib.request.Request(f"{server.http_url}/v2/models/{model}/generate_stream", json.dumps(body).encode())
        with urllib.request.urlopen(call, timeout=60) as response:
            events = [json.loads(line[6:]) for line in response.read().decode().splitlines() if line]
        content = base64.b64decode(events[-1]["encoded"])
    raw = [infer(asked).as_numpy("encoded")[0] for infer in (infer_http, infer_grpc)]
    for file in (content, *raw):
        assert Image.open(io.BytesIO(file)).format == kind.upper()
    if kind == "png":
        assert len({Image.open(io.BytesIO(file)).tobytes() for file in (content, *raw)}) == 1


def test_prometheus_reads_the_loops_counters(server: RunningServer, client: Client) -> None:
    client.images.generate("a red apple", steps=1)
    expected = client.stats()

    def scraped() -> dict[str, float]:
        with urllib.request.urlopen(server.metrics_url, timeout=60) as response:
            lines = response.read().decode().splitlines()
        return {
            name.partition("{")[0]: float(value)
            for name, value in (line.rsplit(" ", 1) for line in lines if line.startswith("scumble_"))
        }

    names = {
        f"scumble_{name}_total": getattr(expected, name)
        for name in ("requests", "images", "steps", "rows", "mixed_steps")
    }
    wait_until(lambda: names.items() <= scraped().items())


def test_pictures_go_through_both_doors(
    infer_http: Callable[..., Any], infer_grpc: Callable[..., Any], client: Client
) -> None:
    adapters = (Adapter(ref="ip/base", image="style"), Adapter(ref="c/net", image="shape", preprocess="invert"))
    images = {"style": coarse_png(1), "shape": coarse_png(2)}
    request = APPLE.model_copy(
        update={"adapters": adapters, "images": images, "options": Options(return_maps=True), "num_images": 1}
    )
    ours = client.images.generate(request)
    for result in (infer_http(request), infer_grpc(request)):
        np.testing.assert_array_equal(result.as_numpy("images"), ours.images)
        np.testing.assert_array_equal(result.as_numpy("maps"), ours.maps)


@pytest.mark.parametrize("model", ["scumble", "scumble_stream"])
def test_a_callers_id_stands_in_the_log_and_in_errors(server: RunningServer, grpc: Any, model: str) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    request_id = f"order-{model}"
    inputs = inputs_of(tritonclient.grpc, Request(prompt="a secret apple", adapters=(Adapter(ref="l/nobody"),)))
    grpc.start_stream(lambda result, error: answers.put((result, error)))
    grpc.async_stream_infer(model, inputs, request_id=request_id)
    result, error = answers.get(timeout=60)
    assert error is None
    assert json.loads(result.as_numpy("error")[0])["fields"]["request_id"] == request_id
    lines = [line for line in server.log.read_text().splitlines() if request_id in line]
    assert [line.partition("scumble.requests: ")[2].split(" total_ms")[0] for line in lines] == [
        f'request id="{request_id}" outcome="not_found"'
    ]
