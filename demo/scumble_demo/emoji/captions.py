"""Makes captions from a concept's names, its kind and the style, in several wordings."""

from __future__ import annotations

from scumble_demo.emoji.concepts import Concept, Style

# {a}: the concept with its article, {n}: without, {b}: its other name with article, {k}: kind, {s}: style.
_TEMPLATES = (
    "{a}, {s}",
    "{n}, {s}",
    "{b}, {s}",
    "a drawing of {a}, {s}",
    "a picture of {a} in {s}",
    "an emoji of {b}, {s}",
    "{a}, {k}, {s}",
    "{s} {n}",
)
# Held out of training, for the validation loss and the evaluation's prompts.
_VALIDATION_TEMPLATE = "a small picture of {a}, {s}"
_PLURAL_OR_MASS = ("french fries", "socks", "glasses", "scissors", "corn", "bread", "broccoli", "grapes")
_NO_ARTICLE = (*_PLURAL_OR_MASS, "ice", "wine", "coffee", "beer", "cheese", "candy", "fire", "lightning")


def with_article(noun: str) -> str:
    """Return "an apple" for "apple"; plural and uncountable nouns get no article."""
    if noun in _NO_ARTICLE or noun in ("cherries", "planet earth"):
        return noun
    if noun in ("sun", "moon"):
        return f"the {noun}"
    return f"{'an' if noun[0] in 'aeiou' and not noun.startswith(('uni', 'one')) else 'a'} {noun}"


def captions(concept: Concept, style: Style) -> tuple[str, ...]:
    """Return all captions of a picture; the first is the canonical one."""
    return tuple(dict.fromkeys(_fill(template, concept, style) for template in _TEMPLATES))


def canonical_caption(concept: Concept, style: Style) -> str:
    return captions(concept, style)[0]


def validation_caption(concept: Concept, style: Style) -> str:
    """Return a caption in a wording that is not used in training."""
    return _fill(_VALIDATION_TEMPLATE, concept, style)


def plain_caption(name: str, style: Style) -> str:
    """Return captions for an emoji of which only the name is known."""
    return f"{name.lower()}, {style.phrase}"


def _fill(template: str, concept: Concept, style: Style) -> str:
    return template.format(
        a=with_article(concept.name), n=concept.name, b=with_article(concept.also), k=concept.kind, s=style.phrase
    ).lower()
