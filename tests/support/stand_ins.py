"""Servers on loopback that answer as the Hugging Face Hub and as any web server do."""

from __future__ import annotations

import hashlib
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def serving(answer: Answer, context: ssl.SSLContext | None = None) -> Iterator[int]:
    """The port on 127.0.0.1 where every GET and HEAD is given to `answer`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            try:
                answer(self)
            except (BrokenPipeError, ConnectionResetError, ssl.SSLError):
                self.close_connection = True

        do_HEAD = do_GET  # noqa: N815 - the name is looked up

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign] # clients that hang up are part of the tests
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def reply(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes = b"") -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(body)


@dataclass
class Hub:
    """One repository `ann/ink` with one commit, as the Hub serves it: large files by redirect to another place."""

    files: dict[str, bytes]
    lfs: set[str] = field(default_factory=set)
    card: dict[str, Any] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False
    commit: str = "c0ffee" + "0" * 34
    repo: str = "ann/ink"
    wrong: set[str] = field(default_factory=set)
    """Files that come with other bytes than their digest says."""
    says_no_sizes: bool = False
    served: list[str] = field(default_factory=list)
    """Paths of files whose bytes were fetched."""
    tokens_at_storage: list[str | None] = field(default_factory=list)

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path)
        if path.startswith("/storage/"):
            self.tokens_at_storage.append(handler.headers.get("Authorization"))
            return self._bytes(handler, path.removeprefix("/storage/"))
        if self.token is not None and handler.headers.get("Authorization") != f"Bearer {self.token}":
            code = "GatedRepo" if self.gated else "RepoNotFound"
            return reply(handler, 403 if self.gated else 401, {"X-Error-Code": code, "X-Error-Message": "no"})
        api, files = f"/api/models/{self.repo}", f"/{self.repo}/resolve/"
        if path == api or path.startswith(f"{api}/revision/"):
            return self._info(handler, path.removeprefix(api).removeprefix("/revision/"))
        if path.startswith(files):
            return self._file(handler, *path.removeprefix(files).split("/", 1))
        return reply(handler, 404, {"X-Error-Code": "RepoNotFound"})

    def _info(self, handler: BaseHTTPRequestHandler, revision: str) -> None:
        if revision not in {"", "main", "refs/pr/1", self.commit}:
            return reply(handler, 404, {"X-Error-Code": "RevisionNotFound"})
        siblings = [
            {"rfilename": name, "size": None if self.says_no_sizes else len(data), **self._lfs(name)}
            for name, data in self.files.items()
        ]
        info = {"id": self.repo, "sha": self.commit, "siblings": siblings, "cardData": self.card}
        return reply(handler, 200, {"Content-Type": "application/json"}, json.dumps(info).encode())

    def _lfs(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        return {"lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 130}} if name in self.lfs else {}

    def _file(self, handler: BaseHTTPRequestHandler, revision: str, name: str) -> None:
        if revision != self.commit or name not in self.files:
            return reply(handler, 404, {"X-Error-Code": "EntryNotFound"})
        commit = {"X-Repo-Commit": self.commit}
        data = self.files[name]
        if name not in self.lfs:
            etag = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            if handler.command == "GET":
                self.served.append(name)
            return reply(handler, 200, {**commit, "ETag": f'"{etag}"'}, data)
        linked = {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
        # by another name of the same machine: a place that must not see the token
        location = f"http://localhost:{handler.server.server_address[1]}/storage/{name}"
        return reply(handler, 302, {**commit, **linked, "Location": location})

    def _bytes(self, handler: BaseHTTPRequestHandler, name: str) -> None:
        self.served.append(name)
        data = self.files[name]
        reply(handler, 200, {"ETag": '"storage"'}, data[::-1] if name in self.wrong else data)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
