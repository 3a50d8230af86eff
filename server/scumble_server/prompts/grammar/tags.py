"""`<lora:ns/name:0.8>` in a prompt: an adapter that the prompt brings along. It is taken out of the text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from scumble.errors import InvalidRequest
from scumble.request import MAX_WEIGHT

_OPENING = re.compile(r"<(lora|lyco|hypernet):")
EXAMPLE = "<lora:ns/name:0.8>"


class Tag(NamedTuple):
    """`text` is what was written, `weight` acts on the UNet, `text_weight` on the text encoder."""

    text: str
    ref: str
    weight: float
    text_weight: float


def find_tag(prompt: str) -> str | None:
    """Return the first tag of the prompt, as it is written."""
    return next((prompt[start:end] for start, _, end in _places(prompt)), None)


def parse_tags(prompt: str) -> tuple[str, list[Tag]]:
    """Return the prompt without its tags, and these in their order. Raises InvalidRequest for one that cannot be read.

    >>> parse_tags("a cat <lora:styles/ink@2:0.8:0.5>")[1][0][1:]
    ('styles/ink@2', 0.5, 0.8)
    """
    text, tags, behind = [], [], 0
    for start, opening, end in _places(prompt):
        text.append(prompt[behind:start])
        tags.append(_tag(prompt[start:end], opening[1], prompt[opening.end() : end - 1]))
        behind = end
    return "".join([*text, prompt[behind:]]), tags


def _places(prompt: str) -> Iterator[tuple[int, re.Match[str], int]]:
    """Where each tag begins, its opening, and where it ends: behind the next `>`."""
    end = 0
    while (opening := _OPENING.search(prompt, end)) and (closing := prompt.find(">", opening.end())) >= 0:
        end = closing + 1
        yield opening.start(), opening, end


def _tag(text: str, kind: str, body: str) -> Tag:
    if kind == "hypernet":
        raise _invalid(text, "only LoRAs are named in a prompt; name a hypernetwork in adapters")
    ref, weights = _split(body)
    if "/" not in ref:
        raise _invalid(text, f"{ref!r} is no reference; write namespace and name, like {EXAMPLE}")
    named = {name: value for name, sign, value in (part.partition("=") for part in weights) if sign}
    placed = [part for part in weights if "=" not in part]
    if unknown := sorted(named.keys() - {"te", "unet"}):
        raise _invalid(text, f"{unknown[0]!r} is unknown; te and unet can be named")
    if len(placed) > 2:
        raise _invalid(text, "two weights at most: for the text encoder, then for the UNet")
    te = _number(text, named.get("te", placed[0] if placed else "1"))
    unet = _number(text, named["unet"]) if "unet" in named else _number(text, placed[1]) if len(placed) > 1 else te
    return Tag(text, ref, unet, te)


def _split(body: str) -> tuple[str, list[str]]:
    """A digest's own colon belongs to the reference."""
    ref, *weights = [part.strip() for part in body.split(":")]
    if ref.endswith("@sha256") and weights:
        ref = f"{ref}:{weights.pop(0)}"
    return ref, weights


def _number(text: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not abs(number) <= MAX_WEIGHT:
        raise _invalid(text, f"{value!r} is not a finite number up to {MAX_WEIGHT:g}; write {EXAMPLE}")
    return number


def _invalid(text: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{text}: {what}", field="prompt")
