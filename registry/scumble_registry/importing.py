"""Fetch and publish in one step; the manifest's provenance names the source."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from scumble.errors import IntegrityError, InvalidRequest
from scumble_registry.references import parse_alias, parse_name
from scumble_registry.registry import Registry
from scumble_registry.sources import Fetched, HubSource, WebSource, parse_source
from scumble_registry.sources.web import Rules
from scumble_registry.store.catalogue import Version

_SHA256 = re.compile(r"(?:sha256:)?([0-9a-f]{64})", re.ASCII | re.IGNORECASE)


def import_from(
    registry: Registry,
    source: str,
    name: str,
    *,
    include: Collection[str] = (),
    sha256: str | None = None,
    max_bytes: int | None = None,
    provenance: Mapping[str, Any] | None = None,
    rules: Rules | None = None,
    **published: Any,
) -> Version:
    """Publish the files that `source` (`sources/`) names as the next version of `name`; `published` are arguments of
    `Registry.publish`.

    The provenance gets `source`: URL, commit, digest. The source's license is used where none is given. `max_bytes`
    limits the download too. Raises the errors of fetching and publishing; then nothing is published or left behind.
    """
    parse_name(name)
    if (alias := published.get("alias")) is not None:
        parse_alias(alias)
    for key in ("base", "image_encoder"):  # before gigabytes are fetched
        if published.get(key) is not None:
            registry.resolve(published[key])
    parsed = parse_source(source)
    expected = _digest(sha256)
    with registry.scratch() as work:
        fetched = _fetch(parsed, work, include, max_bytes, rules)
        _check_digest(fetched, expected)
        published["license"] = published.get("license") or fetched.license
        origin = {"source": fetched.origin}
        return registry.publish(
            fetched.path, name, provenance={**(provenance or {}), **origin}, max_bytes=max_bytes, **published
        )


def _fetch(
    source: HubSource | WebSource,
    work: Path,
    include: Collection[str],
    max_bytes: int | None,
    rules: Rules | None,
) -> Fetched:
    if isinstance(source, WebSource):
        if include:
            raise InvalidRequest("--include chooses files of a repository; an https address is one file")
        from scumble_registry.sources import web

        return web.fetch(source.url, work, max_bytes=max_bytes, rules=rules)
    from scumble_registry.sources import hub

    return hub.fetch(source, work, include=include, max_bytes=max_bytes)


def _digest(text: str | None) -> str | None:
    if text is None:
        return None
    match = _SHA256.fullmatch(text.strip())
    if match is None:
        raise InvalidRequest(f"--sha256: {text!r} is not 64 hexadecimal digits", field="sha256")
    return match[1].lower()


def _check_digest(fetched: Fetched, expected: str | None) -> None:
    """Check the sha256 of the one fetched file. Raises IntegrityError, and InvalidRequest for several files."""
    if expected is None:
        return
    actual = fetched.origin.get("sha256")
    if actual is None:
        raise InvalidRequest(
            "--sha256 needs a single file, but the source has several; name one of them", field="sha256"
        )
    if actual != expected:
        raise IntegrityError(
            f"{fetched.origin['url']} has sha256 {actual}, not {expected}; check the URL and the digest",
            digest=f"sha256:{expected}",
            actual=f"sha256:{actual}",
        )
