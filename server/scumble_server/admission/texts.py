"""Reads the prompts of a request, and checks that the base can follow them."""

from __future__ import annotations

from collections.abc import Sequence

from scumble.errors import InvalidRequest, Refused
from scumble.request import Options
from scumble_server.base import Base
from scumble_server.methods import words_of
from scumble_server.prompts.reading import Reading, read
from scumble_server.prompts.script import Script
from scumble_server.request.adapter import ResolvedAdapter
from scumble_server.request.settings import Settings


def read_texts(
    options: Options, settings: Settings, base: Base, adapters: Sequence[ResolvedAdapter]
) -> tuple[Reading, tuple[Script, ...]]:
    """Read what the prompts say, and what the base's tokenizers make of it.

    Raises InvalidRequest, or Refused for what this server cannot do.
    """
    words = words_of(adapters)
    if (options.clip_skip or 0) > base.text_layers:
        raise InvalidRequest(
            f"clip_skip leaves {options.clip_skip} layers out, the text encoder has {base.text_layers}",
            field="options.clip_skip",
        )
    reading = read(settings, options, len(base.tokenizers))
    if reading.rows > base.max_rows:
        raise Refused(
            f"AND makes {reading.rows} rows of one image, this server computes {base.max_rows} at once; "
            "join fewer prompts"
        )
    return reading, tuple(reading.scripts(base.tokenizers, list(words.values())))
