"""Download one file from an untrusted https address: with limits, checked, and from public addresses only.

Proxies are not used; of the environment only certificates (SSL_CERT_FILE) and tokens apply. A token is sent in a header
to its own host only, not to the hosts of redirects. Messages and manifests leave out the values of a query, which may
be tokens or signatures, except a few that are known to name files.
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
"""Host (and its subdomains) → environment variables that may hold its token."""

_MOST_REDIRECTS = 5
_NAMING = frozenset({"download", "file", "filename", "format", "fp", "id", "modelversionid", "size", "type", "version"})
_UNSAFE = re.compile(r"[^\w .()+,=@-]")
_LONGEST_NAME = 150


@dataclass(frozen=True, slots=True)
class Rules:
    """Permitted addresses, certificates and time limits of a download."""

    allowed: Rule = is_public
    context: ssl.SSLContext = field(default_factory=httpcore2.default_ssl_context)
    connect_seconds: float = 15.0
    read_seconds: float = 60.0
    """The longest time without a byte."""
    most_seconds: float = 6 * 3600.0
    """The longest time in all."""


def fetch(url: str, folder: Path, *, max_bytes: int | None = None, rules: Rules | None = None) -> Fetched:
    """Download the file at `url` into `folder`, under a safe name.

    Raises InvalidRequest (not a URL), NotFound, Refused (address, size, a web page, no permission), Unavailable
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
    origin = {"url": redacted(url), "sha256": digest, "modified": _modified(headers), "file": path.name}
    return Fetched(path, {key: value for key, value in origin.items() if value})


def redacted(url: str) -> str:
    """Return the URL without user, password and fragment, and without the part of the query that may be secret."""
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else (parts.hostname or "")
    port = f":{parts.port}" if parts.port else ""
    query = urlencode([(key, value) for key, value in parse_qsl(parts.query) if key.lower() in _NAMING])
    return f"{parts.scheme}://{host}{port}{parts.path}" + (f"?{query}" if query else "")


def file_name(disposition: str | None, url: str) -> str:
    """Return the server's name of the file (RFC 6266), else the URL's last part: one printable name, never a path.

    >>> file_name('attachment; filename="../../ink v2.safetensors"', "https://a/b")
    'ink v2.safetensors'
    """
    message = Message()
    if disposition:
        message["Content-Disposition"] = disposition
    name = (message.get_filename() if disposition else None) or unquote(urlsplit(url).path)
    name = _UNSAFE.sub("_", PurePosixPath(name.replace("\\", "/")).name).strip(". ")
    stem, dot, ending = name.rpartition(".")
    if len(name) > _LONGEST_NAME:
        name = f"{stem[: _LONGEST_NAME - 20]}{dot}{ending[:19]}"
    return name or "download"


def token_for(host: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the environment's token for a host, or None."""
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
        raise InvalidRequest(f"the address is not a URL: {error}; write https://host/path", field="source") from error
    if parts.scheme != "https":
        raise Refused(
            f"{redacted(url)} is not https; use an https address, as files over plain http may be altered on the way"
        )
    if not parts.hostname or any(character.isspace() or not character.isprintable() for character in url):
        raise InvalidRequest("the address is not a URL: write https://host/path", field="source")
    if parts.username is not None or parts.password is not None:
        raise InvalidRequest(f"{redacted(url)} has a password, which would be stored in the manifest; leave it out")


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
    """Yield the response after all redirects, each of which is checked like the first address. Raises Refused."""
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
    raise Refused(f"{redacted(url)} has more than {_MOST_REDIRECTS} redirects; use the file's own address")


def _headers(url: str) -> list[tuple[str, str]]:
    parts = urlsplit(url)
    headers = [("Host", parts.netloc), ("User-Agent", "scumble"), ("Accept", "*/*"), ("Accept-Encoding", "identity")]
    token = token_for(parts.hostname or "")
    return headers + ([("Authorization", f"Bearer {token}")] if token else [])


def _read_headers(response: httpcore2.Response) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}


def _modified(headers: dict[str, str]) -> str | None:
    """Return the server's Last-Modified, which does not depend on the time of the download."""
    try:
        return parsedate_to_datetime(headers["last-modified"]).isoformat()
    except (KeyError, ValueError):
        return None


def _check_answer(url: str, status: int, headers: dict[str, str], limit: int) -> None:
    if status in {401, 403}:
        names = [name for owner, names in TOKENS.items() if owner in (urlsplit(url).hostname or "") for name in names]
        hint = f"set {names[0]} to a token with access" if names else "download it yourself and publish it"
        raise Refused(f"access to {redacted(url)} is denied (status {status}); {hint}", status=status)
    if status in {404, 410}:
        raise NotFound(f"there is no file at {redacted(url)} (status {status}); check the address", status=status)
    if status != 200:
        raise Unavailable(f"{redacted(url)} answered with status {status}; try again later", status=status)
    if headers.get("content-encoding", "identity") != "identity":
        raise Refused(
            f"{redacted(url)} has content encoding {headers['content-encoding']}; download it yourself and publish it"
        )
    if headers.get("content-type", "").lower().startswith(("text/html", "application/xhtml")):
        raise Refused(f"{redacted(url)} is a web page, not a file; it may require a login, or link to the file")
    length = headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        raise _too_large(url, int(length), limit)


def _copy(response: httpcore2.Response, target: Any, limit: int, url: str, deadline: float) -> str:
    """Write the content and return its sha256. Sizes are counted, as the server's may be missing or wrong."""
    digest, size = hashlib.sha256(), 0
    for chunk in response.iter_stream():
        size += len(chunk)
        if size > limit:
            raise _too_large(url, size, limit)
        if time.monotonic() > deadline:
            raise Unavailable(f"{redacted(url)} came too slowly; stopped after {size:,} bytes, try again later")
        digest.update(chunk)
        target.write(chunk)
    return digest.hexdigest()


def _too_large(url: str, size: int, limit: int) -> Refused:
    return Refused(
        f"{redacted(url)} has {size:,} bytes or more; at most {limit:,} are fetched (--max-size)", bytes=size
    )


@contextmanager
def _explained(url: str) -> Iterator[None]:
    try:
        yield
    except httpcore2.TimeoutException as error:
        raise Unavailable(f"{redacted(url)} did not answer in time; try again later") from error
    except (httpcore2.NetworkError, httpcore2.ProtocolError, ssl.SSLError, httpcore2.UnsupportedProtocol) as error:
        raise Unavailable(
            f"{redacted(url)} could not be fetched: {error}; check the address and the network"
        ) from error
    except OSError as error:
        raise Unavailable(
            f"{redacted(url)} could not be stored: {error.strerror}; check space and permissions"
        ) from error
