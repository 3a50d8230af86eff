"""How long prompts may be: checked before any grammar reads one."""

from __future__ import annotations

from scumble.errors import InvalidRequest
from scumble.request import Request

MAX_CHARACTERS = 10_000
"""The most characters of a prompt, in any grammar."""


def check_lengths(request: Request) -> None:
    """Raise InvalidRequest naming the first prompt that is too long."""
    options = request.options
    prompts = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "options.prompt_2": options.prompt_2,
        "options.negative_prompt_2": options.negative_prompt_2,
    }
    for field, text in prompts.items():
        if text is not None and len(text) > MAX_CHARACTERS:
            raise InvalidRequest(
                f"{field} has {len(text)} characters, at most {MAX_CHARACTERS} are read; shorten it", field=field
            )
