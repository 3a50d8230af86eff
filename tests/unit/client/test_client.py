"""The client turns responses into pictures, progress and typed errors, for many threads at once."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import scumble
from scumble import wire
from scumble.client import MAX_RETRIES, Client
from scumble.events import Done, Event, Failed, Queued, Step
from support.receipts import a_receipt
from support.scripted_server import ScriptedServer, a_picture


def no_wait(client: Client) -> list[float]:
    """Let retries come at once; returns the seconds that they would have waited."""
    waits: list[float] = []
    client.images._sleep = waits.append
    return waits


def test_generate_returns_pixels_and_receipt(client: Client) -> None:
    images = client.images.generate("a red apple")
    assert images.images.shape == (1, 8, 8, 3)
    assert images.images.dtype == np.uint8
    assert images.receipt == a_receipt()
    assert images.pil()[0].getpixel((0, 0)) == (7, 7, 7)


def test_what_is_asked_reaches_the_server(server: ScriptedServer, client: Client) -> None:
    seen: list[scumble.Request] = []

    def script(tensors: wire.Tensors) -> Iterator[Event]:
        seen.append(wire.tensors_to_request(tensors))
        yield a_picture()

    server.script = script
    client.images.generate(
        prompt="a cup",
        seed=3,
        steps=4,
        adapters=["styles/ink:0.5", scumble.Adapter(ref="a/b", text_weight=0.0), {"ref": "c/d@2", "weight": -1}],
    )
    request = scumble.Request(prompt="a cup")
    client.images.generate(request)
    assert seen == [
        scumble.Request(
            prompt="a cup",
            seed=3,
            steps=4,
            adapters=(
                scumble.Adapter(ref="styles/ink", weight=0.5),
                scumble.Adapter(ref="a/b", text_weight=0.0),
                scumble.Adapter(ref="c/d@2", weight=-1),
            ),
        ),
        request,
    ]


def test_stream_yields_queued_steps_and_done_in_order(server: ScriptedServer, client: Client) -> None:
    server.script = lambda _: iter([Queued(1), Step(1, 2), Step(2, 2), a_picture()])
    *progress, last = client.images.stream("")
    assert progress == [Queued(1), Step(1, 2), Step(2, 2)]
    assert isinstance(last, Done)


def test_closing_the_stream_cancels_the_request(server: ScriptedServer, client: Client) -> None:
    def script(_: wire.Tensors) -> Iterator[Event]:
        for step in range(1, 1000):
            yield Step(step, 1000)
            time.sleep(0.01)

    server.script = script
    stream = client.images.stream("")
    assert next(stream) == Step(1, 1000)
    stream.close()
    assert server.cancelled.wait(10)


def test_many_threads_share_one_client(server: ScriptedServer, client: Client) -> None:
    together = threading.Barrier(16, timeout=20)

    def script(tensors: wire.Tensors) -> Iterator[Event]:
        together.wait()  # passes only if all sixteen are under way at once
        yield a_picture(seeds=[wire.tensors_to_request(tensors).seed])

    server.script = script
    with ThreadPoolExecutor(16) as threads:
        results = threads.map(lambda seed: client.images.generate("", seed=seed), range(16))
    assert [images.receipt.seeds for images in results] == [(seed,) for seed in range(16)]


@pytest.mark.parametrize(
    "error",
    [
        scumble.NotFound("no adapter a/b", ref="a/b"),
        scumble.Incompatible("made for sd2"),
        scumble.IntegrityError("damaged"),
        scumble.InvalidRequest("steps: 0", field="steps"),
    ],
)
def test_what_the_server_refuses_is_raised_with_its_type(
    server: ScriptedServer, client: Client, error: scumble.ScumbleError
) -> None:
    server.script = lambda _: iter([Failed(error)])
    with pytest.raises(type(error)) as caught:
        client.images.generate("")
    assert caught.value.message == error.message
    assert error.fields.items() <= caught.value.fields.items()
    assert caught.value.fields["request_id"] == server.requests[0]


@pytest.mark.parametrize(
    "fields",
    [{"steps": 0}, {"width": 65}, {"adapters": ["a/b:heavy"]}, {"seed": -1}, {"colour": "red"}],
)
def test_a_bad_request_is_refused_before_it_is_sent(
    server: ScriptedServer, client: Client, fields: dict[str, Any]
) -> None:
    with pytest.raises(scumble.InvalidRequest):
        client.images.stream("", **fields)
    assert server.requests == []


def test_a_full_queue_is_tried_again_after_the_time_it_names(server: ScriptedServer, client: Client) -> None:
    answers = iter([Failed(scumble.QueueFull("full", retry_after=0.5))] * 2 + [a_picture()])
    server.script = lambda _: iter([next(answers)])
    waits = no_wait(client)
    assert len(client.images.generate("")) == 1
    assert len(waits) == 2
    assert all(0.5 <= wait <= 0.7 for wait in waits)
    assert len(server.requests) == 3
    assert len(set(server.requests)) == 1, "a retry is the same request"


def test_a_queue_that_stays_full_is_reported_after_bounded_retries(server: ScriptedServer, client: Client) -> None:
    server.script = lambda _: iter([Failed(scumble.QueueFull("full", retry_after=1e9))])
    client.images._timeout = None
    waits = no_wait(client)
    with pytest.raises(scumble.QueueFull):
        client.images.generate("")
    assert len(waits) == MAX_RETRIES
    assert max(waits) < 60, "a server that asks for years is not believed"


def test_no_retry_outlasts_the_timeout(server: ScriptedServer, client: Client) -> None:
    server.script = lambda _: iter([Failed(scumble.QueueFull("full", retry_after=10))])
    waits = no_wait(client)
    with pytest.raises(scumble.QueueFull):
        client.images.generate("", timeout=5)
    assert waits == []


def test_no_server_is_unavailable_and_named() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(scumble.Unavailable, match=r"127\.0\.0\.1:1.*scumble serve"):
        client.images.generate("")
    with Client("127.0.0.1:1") as client, pytest.raises(scumble.Unavailable, match=r"127\.0\.0\.1:1"):
        client.health()


def test_a_server_that_says_nothing_is_unavailable_after_the_timeout(server: ScriptedServer, client: Client) -> None:
    def script(_: wire.Tensors) -> Iterator[Event]:
        server.cancelled.wait(3)
        yield a_picture()

    server.script = script
    with pytest.raises(scumble.Unavailable, match=r"0\.2"):
        client.images.generate("", timeout=0.2)
    server.cancelled.set()


def test_a_fault_that_triton_reports_is_unavailable(server: ScriptedServer, client: Client) -> None:
    server.script = lambda _: iter(["Request for unknown model: 'scumble_stream' is not found"])
    with pytest.raises(scumble.Unavailable, match="unknown model"):
        client.images.generate("")


def test_a_stream_that_ends_without_a_result_is_unavailable(server: ScriptedServer, client: Client) -> None:
    server.script = lambda _: iter([Step(1, 2)])
    with pytest.raises(scumble.Unavailable, match="without a result"):
        client.images.generate("")


def test_closing_the_client_ends_its_requests(server: ScriptedServer, client: Client) -> None:
    def script(_: wire.Tensors) -> Iterator[Event]:
        yield Step(1, 2)
        server.cancelled.wait(10)

    server.script = script
    stream = client.images.stream("")
    next(stream)
    threading.Timer(0.1, client.close).start()
    with pytest.raises(scumble.Cancelled):
        next(stream)
    server.cancelled.set()


def test_health_tells_running_from_ready(server: ScriptedServer, client: Client) -> None:
    assert client.health() == scumble.Health(live=True, ready=True)
    server.ready = False
    assert client.health() == scumble.Health(live=True, ready=False)


def test_the_url_comes_from_the_argument_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCUMBLE_URL", "grpc://localhost:9")
    assert Client().url == "grpc://localhost:9"
    assert Client("localhost:10").url == "localhost:10"
    monkeypatch.delenv("SCUMBLE_URL")
    assert Client().url == "127.0.0.1:8001"


@pytest.mark.parametrize("url", ["http://localhost:8000", "localhost", "localhost:", "://localhost:8001", ":1"])
def test_a_url_that_is_no_grpc_address_is_refused(url: str) -> None:
    with pytest.raises(scumble.InvalidRequest) as caught:
        Client(url)
    assert caught.value.fields["field"] == "url"
