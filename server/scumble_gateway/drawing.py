"""What the routes share: a request drawn while its caller stays, and pictures as JSON holds them.

What takes long for large pictures is done in threads: the event loop has other callers.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from scumble.errors import Cancelled, Unavailable
from scumble.events import Done, Pixels, StreamEvent
from scumble.request import Request
from scumble_gateway.upstream import Upstream

T = TypeVar("T")
HEARTBEAT = 15.0
"""Seconds of silence after which a stream sends a comment, so that proxies do not close it."""


async def draw(http: HttpRequest, upstream: Upstream, request: Request) -> Done:
    """Return the finished request. Cancels it, and raises Cancelled, as soon as the caller is gone."""

    async def last() -> Done:
        async with aclosing(upstream.draw(request, http.state.request_id)) as events:
            async for event in events:
                if isinstance(event, Done):
                    return event
        raise Unavailable("the request ended without an answer")

    return await _while_connected(http, last())


async def _while_connected(http: HttpRequest, work: Awaitable[T]) -> T:
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Cancelled("the caller closed the connection")
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def as_events(
    events: AsyncGenerator[StreamEvent], told: Callable[[StreamEvent], list[tuple[str, dict[str, Any]]]]
) -> AsyncIterator[str]:
    """Yield server-sent events: what `told` says of each event, and comments while nothing comes."""
    async with aclosing(events):
        following = asyncio.ensure_future(anext(events))
        try:
            while True:
                done, _ = await asyncio.wait((following,), timeout=HEARTBEAT)
                if not done:
                    yield ": waiting\n\n"
                    continue
                for text in await run_in_threadpool(_all_sse, told, following.result()):
                    yield text
                following = asyncio.ensure_future(anext(events))
        except StopAsyncIteration:
            return
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


def _all_sse(told: Callable[[StreamEvent], list[tuple[str, dict[str, Any]]]], event: StreamEvent) -> list[str]:
    return [sse(name, data) for name, data in told(event)]


async def as_json(make: Callable[[], dict[str, Any]]) -> Response:
    """Answer with what `make` returns. Pictures take long to be written as JSON, so a thread does it."""
    return Response(await run_in_threadpool(lambda: json.dumps(make()).encode()), media_type="application/json")


def sse(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"


def as_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def pngs(pixels: Pixels) -> list[str]:
    """Pixels `(n, H, W, 3)` → PNG files in base64."""
    return [as_base64(_png(each)) for each in pixels]


def _png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
