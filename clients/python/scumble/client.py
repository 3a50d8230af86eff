"""The typed client: requests in, images or progress out, over one gRPC connection.

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
"""The longest wait in seconds, whatever the server asks for."""


class Fields(TypedDict, total=False):
    """The fields of a `Request` beside its prompt; a missing field takes the base's default."""

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
    """Input images by the names that adapters and options use: encoded, a file, or a PIL image."""
    tensors: Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Health:
    """`live`: the server runs; `ready`: it accepts requests."""

    live: bool
    ready: bool


class Client:
    """Owns one connection; `close`, or the end of `with`, ends running requests with Cancelled.

    `url` is the gRPC address, by default `SCUMBLE_URL`, else `127.0.0.1:8001`; the first call connects. `timeout` is
    the limit of each call in seconds, up to the last image; None: no limit.
    """

    def __init__(self, url: str | None = None, *, timeout: float | None = 600.0) -> None:
        self.url = url or os.environ.get("SCUMBLE_URL") or DEFAULT_URL
        self.timeout = timeout
        self._connection = Connection(self.url)
        self.images = ImagesApi(self._connection, timeout)

    def stats(self) -> Stats:
        """Return the server's counters since its start. Raises Unavailable."""
        answers = list(self._connection.stream(STREAM_MODEL, _new_id(), stats_query(), self.timeout))
        if not answers:
            raise Unavailable(f"the server at {self.url} ended the call without an answer", url=self.url)
        return tensors_to_stats(answers[-1])

    def health(self) -> Health:
        """Return whether the server is live and ready. Raises Unavailable if no server answers."""
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
        """Generate images and wait for them. `prompt` may be a whole Request.

        Raises the server's error, or Unavailable. QueueFull is raised after MAX_RETRIES retries.
        """
        return wait_for_images(self.stream(prompt, timeout=timeout, **fields))

    def stream(
        self, prompt: str | Request, *, timeout: float | None = None, **fields: Unpack[Fields]
    ) -> Generator[StreamEvent]:
        """Yield Queued, Step…, Preview… (with `preview_every`) and finally Done. Raises the errors of `generate`.

        Closing the iterator cancels the request: its rows leave the batch at the next step.
        """
        request = to_request(prompt, fields)
        return self._stream(request, self._timeout if timeout is None else timeout)

    def _stream(self, request: Request, timeout: float | None) -> Generator[StreamEvent]:
        request_id = _new_id()  # the same in all retries: one request has one id in the server's log
        deadline = None if timeout is None else time.monotonic() + timeout
        for may_retry in (*[True] * MAX_RETRIES, False):
            try:
                yield from self._attempt(request, request_id, _left(deadline))
            except QueueFull as full:  # raised before any event, so nothing is done twice
                wait = _wait_before_retry(full)
                if not may_retry or (deadline is not None and time.monotonic() + wait >= deadline):
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
    """Read a stream to its end and return the images; `show` is called with each event. Raises what `events` raises."""
    done = None
    for event in events:
        if show is not None:
            show(event)
        if isinstance(event, Done):
            done = event
    if done is None:
        raise Unavailable("the stream ended without images; try again")
    return Images(done.images, done.receipt, done.maps, done.encoded)


def to_request(prompt: str | Request, fields: Fields) -> Request:
    """Make a Request. Raises InvalidRequest naming the field."""
    if isinstance(prompt, Request):
        if fields:
            raise TypeError(f"a whole Request takes no further fields, got {sorted(fields)}")
        return prompt
    adapters = [_adapter_fields(adapter) for adapter in fields.get("adapters", ())]
    images = {name: encoded(image) for name, image in fields.get("images", {}).items()}
    return Request.parse({**fields, "prompt": prompt, "adapters": adapters, "images": images})


def _adapter_fields(adapter: str | Adapter | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(adapter, str):
        adapter = parse_adapter(adapter)
    return adapter.model_dump() if isinstance(adapter, Adapter) else dict(adapter)


def _wait_before_retry(full: QueueFull) -> float:
    """Return the server's wait and up to a quarter more, so that clients refused together do not retry together."""
    asked = min(float(full.fields.get("retry_after", 1.0)), MAX_RETRY_WAIT)
    return asked * random.uniform(1.0, 1.25)  # noqa: S311


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.001, deadline - time.monotonic())


def _new_id() -> str:
    return uuid.uuid4().hex
