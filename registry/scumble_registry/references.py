"""How a version is named: `ns/name` followed by at most one selector.

    ns/name             the highest approved version
    ns/name@7           version 7: never moves
    ns/name@prod        an alias: changes by `scumble registry alias`
    ns/name@sha256:…    by digest, all 64 digits: never moves

Law: `parse(str(reference)) == reference`, and every string has at most one reading, because an alias is never
digits only and holds no colon.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from scumble.errors import InvalidRequest

_PART = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?", re.ASCII)
_VERSION = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)
_DIGITS = re.compile(r"[0-9]+", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_RULE = "lower-case letters, digits, '.', '_' and '-', at most 64, beginning and ending with a letter or digit"


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed reference. At most one of `version`, `alias`, `digest` is set; none: the highest approved."""

    name: str
    version: int | None = None
    alias: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        for selector in (self.version, self.alias, self.digest):
            if selector is not None:
                return f"{self.name}@{selector}"
        return self.name


def parse(text: str) -> Reference:
    """Parse `text`. Raises InvalidRequest that names the wrong part and the right form."""
    name, at, selector = text.partition("@")
    parse_name(name)
    if not at:
        return Reference(name)
    if selector.startswith("sha256:"):
        return Reference(name, digest=parse_digest(selector))
    if _DIGITS.fullmatch(selector):
        return Reference(name, version=parse_version(selector))
    return Reference(name, alias=parse_alias(selector))


def parse_name(text: str) -> str:
    """Check `ns/name` and return it. Raises InvalidRequest."""
    parts = text.split("/")
    if len(parts) != 2:
        raise InvalidRequest(f"{text!r} is not a name: write ns/name, e.g. styles/ink", field="name")
    for part in parts:
        if not _PART.fullmatch(part):
            raise InvalidRequest(f"{part!r} in {text!r} may not be part of a name; allowed: {_RULE}", field="name")
    return text


def parse_version(text: str) -> int:
    if not _VERSION.fullmatch(text):
        raise InvalidRequest(f"{text!r} is not a version: versions are 1, 2, 3 …", field="version")
    return int(text)


def parse_alias(text: str) -> str:
    """Check an alias and return it: a name's characters, but not digits only, which would be a version."""
    if _DIGITS.fullmatch(text):
        raise InvalidRequest(f"alias {text!r} is digits only and would read as a version", field="alias")
    if not _PART.fullmatch(text):
        raise InvalidRequest(
            f"{text!r} is neither a version (7), an alias (prod) nor a digest (sha256:…); an alias is {_RULE}",
            field="alias",
        )
    return text


def parse_digest(text: str) -> str:
    if not _DIGEST.fullmatch(text):
        raise InvalidRequest(
            f"{text!r} is not a digest: write sha256: and all 64 hexadecimal digits in lower case",
            field="digest",
        )
    return text
