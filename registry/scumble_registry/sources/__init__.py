"""Sources of files to import: the Hugging Face Hub (`hub.py`) and the web (`web.py`).

    hf:owner/repo[@revision][/file-or-folder]     a revision is a branch, tag or commit; `/` in it is written %2F
    https://…                                     one file, or a page of the Hub or Civitai for the files on it

Files are downloaded into the caller's folder, with a size limit before and during the download, and checked; then they
are published like files on disk. The origin in the manifest (`Fetched.origin`) has no secret and no time of import, so
the same files imported again are the same version.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from scumble.errors import InvalidRequest

LARGEST = 20 << 30
"""The default limit in bytes: that of the largest kind, a checkpoint."""

_HUB = re.compile(r"hf:(?P<repo>[^/@\s]+/[^/@\s]+)(?:@(?P<revision>[^/\s]+))?(?:/(?P<path>.*))?")
_HUB_HOSTS = frozenset({"huggingface.co", "www.huggingface.co", "hf.co"})
_HUB_PAGE = re.compile(
    r"/(?P<repo>[^/]+/[^/]+)(?:/(?:blob|resolve|tree|raw)/(?P<revision>[^/]+)(?:/(?P<path>.+?))?)?/?"
)
_CIVITAI_HOSTS = frozenset({"civitai.com", "www.civitai.com"})
_CIVITAI_PAGE = re.compile(r"/models/\d+(?:/[^/]*)?/?")
_NO_REPOSITORIES = frozenset({"api", "datasets", "spaces", "docs", "models", "settings"})


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository of the Hub, or a part of it."""

    repo: str
    revision: str | None = None
    """None: the repository's main branch."""
    path: str = ""
    """A file or folder in the repository; empty: all of it."""


@dataclass(frozen=True, slots=True)
class WebSource:
    """A file on the web."""

    url: str


@dataclass(frozen=True, slots=True)
class Fetched:
    """Downloaded files."""

    path: Path
    """The file or folder, ready to be published."""
    origin: dict[str, Any]
    """For the manifest's provenance."""
    license: str | None = None
    """The license that the source states."""


def parse_source(text: str) -> HubSource | WebSource:
    """Parse a source. Raises InvalidRequest for any other text."""
    if text.startswith("hf:"):
        return _hub(_HUB.fullmatch(text), text)
    if not text.lower().startswith("https://"):
        why = "files over plain http may be altered on the way" if text.lower().startswith("http:") else ""
        raise InvalidRequest(
            f"{_redacted(text)} is not a source: write hf:owner/repo[@revision][/file] or https://…; "
            + (why or "files on this disk are published with `scumble registry publish`"),
            field="source",
        )
    parts = urlsplit(text)
    if parts.hostname in _HUB_HOSTS and parts.path.split("/")[1] not in _NO_REPOSITORIES:
        return _hub(_HUB_PAGE.fullmatch(unquote(parts.path)), _redacted(text))
    if parts.hostname in _CIVITAI_HOSTS and _CIVITAI_PAGE.fullmatch(parts.path):
        return _civitai(parts.query)
    return WebSource(text)


def _hub(match: re.Match[str] | None, text: str) -> HubSource:
    if match is None:
        raise InvalidRequest(f"{text!r} is not a repository: write hf:owner/repo[@revision][/file]", field="source")
    revision, path = match["revision"], (match["path"] or "").strip("/")
    if {"", ".", ".."} & set(path.split("/")) and path:
        raise InvalidRequest(f"{path!r} is not a path inside a repository", field="source")
    return HubSource(match["repo"], unquote(revision) if revision else None, path)


def _civitai(query: str) -> WebSource:
    versions = parse_qs(query).get("modelVersionId", [])
    if len(versions) != 1 or not versions[0].isdigit():
        raise InvalidRequest(
            "this page of Civitai is a model's, which may have several versions: open one version, so that the address "
            "ends with modelVersionId=…, or copy its download link",
            field="source",
        )
    return WebSource(f"https://civitai.com/api/download/models/{versions[0]}")


def _redacted(url: str) -> str:
    """Return the URL for messages, without query and password."""
    return repr(url.partition("?")[0].rpartition("@")[2])


__all__ = ["LARGEST", "Fetched", "HubSource", "WebSource", "parse_source"]
