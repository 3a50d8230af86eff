"""Model `scumble_stream`: progress as it comes, pictures last, and an end when the caller leaves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import tritonclient.grpc

from scumble import Client
from scumble.request import Request
from scumble.wire import stats_query

from .conftest import Stream, inputs_of

LONG = Request(prompt="a long walk", seed=1, steps=990)


def event(result: Any) -> dict[str, Any]:
    return json.loads(result.as_numpy("event")[0])


def test_events_come_in_order_and_the_last_is_final(stream: Stream) -> None:
    stream.send(Request(prompt="a red apple", seed=7, steps=3))
    results = stream.take_all()
    assert [event(result)["type"] for result in results] == ["queued", "step", "step", "step", "done"]
    assert [event(result)["step"] for result in results[1:4]] == [1, 2, 3]
    assert results[-1].as_numpy("images").shape == (1, 64, 64, 3)
    assert results[0].as_numpy("images") is None


def test_a_failure_is_an_event_with_a_code(stream: Stream) -> None:
    stream.send(Request(prompt="x", base="no/base"))
    (result,) = stream.take_all()
    assert event(result) == {"type": "failed"}
    assert json.loads(result.as_numpy("error")[0])["code"] == "not_found"


def test_counters_are_asked_in_the_same_way(stream: Stream) -> None:
    stream.send(stats_query())
    (result,) = stream.take_all()
    assert json.loads(result.as_numpy("stats")[0])["alive"] is True


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def ends_early(client: Client, cancel: Callable[[], None]) -> None:
    """`cancel` takes the only running request back: the loop goes idle long before its thousand steps."""
    before = client.stats()
    wait_until(lambda: client.stats().steps > before.steps)
    cancel()
    wait_until(lambda: client.stats().open_requests == 0)
    after = client.stats()
    assert after.failed - before.failed == 1
    assert after.steps - before.steps < 500
    assert after.images == before.images


def test_a_cancelled_stream_ends(stream: Stream, client: Client) -> None:
    stream.send(LONG)
    ends_early(client, stream.cancel)


def test_a_cancelled_unary_call_ends(grpc: Any, client: Client) -> None:
    call = grpc.async_infer("scumble", inputs_of(tritonclient.grpc, LONG), callback=lambda **_: None)
    ends_early(client, call.cancel)


def test_a_client_that_lets_go_ends_its_request(client: Client) -> None:
    events = client.images.stream(LONG)
    next(events)
    ends_early(client, events.close)


@pytest.mark.parametrize("model", ["scumble", "scumble_stream"])
def test_it_says_that_it_is_ready(grpc: Any, model: str) -> None:
    assert grpc.is_model_ready(model)
