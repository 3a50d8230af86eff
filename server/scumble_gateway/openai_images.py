"""OpenAI's images API: `POST /v1/images/generations`, `GET /v1/models`, and what its other routes share.

`model` is a base, adapters behind it: `sd/v1-5+styles/ink@3:0.8`. Our own fields of a request (`seed`, `steps`,
`adapters` …) may stand beside OpenAI's. What OpenAI has and we have not is refused by name, not ignored.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from types import MappingProxyType
from typing import Any, get_args

from fastapi import APIRouter, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse

from scumble.errors import InvalidRequest, NotFound, ScumbleError
from scumble.events import Done, Preview, StreamEvent
from scumble.request import Format, Request
from scumble.suggestions import unknown
from scumble_gateway.bodies import read_object
from scumble_gateway.drawing import as_base64, as_events, as_json, draw, pngs, sse
from scumble_gateway.generate import with_files
from scumble_gateway.problems import openai_body
from scumble_gateway.upstream import Upstream

MAX_PARTIAL_IMAGES = 3
_STEPS = 20
"""Assumed for the distance of partial images where a request does not say how many it takes."""
_THEIRS = frozenset(
    "model prompt n size response_format output_format output_compression stream partial_images user".split()  # noqa: SIM905
)
_ONLY: dict[str, tuple[Any, ...]] = {
    "response_format": ("b64_json",),
    "background": ("auto", "opaque"),
    "quality": ("auto", "standard"),
    "moderation": ("auto",),
    "style": (),
    "input_fidelity": (),
}
"""Fields of which only these values are offered."""
_OURS = frozenset(Request.model_fields) - {"num_images", "width", "height", "base", "tensors", "images"}


def routes(upstream: Upstream) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/images/generations", openapi_extra=_described(), response_model=None, tags=["openai"])
    async def generations(http: HttpRequest) -> Response:
        """Draw images, as OpenAI's API has it. Our own fields may stand beside (`extra_body` in their clients)."""
        return await answer(http, upstream, await read_object(http), "image_generation")

    @router.get("/v1/models", tags=["openai"])
    async def models() -> dict[str, Any]:
        """List the bases that are served; the first draws requests that name none."""
        return {"object": "list", "data": [_model(name) for name in await _bases(upstream)]}

    @router.get("/v1/models/{name:path}", tags=["openai"])
    async def model(name: str) -> dict[str, Any]:
        bases = await _bases(upstream)
        if name not in bases:
            raise NotFound(f"no base {name!r} is served here; there are {', '.join(bases)}", field="model")
        return _model(name)

    return router


async def answer(
    http: HttpRequest,
    upstream: Upstream,
    data: dict[str, Any],
    kind: str,
    options: Mapping[str, Any] = MappingProxyType({}),
    images: Mapping[str, bytes] = MappingProxyType({}),
) -> Response:
    """Draw what OpenAI's fields ask for. `kind` begins the names of events; given options go before `options`."""
    request = await run_in_threadpool(to_our_request, data, options, images)
    if data.get("stream") in (True, "true"):
        return StreamingResponse(_events(http, upstream, request, kind), media_type="text/event-stream")
    done = await draw(http, upstream, request)
    return await as_json(lambda: _finished(done))


def to_our_request(
    data: dict[str, Any],
    more_options: Mapping[str, Any] = MappingProxyType({}),
    images: Mapping[str, bytes] = MappingProxyType({}),
) -> Request:
    """Read OpenAI's fields and ours; numbers may be text, as in forms. Raises InvalidRequest that names what is not
    offered.
    """
    for name, offered in _ONLY.items():
        if data.get(name) is not None and data[name] not in offered:
            said = f"takes {' or '.join(map(repr, offered))}" if offered else "is not offered; leave it out"
            raise InvalidRequest(f"{name}: {said}", field=name)
    for name in data.keys() - _THEIRS - _ONLY.keys() - _OURS:
        raise InvalidRequest(f"{name}: {unknown(name, sorted(_THEIRS | _OURS))}", field=name)
    ours = {name: data[name] for name in _OURS & data.keys()}
    base, adapters = _model_parts(data.get("model"))
    ours["adapters"] = [*adapters, *_list(ours.get("adapters", []))]
    ours |= {"base": base} if base is not None else {}
    ours |= {"num_images": data["n"]} if data.get("n") is not None else {}
    ours |= _size(data.get("size"))
    options = ours.get("options", {})
    if not isinstance(options, dict):
        raise InvalidRequest("options: takes a JSON object", field="options")
    form = _format(data)
    compression = data.get("output_compression")
    if compression is not None:
        options = {**options, "quality": _number("output_compression", compression, 1, 100)}
        if (form or options.get("format", "png")) == "png":
            raise InvalidRequest(
                "output_compression: is of jpeg and webp; png loses nothing", field="output_compression"
            )
    ours["options"] = {**more_options, **options, **_partial_images(data, ours.get("steps"))}
    return with_files({**ours, "images": dict(images)}, form)


def _number(name: str, value: Any, least: int, most: int) -> int:
    text = str(value)
    if isinstance(value, bool) or not (text.isdecimal() and len(text) < 10 and least <= int(text) <= most):
        raise InvalidRequest(f"{name}: takes {least} to {most}", field=name)
    return int(text)


def _model_parts(model: Any) -> tuple[str | None, list[str]]:
    """`base+adapter:0.8+…` → base and adapters; no base: the server's first."""
    if model is None or model == "":
        return None, []
    if not isinstance(model, str):
        raise InvalidRequest("model: takes the name of a base, with +adapter:weight behind it", field="model")
    base, *adapters = model.split("+")
    return base or None, adapters


def _list(adapters: Any) -> list[Any]:
    if not isinstance(adapters, list):
        raise InvalidRequest("adapters: takes a list", field="adapters")
    return adapters


def _size(size: Any) -> dict[str, int]:
    """`512x768` → width and height; `auto`: the base's."""
    if size in (None, "auto"):
        return {}
    width, x, height = size.partition("x") if isinstance(size, str) else ("", "", "")
    if not (x and width.isdecimal() and height.isdecimal() and len(size) < 16):
        raise InvalidRequest(f"size: {size!r} is not WIDTHxHEIGHT in pixels, or auto", field="size")
    return {"width": int(width), "height": int(height)}


def _format(data: dict[str, Any]) -> Format | None:
    form = data.get("output_format")
    if form is not None and form not in get_args(Format):
        raise InvalidRequest(f"output_format: takes {', '.join(get_args(Format))}", field="output_format")
    return form


def _partial_images(data: dict[str, Any], steps: Any) -> dict[str, int]:
    """Previews at even distances."""
    count = _number("partial_images", data.get("partial_images") or 0, 0, MAX_PARTIAL_IMAGES)
    if count and data.get("stream") not in (True, "true"):
        raise InvalidRequest("partial_images: need stream: true", field="partial_images")
    taken = int(steps) if str(steps).isdecimal() and len(str(steps)) < 6 else _STEPS
    return {"preview_every": max(1, taken // (count + 1))} if count else {}


def _finished(done: Done) -> dict[str, Any]:
    return {
        "created": int(time.time()),
        "data": [{"b64_json": as_base64(content)} for content in done.encoded],
        **_about(done),
        "receipt": done.receipt.to_json(),
    }


def _about(done: Done) -> dict[str, Any]:
    asked = done.receipt.request
    return {
        "background": "opaque",
        "output_format": asked.options.get("format"),
        "quality": "auto",
        "size": f"{asked.width}x{asked.height}",
    }


async def _events(http: HttpRequest, upstream: Upstream, request: Request, kind: str) -> AsyncIterator[str]:
    try:
        async for text in as_events(upstream.draw(request, http.state.request_id), _teller(kind)):
            yield text
    except ScumbleError as error:
        yield sse("error", openai_body(error))


def _teller(kind: str) -> Callable[[StreamEvent], list[tuple[str, dict[str, Any]]]]:
    partial = 0

    def told(event: StreamEvent) -> list[tuple[str, dict[str, Any]]]:
        nonlocal partial
        created = {"created_at": int(time.time())}
        if isinstance(event, Preview) and partial < MAX_PARTIAL_IMAGES and event.step < event.steps:
            name, partial = f"{kind}.partial_image", partial + 1
            shown = {"partial_image_index": partial - 1, "output_format": "png", "background": "opaque"}
            return [(name, {"type": name, "b64_json": each, **created, **shown}) for each in pngs(event.images)]
        if isinstance(event, Done):
            name, about = f"{kind}.completed", _about(event)
            files = map(as_base64, event.encoded)
            return [(name, {"type": name, "b64_json": each, **created, **about}) for each in files]
        return []

    return told


async def _bases(upstream: Upstream) -> list[str]:
    """By name: which version is served is in the receipt."""
    return [ref.partition("@")[0] for ref in (await upstream.stats()).bases]


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "scumble"}


def _described() -> dict[str, Any]:
    fields: dict[str, Any] = {name: {} for name in sorted(_OURS)} | {
        "prompt": {"type": "string"},
        "model": {"type": "string", "examples": ["scumble/demo+styles/ink@3:0.8"]},
        "n": {"type": "integer", "minimum": 1},
        "size": {"type": "string", "examples": ["512x512", "auto"]},
        "response_format": {"enum": ["b64_json"]},
        "output_format": {"enum": [*get_args(Format)]},
        "output_compression": {"type": "integer", "minimum": 1, "maximum": 100},
        "stream": {"type": "boolean"},
        "partial_images": {"type": "integer", "minimum": 0, "maximum": MAX_PARTIAL_IMAGES},
    }
    schema = {"type": "object", "required": ["prompt"], "properties": fields}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
