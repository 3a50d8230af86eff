"""Reads a request's JSON within limits that are looked at before anything is parsed."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from scumble.errors import InvalidRequest, Unavailable
from scumble_gateway.problems import TooLarge

MAX_BODY_BYTES = 64 << 20
MAX_PARTS = 20_000
"""Commas, brackets and braces of a JSON body: what takes memory beyond its length."""
MAX_SECONDS = 60.0
"""Until the whole body has come."""


async def read_object(http: HttpRequest) -> dict[str, Any]:
    """Return the body's JSON object. Raises TooLarge, InvalidRequest, Unavailable if it does not come in time."""
    kind = media_type(http)
    if kind != "application/json":
        raise InvalidRequest(f"Content-Type: is {kind!r}, takes application/json", field="Content-Type")
    return await run_in_threadpool(_parsed, await read_body(http))


def _parsed(body: bytes) -> dict[str, Any]:
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_PARTS:
        raise TooLarge(f"the body has more than {MAX_PARTS} values")
    try:
        data = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise InvalidRequest("the body must be a JSON object")
    return data


def media_type(http: HttpRequest) -> str:
    """Of the body, in lower case; JSON if it does not say."""
    return http.headers.get("content-type", "application/json").partition(";")[0].strip().lower()


async def read_body(http: HttpRequest) -> bytes:
    """Raises TooLarge, InvalidRequest if it does not come whole, Unavailable if it does not come in time."""
    length = http.headers.get("content-length", "0")
    if length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise TooLarge(f"the body has {length} bytes, at most {MAX_BODY_BYTES} are read")
    body = bytearray()
    try:
        async with asyncio.timeout(MAX_SECONDS):
            async for chunk in http.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise TooLarge(f"the body has more than {MAX_BODY_BYTES} bytes")
    except TimeoutError as error:
        raise Unavailable(f"the body did not come within {MAX_SECONDS:g} s") from error
    except ClientDisconnect as error:
        raise InvalidRequest("the connection was closed before the body had come") from error
    return bytes(body)


def decoded(name: str, text: Any, field: str = "images") -> bytes:
    """Return a picture that is given in base64 or as a data: URL. Raises InvalidRequest."""
    if not isinstance(text, str):
        raise InvalidRequest(f"{field}.{name}: takes a picture in base64 or as a data: URL", field=field)
    head, comma, body = text.partition(",")
    if comma and not (head.startswith("data:") and head.endswith(";base64")):
        raise InvalidRequest(f"{field}.{name}: not base64, and not a data: URL in base64", field=field)
    try:
        return base64.b64decode(body if comma else text, validate=True)
    except ValueError as error:
        raise InvalidRequest(f"{field}.{name}: not base64 ({error})", field=field) from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
