"""The concepts and styles that base, scorer and adapters are trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from scumble.errors import NotFound


@dataclass(frozen=True, slots=True)
class Concept:
    """One thing to draw. `code` is its Unicode code point in hex, which names its icon in every set."""

    code: str
    name: str
    also: str
    kind: str
    held_out: bool  # held out of the base's VAE and UNet, for adapters


@dataclass(frozen=True, slots=True)
class Style:
    """A drawing style in which all concepts exist; `phrase` names it in a caption."""

    name: str
    package: str
    version: str
    license: str
    held_out: bool

    @property
    def phrase(self) -> str:
        return f"{self.name} style"


STYLES = (
    Style("noto", "@iconify-json/noto", "1.2.9", "Apache-2.0", held_out=False),
    Style("twemoji", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", held_out=False),
    Style("fluent", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", held_out=False),
    Style("openmoji", "@iconify-json/openmoji", "1.2.29", "CC-BY-SA-4.0", held_out=True),
    Style("ink", "@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT", held_out=True),
)
# More styles, for the scorer only, so that it learns to recognise concepts in any style.
EXTRA_STYLES = (
    Style("emojione", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0", held_out=True),
    Style("monotone", "@iconify-json/emojione-monotone", "1.2.1", "CC-BY-4.0", held_out=True),
    Style("blob", "@iconify-json/noto-v1", "1.2.5", "Apache-2.0", held_out=True),
)
BASE_STYLES = tuple(style for style in STYLES if not style.held_out)
HELD_OUT_STYLES = tuple(style for style in STYLES if style.held_out)


def style(name: str) -> Style:
    """Return the style of this name. Raises NotFound, listing all styles."""
    for candidate in STYLES:
        if candidate.name == name:
            return candidate
    raise NotFound(f"no style {name!r}; there are {', '.join(s.name for s in STYLES)}", name=name)


@cache
def concepts() -> tuple[Concept, ...]:
    """Return all concepts in fixed order; the index is the class number in the scorer."""
    text = files(__package__).joinpath("concepts.json").read_text(encoding="utf-8")
    return tuple(Concept(**row) for row in json.loads(text))


def base_concepts() -> tuple[Concept, ...]:
    """Return the concepts that the base is trained on."""
    return tuple(concept for concept in concepts() if not concept.held_out)
