"""HTTP/1.1 with limits on what comes before the application is asked: uvicorn has none for heads and pieces.

A head must be small and come soon. A body in many tiny pieces, each of which costs as much as a large one, is refused.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from scumble_gateway.problems import PROBLEM, problem_body

MAX_HEAD_BYTES = 64 << 10
HEAD_SECONDS = 10.0
LINGER_SECONDS = 2.0
"""How long what follows a refused request is thrown away."""
FEW_PIECES = 10_000
"""Of a body, however small they are."""
LEAST_PIECE = 64
"""Bytes of a piece, on average, from then on."""
_BAD, _LATE, _LARGE_HEAD = 400, 408, 431
_REASONS = {_BAD: "Bad Request", _LATE: "Request Timeout", _LARGE_HEAD: "Request Header Fields Too Large"}


class BoundedProtocol(HttpToolsProtocol):
    """One connection. The names are uvicorn's and httptools'."""

    _refused = False
    _late: asyncio.TimerHandle
    _in_head: bool
    _head_bytes: int
    _header_bytes: int
    _pieces: int
    _body_bytes: int

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._late.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            self._check_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._late.cancel()
        self._begin_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._header_bytes += len(name) + len(value)
        self._check_head()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._late.cancel()
        if not self._refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._refused:
            return
        self._pieces, self._body_bytes = self._pieces + 1, self._body_bytes + len(body)
        if self._pieces > FEW_PIECES and self._body_bytes < LEAST_PIECE * self._pieces:
            self._refuse(_BAD, "the body comes in too many tiny pieces; send larger ones")
            return
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        self._refuse(_BAD, msg)

    def _begin_head(self) -> None:
        self._in_head, self._head_bytes, self._header_bytes = True, 0, 0
        self._pieces, self._body_bytes = 0, 0
        self._late = self.loop.call_later(HEAD_SECONDS, self._is_late)

    def _is_late(self) -> None:
        if self._in_head:
            self._refuse(_LATE, f"the request's head did not come within {HEAD_SECONDS:g} s")

    def _check_head(self) -> None:
        if max(self._head_bytes, self._header_bytes) > MAX_HEAD_BYTES:
            self._refuse(_LARGE_HEAD, f"the request's head has more than {MAX_HEAD_BYTES} bytes")

    def _refuse(self, status: int, detail: str) -> None:
        """Answer, and read no more. What still comes is thrown away for a while: if it were left unread, closing would
        reset the connection, and the answer would be lost.
        """
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._late.cancel()
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if is_answering and self.cycle.response_started:
            self.transport.close()
            return
        self.transport.write(_answer(status, detail))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)


def _answer(status: int, detail: str) -> bytes:
    request_id = uuid.uuid4().hex
    body = json.dumps(problem_body(status, "invalid_request", detail, request_id)).encode()
    head: dict[str, Any] = {
        "content-type": PROBLEM,
        "content-length": len(body),
        "x-request-id": request_id,
        "connection": "close",
    }
    lines = [f"HTTP/1.1 {status} {_REASONS[status]}", *(f"{name}: {value}" for name, value in head.items()), "", ""]
    return "\r\n".join(lines).encode() + body
