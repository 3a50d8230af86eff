"""The log has one line for each request: what was asked, what it took, how it ended; prompts only if asked for."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scumble.errors import QueueFull
from scumble.events import Done, Event, Failed
from scumble.request import Adapter, Request
from scumble_server.config import ServerConfig
from scumble_server.logs import _JsonLines, _TextLines
from scumble_server.service import MAX_ID, Service
from support.running import Running

PLAIN: dict[str, Any] = {"prompt": "a secret apple", "seed": 7, "steps": 2, "width": 64, "height": 64}


def run(service: Service, request: Request, request_id: str = "") -> Done | Failed:
    ends: list[Done | Failed] = []
    ended = threading.Event()

    def on_event(event: Event) -> None:
        if isinstance(event, Done | Failed):
            ends.append(event)
            ended.set()

    service.submit(request, on_event, request_id=request_id)
    assert ended.wait(60)
    return ends[0]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[dict[str, Any]]]:
    """The fields of each line, in order; the list grows as requests end."""
    fields: list[dict[str, Any]] = []

    def collect(record: logging.LogRecord) -> bool:
        fields.append(record.__dict__["fields"])
        return True

    logger = logging.getLogger("scumble.requests")
    logger.addFilter(collect)
    with caplog.at_level(logging.INFO, logger.name):
        yield fields
    logger.removeFilter(collect)


def test_a_picture_is_told_with_all_that_made_it(running: Running, lines: list[dict[str, Any]]) -> None:
    done = run(running.service, Request.parse({**PLAIN, "adapters": [Adapter(ref="l/a", weight=0.5)]}), "order-7")
    assert isinstance(done, Done)
    (line,) = lines
    receipt = done.receipt
    assert line["id"] == "order-7"
    assert line["outcome"] == "done"
    assert line["base"] == f"{receipt.base.name}@{receipt.base.digest}"
    assert line["adapters"] == [f"l/a@{receipt.adapters[0].digest}:0.5"]
    assert (line["steps"], line["size"], line["images"], line["seed"]) == (2, "64x64", 1, 7)
    assert line["total_ms"] == pytest.approx(receipt.timings_ms["total"], abs=0.1)
    assert "secret" not in json.dumps(line)


def test_a_refused_request_is_told_and_its_error_has_the_id(running: Running, lines: list[dict[str, Any]]) -> None:
    failed = run(running.service, Request.parse({**PLAIN, "adapters": ["l/nobody"]}), "order-8")
    assert isinstance(failed, Failed)
    assert failed.error.fields["request_id"] == "order-8"
    (line,) = lines
    assert (line["id"], line["outcome"]) == ("order-8", "not_found")
    assert "message" not in line


def test_a_request_without_an_id_gets_one_and_a_long_one_is_cut(running: Running, lines: list[dict[str, Any]]) -> None:
    run(running.service, Request.parse(PLAIN))
    run(running.service, Request.parse(PLAIN))
    run(running.service, Request.parse(PLAIN), "x" * 10_000)
    first, second, third = (line["id"] for line in lines)
    assert first
    assert first != second
    assert third == "x" * MAX_ID


def test_what_finds_no_room_is_told_and_prompts_stand_there_if_asked_for(
    published: tuple[Path, dict[str, Path]], lines: list[dict[str, Any]]
) -> None:
    service = Service.open(ServerConfig(home=published[0], base="tiny/base", max_queue=1, log_prompts=True))
    gone = threading.Event()
    service.submit(Request.parse({**PLAIN, "steps": 500}), lambda _: None, gone.is_set, request_id="one")
    with pytest.raises(QueueFull) as caught:
        service.submit(Request.parse(PLAIN), lambda _: None, request_id="two")
    service.close()
    assert caught.value.fields["request_id"] == "two"
    full, closed = lines
    assert (full["id"], full["outcome"]) == ("two", "queue_full")
    assert (closed["id"], closed["outcome"]) == ("one", "unavailable")
    assert closed["prompt"] == "a secret apple"
    assert closed["message"] == "the server is stopping"


def written(formatter: logging.Formatter) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    record = logging.makeLogRecord(
        {
            "name": "scumble.requests",
            "levelname": "INFO",
            "msg": "request",
            "fields": {"id": 'x\nINFO "forged"', "n": 2},
        }
    )
    handler.emit(record)
    return stream.getvalue()


def test_a_line_of_json_has_the_fields_beside_the_rest() -> None:
    line = json.loads(written(_JsonLines()))
    assert line.pop("time")
    assert line == {
        "level": "info", "logger": "scumble.requests", "message": "request", "id": 'x\nINFO "forged"', "n": 2
    }  # fmt: skip


def test_no_id_forges_a_line() -> None:
    (line,) = written(_TextLines()).splitlines()
    assert line.endswith('INFO scumble.requests: request id="x\\nINFO \\"forged\\"" n=2')
