"""OpenAI's `POST /v1/images/edits` and `/v1/images/variations`: img2img and inpainting.

An edit without a mask redraws the whole picture; with one, what is transparent in it (or white, where it has no
transparency) changes and the rest stays. A variation is an edit without a prompt.
"""

from __future__ import annotations

import io
from typing import Any

from fastapi import APIRouter, Response
from PIL import Image, UnidentifiedImageError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest

from scumble.errors import InvalidRequest
from scumble_gateway.forms import read_form
from scumble_gateway.openai_images import answer
from scumble_gateway.problems import TooLarge
from scumble_gateway.upstream import Upstream

MAX_MASK_PIXELS = 16 << 20
STRENGTH_OF_VARIATIONS = 0.6
_FORM: dict[str, Any] = {
    "type": "object",
    "required": ["image"],
    "properties": {
        "image": {"type": "string", "format": "binary"},
        "mask": {"type": "string", "format": "binary"},
        "prompt": {"type": "string"},
    },
}
_DESCRIBED = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}


def routes(upstream: Upstream) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/images/edits", openapi_extra=_DESCRIBED, response_model=None, tags=["openai"])
    async def edits(http: HttpRequest) -> Response:
        """Change a picture as the prompt says; with a mask, a part of it. `options[strength]` says how much."""
        fields, files = await read_form(http)
        options, images = await run_in_threadpool(_pictures, files)
        return await answer(http, upstream, fields, "image_edit", options, images)

    @router.post("/v1/images/variations", openapi_extra=_DESCRIBED, response_model=None, tags=["openai"])
    async def variations(http: HttpRequest) -> Response:
        """Draw pictures like this one."""
        fields, files = await read_form(http)
        if "mask" in files or "prompt" in fields:
            raise InvalidRequest("a variation has no prompt and no mask; ask for an edit", field="prompt")
        options, images = await run_in_threadpool(_pictures, files)
        options["strength"] = STRENGTH_OF_VARIATIONS
        return await answer(http, upstream, {**fields, "prompt": ""}, "image_edit", options, images)

    return router


def _pictures(files: dict[str, list[bytes]]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Options and input pictures: `image`, then `image_2` … for adapters that look at more, and `mask`."""
    unknown = files.keys() - {"image", "mask"}
    if unknown:
        raise InvalidRequest(f"{min(unknown)}: takes no file; there are image and mask", field=min(unknown))
    first, *more = files.get("image", [b""])
    if not first:
        raise InvalidRequest("image: takes a picture's file", field="image")
    images = {"image": first} | {f"image_{number}": content for number, content in enumerate(more, start=2)}
    if len(files.get("mask", ())) > 1:
        raise InvalidRequest("mask: takes one file", field="mask")
    if "mask" not in files:
        return {"image": "image"}, images
    return {"image": "image", "mask": "mask"}, images | {"mask": _as_ours(files["mask"][0])}


def _as_ours(mask: bytes) -> bytes:
    """Transparent is to change in OpenAI's masks, white in ours. Raises InvalidRequest, TooLarge."""
    try:
        with Image.open(io.BytesIO(mask), formats=("PNG", "WEBP", "JPEG")) as opened:
            if opened.width * opened.height > MAX_MASK_PIXELS:
                raise TooLarge(f"mask: has more than {MAX_MASK_PIXELS} pixels", field="mask")
            if not opened.has_transparency_data:
                return mask
            kept = opened.convert("RGBA").getchannel("A")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InvalidRequest(f"mask: not a picture that can be read ({error})", field="mask") from error
    buffer = io.BytesIO()
    kept.point(lambda opacity: 255 - opacity).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
