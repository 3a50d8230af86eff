"""Where files come from that are not on this disk: the Hugging Face Hub (`hub.py`) and the web (`web.py`).

    hf:owner/repo[@revision][/file-or-folder]     a revision is a branch, tag or commit; `/` in it is written %2F
    https://…                                     one file; pages of the Hub and of Civitai stand for what they show

Everything is fetched into a folder of the caller's, bounded before and while it comes, and checked; then it is
published as a file from disk is. What is kept of where it was (`Fetched.origin`) holds no secret and no time of ours:
the same thing imported again is the same version.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from scumble.errors import InvalidRequest

LARGEST = 20 << 30
"""Bytes that are fetched where nobody says how many: the largest kind's, a checkpoint's."""

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
    repo: str
    revision: str | None = None
    """None: the repository's main branch."""
    path: str = ""
    """A file or folder in it; empty: all of it."""


@dataclass(frozen=True, slots=True)
class WebSource:
    url: str


@dataclass(frozen=True, slots=True)
class Fetched:
    path: Path
    """The file or folder, ready to be published."""
    origin: dict[str, Any]
    """For the manifest's provenance."""
    license: str | None = None
    """As its source states it."""


def parse_source(text: str) -> HubSource | WebSource:
    """Raises InvalidRequest for what is neither."""
    if text.startswith("hf:"):
        return _hub(_HUB.fullmatch(text), text)
    if not text.lower().startswith("https://"):
        why = "plain http is not safe from being changed on its way" if text.lower().startswith("http:") else ""
        raise InvalidRequest(
            f"{_shown(text)} is no source: write hf:owner/repo[@revision][/file] or https://…; "
            + (why or "files on this disk are published with `scumble registry publish`"),
            field="source",
        )
    parts = urlsplit(text)
    if parts.hostname in _HUB_HOSTS and parts.path.split("/")[1] not in _NO_REPOSITORIES:
        return _hub(_HUB_PAGE.fullmatch(unquote(parts.path)), _shown(text))
    if parts.hostname in _CIVITAI_HOSTS and _CIVITAI_PAGE.fullmatch(parts.path):
        return _civitai(parts.query)
    return WebSource(text)


def _hub(match: re.Match[str] | None, text: str) -> HubSource:
    if match is None:
        raise InvalidRequest(f"{text!r} is no repository: write hf:owner/repo[@revision][/file]", field="source")
    revision, path = match["revision"], (match["path"] or "").strip("/")
    if {"", ".", ".."} & set(path.split("/")) and path:
        raise InvalidRequest(f"{path!r} is no path inside a repository", field="source")
    return HubSource(match["repo"], unquote(revision) if revision else None, path)


def _civitai(query: str) -> WebSource:
    versions = parse_qs(query).get("modelVersionId", [])
    if len(versions) != 1 or not versions[0].isdigit():
        raise InvalidRequest(
            "this page of Civitai shows a model, of which there may be several versions: open the version that you "
            "mean, so that the address ends with modelVersionId=…, or copy its download link",
            field="source",
        )
    return WebSource(f"https://civitai.com/api/download/models/{versions[0]}")


def _shown(url: str) -> str:
    return repr(url.partition("?")[0].rpartition("@")[2])


__all__ = ["LARGEST", "Fetched", "HubSource", "WebSource", "parse_source"]
