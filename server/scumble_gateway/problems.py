"""Errors as HTTP has them: a true status, and problem+json (RFC 9457) or OpenAI's form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from scumble.errors import InvalidRequest, ScumbleError

STATUS: Mapping[str, int] = {
    "invalid_request": 400,
    "not_found": 404,
    "too_large": 413,
    "refused": 422,
    "incompatible": 422,
    "out_of_memory": 422,
    "queue_full": 429,
    "integrity": 500,
    "internal": 500,
    "unavailable": 503,
    "cancelled": 503,
    "deadline_exceeded": 504,
}
"""Code of an error → status. `out_of_memory` is told of a request that does not fit even alone: it is not to be tried
again as it is."""
PROBLEM = "application/problem+json"
MISDIRECTED = 421
_RETRY_AFTER = {"unavailable": 1.0, "queue_full": 1.0}
"""Seconds, if the error does not say."""
_TITLES = {
    400: "The request is not valid",
    404: "Not found",
    405: "Method not allowed",
    408: "The request took too long to arrive",
    413: "The request is too large",
    415: "Not a type that is read here",
    421: "Not a name of this server",
    422: "The request cannot be drawn",
    431: "The head is too large",
    429: "Too many requests",
    500: "Internal error",
    503: "Not available now",
    504: "Not finished by its deadline",
}


class TooLarge(InvalidRequest):
    """The body exceeds a limit."""

    code = "too_large"


def status_of(error: ScumbleError) -> int:
    return STATUS.get(error.code, 500)


def problem(error: ScumbleError, request_id: str) -> JSONResponse:
    """Answer with problem+json: `code` and `field` are ours, and the same as everywhere."""
    status = status_of(error)
    body = problem_body(status, error.code, error.message, request_id) | {
        name: value for name, value in error.fields.items() if name in ("field", "retry_after")
    }
    return JSONResponse(body, status, retry_header(error), PROBLEM)


def problem_body(status: int, code: str, detail: str, request_id: str) -> dict[str, Any]:
    return {
        "type": "about:blank",
        "title": _TITLES.get(status, "Error"),
        "status": status,
        "detail": detail,
        "code": code,
        "request_id": request_id,
    }


def openai_problem(error: ScumbleError) -> JSONResponse:
    return JSONResponse(openai_body(error), status_of(error), retry_header(error))


def openai_body(error: ScumbleError) -> dict[str, Any]:
    """As https://platform.openai.com/docs/guides/error-codes has it."""
    status = status_of(error)
    kind = {429: "rate_limit_error"}.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.fields.get("field"), "code": error.code}}


def retry_header(error: ScumbleError) -> dict[str, str]:
    if error.code not in _RETRY_AFTER:
        return {}
    return {"Retry-After": str(math.ceil(float(error.fields.get("retry_after", _RETRY_AFTER[error.code]))))}
