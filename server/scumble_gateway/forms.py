"""Reads multipart forms, as OpenAI's clients send pictures with: fields as text, files as bytes."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request as HttpRequest

from scumble.errors import InvalidRequest
from scumble_gateway.bodies import media_type, read_body

MAX_FILES = 16
MAX_FIELDS = 100
_NESTED = re.compile(r"(\w+)\[(\w*)\]", re.ASCII)


async def read_form(http: HttpRequest) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    """Return a form's fields and files by name; `image[]` is `image`, `options[strength]` a value in `options`.

    Raises InvalidRequest, and as `read_body` does.
    """
    kind = media_type(http)
    if kind != "multipart/form-data":
        raise InvalidRequest(f"Content-Type: is {kind!r}, takes multipart/form-data", field="Content-Type")
    body = await read_body(http)
    parser = MultiPartParser(http.headers, _once(body), max_files=MAX_FILES, max_fields=MAX_FIELDS)
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError, KeyError) as error:
        raise InvalidRequest(f"the form cannot be read: {getattr(error, 'message', error)}") from error
    try:
        return await _parts(form)
    finally:
        await form.close()


async def _parts(form: FormData) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    fields: dict[str, Any] = {}
    files: dict[str, list[bytes]] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            files.setdefault(name.removesuffix("[]"), []).append(await value.read())
        else:
            _put(fields, name, value)
    return fields, files


def _put(fields: dict[str, Any], name: str, text: str) -> None:
    nested = _NESTED.fullmatch(name)
    if nested is None:
        if name in fields:
            raise InvalidRequest(f"{name}: is given twice", field=name)
        fields[name] = _value(name, text)
        return
    outer, inner = nested.groups()
    held = fields.setdefault(outer, {} if inner else [])
    if inner and isinstance(held, dict):
        held[inner] = _value(name, text)
    elif not inner and isinstance(held, list):
        held.append(_value(name, text))
    else:
        raise InvalidRequest(f"{outer}: is given as a list and as an object", field=outer)


def _value(name: str, text: str) -> Any:
    """Lists and objects are JSON; all else is text, of which a request's fields make numbers."""
    if not text.startswith(("[", "{")) or name in ("prompt", "negative_prompt"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{name}: not JSON ({error})", field=name) from error


async def _once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body
