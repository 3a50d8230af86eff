"""`POST /v1/generate`: our own request as plain JSON; pictures as base64, as bytes by `Accept`, or as events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, get_args

from fastapi import APIRouter, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse

from scumble.errors import InvalidRequest, ScumbleError
from scumble.events import Done, Preview, Queued, Step, StreamEvent
from scumble.request import Format, Options, Request
from scumble_gateway.bodies import decoded, read_object
from scumble_gateway.drawing import as_base64, as_events, as_json, draw, pngs, sse
from scumble_gateway.problems import problem_body, status_of
from scumble_gateway.upstream import Upstream

EVENTS = "text/event-stream"
FORMATS: dict[str, Format] = {f"image/{name}": name for name in get_args(Format)}
EXAMPLE: dict[str, Any] = {
    "prompt": "an apple, ink on paper",
    "base": "scumble/demo",
    "seed": 7,
    "steps": 20,
    "adapters": [{"ref": "styles/ink@3", "weight": 0.8}],
    "options": {"format": "png"},
}


def routes(upstream: Upstream) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/generate", openapi_extra=_described(), response_model=None, tags=["generate"])
    async def generate(http: HttpRequest) -> Response:
        """Draw images.

        With `Accept: application/json` (the default) files come in base64, with the receipt; with `image/png`,
        `image/webp` or `image/jpeg` the one image itself, which has the receipt inside; with `text/event-stream`
        progress, previews (`options.preview_every`) and then the same JSON. Closing the connection cancels.
        """
        accept = _accepted(http.headers.get("accept", "*/*"))
        request = await run_in_threadpool(to_request, await read_object(http), FORMATS.get(accept))
        if accept == EVENTS:
            return StreamingResponse(_events(http, upstream, request), media_type=EVENTS)
        if accept in FORMATS and request.num_images != 1:
            raise InvalidRequest(
                f"num_images: {accept} holds one image; accept application/json for more", field="num_images"
            )
        done = await draw(http, upstream, request)
        if accept in FORMATS:
            return Response(done.encoded[0], media_type=accept)
        return await as_json(lambda: finished(done))

    return router


def to_request(data: dict[str, Any], form: Format | None = None) -> Request:
    """Make a request that returns files, PNG unless it says otherwise. Raises InvalidRequest.

    Pictures in `images` are base64 or data: URLs; `tensors` are for gRPC.
    """
    if "tensors" in data:
        raise InvalidRequest("tensors: is read over gRPC only", field="tensors")
    images = data.get("images", {})
    if not isinstance(images, dict):
        raise InvalidRequest("images: takes an object of pictures by name", field="images")
    return with_files({**data, "images": {name: decoded(name, text) for name, text in images.items()}}, form)


def with_files(given: dict[str, Any], form: Format | None) -> Request:
    """Make a request that returns files of this format, or of its own. Raises InvalidRequest if they differ."""
    request = Request.parse(given)
    asked = request.options.format
    if form is not None and asked not in (None, form):
        raise InvalidRequest(f"options.format: is {asked}, but {form} is asked for as well", field="options.format")
    options = request.options.model_copy(update={"format": form or asked or "png"})
    return request.model_copy(update={"options": options})


def finished(done: Done) -> dict[str, Any]:
    maps = {} if done.maps is None else {"maps": pngs(done.maps)}
    return {
        "images": [as_base64(content) for content in done.encoded],
        "format": done.receipt.request.options.get("format"),
        "receipt": done.receipt.to_json(),
        **maps,
    }


async def _events(http: HttpRequest, upstream: Upstream, request: Request) -> AsyncIterator[str]:
    try:
        async for text in as_events(upstream.draw(request, http.state.request_id), _told):
            yield text
    except ScumbleError as error:
        yield sse("failed", problem_body(status_of(error), error.code, error.message, http.state.request_id))


def _told(event: StreamEvent) -> list[tuple[str, dict[str, Any]]]:
    match event:
        case Queued(position):
            return [("queued", {"position": position})]
        case Step(step, steps):
            return [("step", {"step": step, "steps": steps})]
        case Preview(step, steps, images):
            return [("preview", {"step": step, "steps": steps, "images": pngs(images)})]
        case Done():
            return [("done", finished(event))]


def _accepted(accept: str) -> str:
    """Choose what is returned: the first of the header that is offered. Raises InvalidRequest."""
    kinds = [kind.partition(";")[0].strip().lower() for kind in accept.split(",")]
    for kind in kinds:
        if kind in FORMATS or kind == EVENTS:
            return kind
        if kind in ("application/json", "application/*", "*/*", ""):
            return "application/json"
        if kind == "image/*":
            return "image/png"
    raise InvalidRequest(
        f"Accept: {accept!r} is not offered; there are application/json, {', '.join(FORMATS)}, {EVENTS}", field="Accept"
    )


def _described() -> dict[str, Any]:
    """What OpenAPI says of the body: the client's request, with pictures as text."""
    schema = Options.model_json_schema(ref_template="#/components/schemas/{model}")
    fields = {name: {"description": info.description or name} for name, info in Request.model_fields.items()}
    del fields["tensors"]
    fields["options"] = {"type": "object", "properties": schema["properties"]}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"type": "object", "required": ["prompt"], "properties": fields, "example": EXAMPLE}
                }
            },
        }
    }
