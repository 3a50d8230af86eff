"""Trigger words and family in a file's header.

A header is untrusted text: it is cut and reduced to printable characters, and nothing else depends on it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from scumble_registry.formats.training_metadata import frequent_tags

_MAX_WORD, _MAX_WORDS = 200, 100
_FEW = 3
_FAMILIES = {"sd_v1": "sd1", "sd_v2": "sd2", "sdxl": "sdxl"}
_ARCHITECTURES = {"stable-diffusion-v1": "sd1", "stable-diffusion-v2": "sd2", "stable-diffusion-xl": "sdxl"}


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return `trigger_words` (JSON list or comma-separated) or `modelspec.trigger_phrase` of the header.

    Without them, the most frequent tags of `ss_tag_frequency`, if at most three tags share the highest count.
    """
    text = metadata.get("trigger_words") or metadata.get("modelspec.trigger_phrase") or ""
    if not text:
        return _printable(_most_frequent(metadata.get("ss_tag_frequency", "")))
    words = _json(text)
    return _printable(words if isinstance(words, list) else text.split(","))


def stated_family(metadata: Mapping[str, str]) -> str | None:
    """Return the family that the header names: `sd1`, `sd2`, `sdxl`. Compatibility depends on the shapes alone."""
    base, architecture = metadata.get("ss_base_model_version", ""), metadata.get("modelspec.architecture", "")
    for text, table in ((base, _FAMILIES), (architecture, _ARCHITECTURES)):
        if named := [family for start, family in table.items() if text.startswith(start)]:
            return named[0]
    return "sd2" if metadata.get("ss_v2") == "True" else None


def _most_frequent(text: str) -> list[str]:
    tags = frequent_tags(text)
    most = [tag for tag, count in tags.items() if count == max(tags.values())]
    return most if len(most) <= _FEW else []


def _printable(words: Iterable[Any]) -> tuple[str, ...]:
    stripped = (word.strip() for word in words if isinstance(word, str))
    return tuple(word for word in stripped if 0 < len(word) <= _MAX_WORD and word.isprintable())[:_MAX_WORDS]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
