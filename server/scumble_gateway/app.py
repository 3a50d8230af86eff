"""The application: routes, errors, request ids, and who may call."""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from urllib.parse import urlsplit

from fastapi import FastAPI, Response
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scumble.errors import ScumbleError
from scumble_gateway import generate, openai_edits, openai_images
from scumble_gateway.problems import MISDIRECTED, PROBLEM, openai_problem, problem, problem_body
from scumble_gateway.upstream import Upstream

OPENAI = ("/v1/images/", "/v1/models")
"""Paths whose errors have OpenAI's form."""
_REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)
_CODES = {404: "not_found", 405: "not_found"}
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def create_app(upstream: Upstream) -> FastAPI:
    """Make the application for callers on this machine. It closes `upstream` at its end."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await upstream.close()

    app = FastAPI(title="Scumble", version=version("scumble"), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.include_router(generate.routes(upstream))
    app.include_router(openai_images.routes(upstream))
    app.include_router(openai_edits.routes(upstream))

    @app.get("/healthz", tags=["health"])
    async def healthz() -> dict[str, str]:
        """Tell that this process answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["health"], response_model=None)
    async def readyz() -> JSONResponse:
        """Tell whether a request would be drawn: 200, else 503."""
        is_ready = await upstream.is_ready()
        return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)

    @app.exception_handler(ScumbleError)
    async def typed(http: HttpRequest, error: ScumbleError) -> Response:
        return _answer(http, error)

    @app.exception_handler(HTTPException)
    async def untyped(http: HttpRequest, error: HTTPException) -> Response:
        code = _CODES.get(error.status_code, "invalid_request")
        body = problem_body(error.status_code, code, str(error.detail), http.state.request_id)
        return JSONResponse(body, error.status_code, error.headers, PROBLEM)

    @app.exception_handler(Exception)
    async def unforeseen(http: HttpRequest, _error: Exception) -> Response:
        response = _answer(http, ScumbleError("the gateway failed; its log has the reason"))
        response.headers["X-Request-Id"] = http.state.request_id  # it is made outside of `Doorkeeper`
        return response

    app.add_middleware(Doorkeeper)
    return app


class Doorkeeper:
    """Gives each request an id, its own or a new one, and lets nobody in but programs of this machine."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        http = HttpRequest(scope)
        given = http.headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        http.state.request_id = request_id

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        reason = _stranger(http)
        if reason is None:
            await self._app(scope, receive, named)
        else:
            body = problem_body(MISDIRECTED, "refused", reason, request_id)
            await JSONResponse(body, MISDIRECTED, media_type=PROBLEM)(scope, receive, named)


def _answer(http: HttpRequest, error: ScumbleError) -> Response:
    if http.url.path.startswith(OPENAI):
        return openai_problem(error)
    return problem(error, http.state.request_id)


def _stranger(http: HttpRequest) -> str | None:
    """Say why a call does not come from a program on this machine, but from a page in its browser.

    Any page may send requests to 127.0.0.1; a name that resolves to it would even let the page read the answers.
    """
    if _host(f"//{http.headers.get('host', '')}") not in _LOOPBACK:
        return "Host: this server is called localhost or 127.0.0.1"
    origin = http.headers.get("origin")
    if origin is not None and _host(origin) not in _LOOPBACK:
        return f"Origin: pages of {origin} may not call this server"
    return None


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
