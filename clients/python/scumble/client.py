"""The typed client: requests in, pictures or progress out, over one gRPC connection.

A `Client` may be shared by any number of threads; each request is a stream of its own.
"""

from __future__ import annotations

import os
import random
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

from numpy.typing import NDArray
from PIL import Image

from scumble.connection import Connection
from scumble.errors import QueueFull, ScumbleError, Unavailable
from scumble.events import Done, Failed, StreamEvent
from scumble.images import Images, encoded
from scumble.request import Adapter, Options, Request, SchedulerName, parse_adapter
from scumble.stats import Stats
from scumble.wire import STREAM_MODEL, request_to_tensors, stats_query, tensors_to_event, tensors_to_stats

DEFAULT_URL = "127.0.0.1:8001"
MAX_RETRIES = 8
MAX_RETRY_WAIT = 30.0
"""Seconds; a server that asks for more is not believed."""


class Fields(TypedDict, total=False):
    """What a `Request` holds beside its prompt; what is left out is the base's default."""

    negative_prompt: str | None
    base: str | None
    scheduler: SchedulerName | None
    seed: int | None
    steps: int | None
    width: int | None
    height: int | None
    num_images: int
    guidance_scale: float | None
    adapters: Iterable[str | Adapter | Mapping[str, Any]]
    """References with an optional weight (`"styles/ink:0.8"`), or Adapters."""
    options: Options | Mapping[str, Any]
    images: Mapping[str, bytes | str | os.PathLike[str] | Image.Image]
    """Pictures by the names that adapters call them: encoded, a file, or opened with PIL."""
    tensors: Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Health:
    """`live`: the server runs; `ready`: it also takes requests."""

    live: bool
    ready: bool


class Client:
    """Owns one connection; `close`, or the end of `with`, ends requests that still run with Cancelled.

    `url` is the gRPC address, by default `SCUMBLE_URL`, else `127.0.0.1:8001`; nothing is contacted until
    the first call. `timeout` bounds each call, in seconds up to the last picture; None waits on.
    """

    def __init__(self, url: str | None = None, *, timeout: float | None = 600.0) -> None:
        self.url = url or os.environ.get("SCUMBLE_URL") or DEFAULT_URL
        self.timeout = timeout
        self._connection = Connection(self.url)
        self.images = ImagesApi(self._connection, timeout)

    def stats(self) -> Stats:
        """The counters since the server started."""
        answers = list(self._connection.stream(STREAM_MODEL, _new_id(), stats_query(), self.timeout))
        if not answers:
            raise Unavailable(f"the server at {self.url} ended the call without an answer", url=self.url)
        return tensors_to_stats(answers[-1])

    def health(self) -> Health:
        """Raises Unavailable if nothing listens."""
        live = self._connection.is_live(self.timeout)
        return Health(live=live, ready=live and self._connection.is_ready(STREAM_MODEL, self.timeout))

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ImagesApi:
    """`client.images`."""

    def __init__(
        self, connection: Connection, timeout: float | None, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._connection = connection
        self._timeout = timeout
        self._sleep = sleep

    def generate(self, prompt: str | Request, *, timeout: float | None = None, **fields: Unpack[Fields]) -> Images:
        """Make pictures and wait for them. `prompt` may be a whole Request.

        Raises what the server refused, or Unavailable. QueueFull is raised after a few retries.
        """
        return wait_for_images(self.stream(prompt, timeout=timeout, **fields))

    def stream(
        self, prompt: str | Request, *, timeout: float | None = None, **fields: Unpack[Fields]
    ) -> Generator[StreamEvent]:
        """Queued, Step…, Preview… if asked for, and at last Done; raises as `generate`.

        Closing the iterator takes the request back: its rows leave the batch at the next step.
        """
        request = to_request(prompt, fields)
        return self._stream(request, self._timeout if timeout is None else timeout)

    def _stream(self, request: Request, timeout: float | None) -> Generator[StreamEvent]:
        request_id = _new_id()  # kept over retries: one request, one id in the server's log
        deadline = None if timeout is None else time.monotonic() + timeout
        for wait_again in (*[True] * MAX_RETRIES, False):
            try:
                yield from self._attempt(request, request_id, _left(deadline))
            except QueueFull as full:  # comes before any event, so nothing was done twice
                wait = _wait_before_retry(full)
                if not wait_again or (deadline is not None and time.monotonic() + wait >= deadline):
                    raise
                self._sleep(wait)
            else:
                return

    def _attempt(self, request: Request, request_id: str, timeout: float | None) -> Generator[StreamEvent]:
        finished = False
        responses = self._connection.stream(STREAM_MODEL, request_id, request_to_tensors(request), timeout)
        try:
            for tensors in responses:
                event = tensors_to_event(tensors)
                if isinstance(event, Failed):
                    raise event.error
                finished = isinstance(event, Done)
                yield event
            if not finished:
                url = self._connection.url
                raise Unavailable(f"the server at {url} ended the request without a result", url=url)
        except ScumbleError as error:
            error.fields.setdefault("request_id", request_id)
            raise
        finally:
            responses.close()


def wait_for_images(events: Iterable[StreamEvent], show: Callable[[StreamEvent], None] | None = None) -> Images:
    """Read a stream to its end and return what it drew; `show` sees each event. Raises what `events` raises."""
    done = None
    for event in events:
        if show is not None:
            show(event)
        if isinstance(event, Done):
            done = event
    if done is None:
        raise Unavailable("the stream ended without pictures")
    return Images(done.images, done.receipt, done.maps, done.encoded)


def to_request(prompt: str | Request, fields: Fields) -> Request:
    """Raises InvalidRequest naming the field."""
    if isinstance(prompt, Request):
        if fields:
            raise TypeError(f"a whole Request takes no further fields, got {sorted(fields)}")
        return prompt
    adapters = [_adapter_fields(adapter) for adapter in fields.get("adapters", ())]
    images = {name: encoded(picture) for name, picture in fields.get("images", {}).items()}
    return Request.parse({**fields, "prompt": prompt, "adapters": adapters, "images": images})


def _adapter_fields(adapter: str | Adapter | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(adapter, str):
        adapter = parse_adapter(adapter)
    return adapter.model_dump() if isinstance(adapter, Adapter) else dict(adapter)


def _wait_before_retry(full: QueueFull) -> float:
    """At least what the server asked for; spread, so that those refused together do not return together."""
    asked = min(float(full.fields.get("retry_after", 1.0)), MAX_RETRY_WAIT)
    return asked * random.uniform(1.0, 1.25)  # noqa: S311


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.001, deadline - time.monotonic())


def _new_id() -> str:
    return uuid.uuid4().hex
