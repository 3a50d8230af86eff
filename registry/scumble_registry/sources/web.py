"""One file from an https address that somebody gave: bounded, checked, and from public addresses only.

No proxy is asked and nothing of the environment is heeded but certificates (SSL_CERT_FILE) and tokens. A token goes in
a header, to its own host and no further: redirects lead to other hosts. No message and no manifest holds a query's
values, where people put tokens and servers put signatures, except a few that are known to name files.
"""

from __future__ import annotations

import hashlib
import os
import re
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urljoin, urlsplit

import httpcore2

from scumble.errors import InvalidRequest, NotFound, Refused, Unavailable
from scumble_registry.sources import LARGEST, Fetched
from scumble_registry.sources.addresses import CheckedNetwork, Rule, is_public

TOKENS = {"civitai.com": ("CIVITAI_TOKEN", "CIVITAI_API_TOKEN")}
"""Host (and its subdomains) → where its token may stand in the environment."""

_MOST_REDIRECTS = 5
_NAMING = frozenset({"download", "file", "filename", "format", "fp", "id", "modelversionid", "size", "type", "version"})
_UNSAFE = re.compile(r"[^\w .()+,=@-]")
_LONGEST_NAME = 150


@dataclass(frozen=True, slots=True)
class Rules:
    """How a fetch behaves towards the network."""

    allowed: Rule = is_public
    context: ssl.SSLContext = field(default_factory=httpcore2.default_ssl_context)
    connect_seconds: float = 15.0
    read_seconds: float = 60.0
    """Without a byte."""
    most_seconds: float = 6 * 3600.0
    """In all."""


def fetch(url: str, folder: Path, *, max_bytes: int | None = None, rules: Rules | None = None) -> Fetched:
    """The file at `url`, in `folder`, under a name made safe.

    Raises InvalidRequest (no URL), NotFound, Refused (address, size, no file but a page, no permission), Unavailable
    (network, server, disk).
    """
    _check(url)
    limit = LARGEST if max_bytes is None else max_bytes
    rules = rules or Rules()
    started = time.monotonic()
    with _pool(rules) as pool, _response(pool, url, rules) as (response, headers):
        _check_answer(url, response.status, headers, limit)
        path = folder / file_name(headers.get("content-disposition"), url)
        with path.open("xb") as target:
            digest = _copy(response, target, limit, url, started + rules.most_seconds)
    origin = {"url": shown(url), "sha256": digest, "modified": _modified(headers), "file": path.name}
    return Fetched(path, {key: value for key, value in origin.items() if value})


def shown(url: str) -> str:
    """The URL without what may be secret: user, password, fragment, and all of the query that does not name a file."""
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else (parts.hostname or "")
    port = f":{parts.port}" if parts.port else ""
    query = urlencode([(key, value) for key, value in parse_qsl(parts.query) if key.lower() in _NAMING])
    return f"{parts.scheme}://{host}{port}{parts.path}" + (f"?{query}" if query else "")


def file_name(disposition: str | None, url: str) -> str:
    """As the server calls the file (RFC 6266), else the URL's last part: one printable name, never a path.

    >>> file_name('attachment; filename="../../ink v2.safetensors"', "https://a/b")
    'ink v2.safetensors'
    """
    message = Message()
    if disposition:
        message["Content-Disposition"] = disposition
    said = message.get_filename() if disposition else None
    name = said or unquote(urlsplit(url).path)
    name = _UNSAFE.sub("_", PurePosixPath(name.replace("\\", "/")).name).strip(". ")
    stem, dot, ending = name.rpartition(".")
    if len(name) > _LONGEST_NAME:
        name = f"{stem[: _LONGEST_NAME - 20]}{dot}{ending[:19]}"
    return name or "download"


def token_for(host: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The environment's token for a host, if it has one."""
    for owner, names in TOKENS.items():
        if host == owner or host.endswith(f".{owner}"):
            return next((environment[name] for name in names if environment.get(name)), None)
    return None


def _check(url: str) -> None:
    try:
        parts = urlsplit(url)
        _ = parts.port
        url.encode("ascii")
    except ValueError as error:
        raise InvalidRequest(f"the address is no URL: {error}; write https://host/path", field="source") from error
    if parts.scheme != "https":
        raise Refused(f"{shown(url)} is not https; what comes by other ways may have been changed")
    if not parts.hostname or any(character.isspace() or not character.isprintable() for character in url):
        raise InvalidRequest("the address is no URL: write https://host/path", field="source")
    if parts.username is not None or parts.password is not None:
        raise InvalidRequest(f"{shown(url)} was given with a password, which others could read; leave it out")


@contextmanager
def _pool(rules: Rules) -> Iterator[httpcore2.ConnectionPool]:
    with httpcore2.ConnectionPool(
        ssl_context=rules.context, network_backend=CheckedNetwork(rules.allowed), max_keepalive_connections=0
    ) as pool:
        yield pool


@contextmanager
def _response(
    pool: httpcore2.ConnectionPool, url: str, rules: Rules
) -> Iterator[tuple[httpcore2.Response, dict[str, str]]]:
    """The answer behind all redirects, each of which is judged as the first address was."""
    timeout = {"connect": rules.connect_seconds, "read": rules.read_seconds, "write": 30.0, "pool": 30.0}
    current = url
    for _ in range(_MOST_REDIRECTS + 1):
        with (
            _explained(url),
            pool.stream("GET", current, headers=_headers(current), extensions={"timeout": timeout}) as response,
        ):
            headers = _read_headers(response)
            if response.status not in {301, 302, 303, 307, 308} or "location" not in headers:
                yield response, headers
                return
        current = urljoin(current, headers["location"])
        _check(current)
    raise Refused(f"{shown(url)} leads from one address to the next, more than {_MOST_REDIRECTS} times")


def _headers(url: str) -> list[tuple[str, str]]:
    parts = urlsplit(url)
    headers = [("Host", parts.netloc), ("User-Agent", "scumble"), ("Accept", "*/*"), ("Accept-Encoding", "identity")]
    token = token_for(parts.hostname or "")
    return headers + ([("Authorization", f"Bearer {token}")] if token else [])


def _read_headers(response: httpcore2.Response) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}


def _modified(headers: dict[str, str]) -> str | None:
    """When the server says that the file was made, so that it stays the same however often it is fetched."""
    try:
        return parsedate_to_datetime(headers["last-modified"]).isoformat()
    except (KeyError, ValueError):
        return None


def _check_answer(url: str, status: int, headers: dict[str, str], limit: int) -> None:
    if status in {401, 403}:
        names = [name for owner, names in TOKENS.items() if owner in (urlsplit(url).hostname or "") for name in names]
        hint = f"set {names[0]} to a token that may" if names else "download it yourself and publish it"
        raise Refused(f"{shown(url)} may not be fetched (status {status}); {hint}", status=status)
    if status in {404, 410}:
        raise NotFound(f"there is nothing at {shown(url)} (status {status})", status=status)
    if status != 200:
        raise Unavailable(f"{shown(url)} answered with status {status}; try again later", status=status)
    if headers.get("content-encoding", "identity") != "identity":
        raise Refused(f"{shown(url)} comes as {headers['content-encoding']}, which was not asked for")
    if headers.get("content-type", "").lower().startswith(("text/html", "application/xhtml")):
        raise Refused(f"{shown(url)} is a page, not a file; it may want you to log in, or link to the file")
    length = headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        raise _too_large(url, int(length), limit)


def _copy(response: httpcore2.Response, target: Any, limit: int, url: str, deadline: float) -> str:
    """Counts while it writes: a server need not say how much it sends, and may lie."""
    digest, size = hashlib.sha256(), 0
    for chunk in response.iter_stream():
        size += len(chunk)
        if size > limit:
            raise _too_large(url, size, limit)
        if time.monotonic() > deadline:
            raise Unavailable(f"{shown(url)} came too slowly and was given up after {size:,} bytes")
        digest.update(chunk)
        target.write(chunk)
    return digest.hexdigest()


def _too_large(url: str, size: int, limit: int) -> Refused:
    return Refused(f"{shown(url)} has {size:,} bytes or more; at most {limit:,} are fetched (--max-size)", bytes=size)


@contextmanager
def _explained(url: str) -> Iterator[None]:
    try:
        yield
    except httpcore2.TimeoutException as error:
        raise Unavailable(f"{shown(url)} did not answer in time; try again later") from error
    except (httpcore2.NetworkError, httpcore2.ProtocolError, ssl.SSLError, httpcore2.UnsupportedProtocol) as error:
        raise Unavailable(f"{shown(url)} could not be fetched: {error}; check the address and the network") from error
    except OSError as error:
        raise Unavailable(f"{shown(url)} could not be kept: {error.strerror}; check space and permissions") from error
