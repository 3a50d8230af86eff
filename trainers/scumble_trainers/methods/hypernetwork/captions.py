"""Captions that leave the concept to the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from scumble.errors import InvalidRequest
from scumble_trainers.dataset import Example
from scumble_trainers.methods.hypernetwork.settings import HypernetworkSettings

STYLE = "{style}"


def with_captions(settings: HypernetworkSettings, examples: Sequence[Example]) -> list[Example]:
    """The examples with `--caption` in place of the data's own, if that is given."""
    if not settings.captions:
        return list(examples)
    return [replace(example, texts=_captions(settings, example)) for example in examples]


def _captions(settings: HypernetworkSettings, example: Example) -> tuple[str, ...]:
    if example.style is None and any(STYLE in caption for caption in settings.captions):
        raise InvalidRequest(
            f'--caption has {STYLE}, but {example.name} has no "style": add it to its line, or caption without it',
            field="caption",
        )
    return tuple(dict.fromkeys(caption.replace(STYLE, example.style or "") for caption in settings.captions))
