"""What comes over a connection is bounded before the application is asked; others on the same server go on."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from scumble_gateway import protocol
from scumble_gateway.protocol import BoundedProtocol


async def application(_scope: Any, receive: Any, send: Any) -> None:
    """Reads the whole body, and says how much it was."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
        if message["type"] == "http.disconnect":
            return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


@pytest.fixture
def port() -> Iterator[int]:
    server = uvicorn.Server(
        uvicorn.Config(application, port=0, http=BoundedProtocol, lifespan="off", log_level="error")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def answer(port: int, *parts: bytes, wait: float = 0) -> tuple[int, bytes]:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        with contextlib.suppress(OSError):  # it has answered and closed
            for part in parts:
                connection.sendall(part)
                time.sleep(wait)
        received = b""
        while b"\r\n\r\n" not in received or not received.partition(b"\r\n\r\n")[2]:
            more = connection.recv(65536)
            if not more:
                break
            received += more
    return int(received.split()[1]), received.partition(b"\r\n\r\n")[2]


POST = b"POST / HTTP/1.1\r\nHost: localhost\r\n"


def test_a_request_in_large_or_few_pieces_is_read(port: int) -> None:
    body = b"x" * 3_000_000
    assert answer(port, POST + b"Content-Length: 3000000\r\n\r\n", body)[0] == 200
    pieces = b"1\r\nx\r\n" * 9_000 + b"0\r\n\r\n"
    status, size = answer(port, POST + b"Transfer-Encoding: chunked\r\n\r\n" + pieces)
    assert (status, b"9000" in size) == (200, True)


def test_tiny_pieces_without_end_are_refused(port: int) -> None:
    status, body = answer(port, POST + b"Transfer-Encoding: chunked\r\n\r\n", *[b"1\r\nx\r\n" * 1000] * 300)
    assert status == 400
    assert "tiny pieces" in json.loads(body)["detail"]
    assert answer(port, POST + b"Content-Length: 1\r\n\r\nx")[0] == 200


@pytest.mark.parametrize("head", [b"A: " + b"a" * 70_000 + b"\r\n", b"A: b\r\n" * 40_000, b"A: " + b"a" * 1_000_000])
def test_a_large_head_is_refused(port: int, head: bytes) -> None:
    status, body = answer(port, POST + head, b"\r\n")
    assert (status, json.loads(body)["code"]) == (431, "invalid_request")


@pytest.mark.parametrize("first", [b"", b"POST / HT", POST])
def test_a_head_that_does_not_come_is_not_waited_for(port: int, monkeypatch: pytest.MonkeyPatch, first: bytes) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.2)
    drip = [b"A: b\r\n"] * 10 if first == POST else []
    status, body = answer(port, first, *drip, wait=0.1)
    assert status == 408
    assert "did not come within" in json.loads(body)["detail"]


def test_what_is_not_http_is_told(port: int) -> None:
    status, body = answer(port, b"\x16\x03\x01 hello\r\n\r\n")
    assert (status, json.loads(body)["status"]) == (400, 400)


def test_a_connection_is_used_again(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.connect()
    first = connection.sock
    for size in (2, 300_000, 0):
        connection.request("POST", "/", b"x" * size)
        assert connection.getresponse().read() == str(size).encode()
    assert connection.sock is first
    connection.close()
