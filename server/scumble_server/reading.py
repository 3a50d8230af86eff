"""What the prompts of a request say: which texts there are, and which of them each model row reads at each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from transformers import CLIPTokenizer

from scumble.errors import InvalidRequest
from scumble.request import Adapter, Options, Request
from scumble_server.chunks import MAX_CHUNKS
from scumble_server.grammar.attention import parse_attention
from scumble_server.grammar.composition import Part, parse_composition
from scumble_server.grammar.schedule import texts_by_step
from scumble_server.grammar.tags import find_tag, parse_tags
from scumble_server.prompts import Name, Tokens, tokenize, tokenize_weighted

Field: TypeAlias = Literal["prompt", "negative_prompt"]
MAX_PARTS = 8
"""Prompts that AND joins."""
MAX_TEXTS = 64
"""Different texts that a request's prompts become from step to step."""


@dataclass(frozen=True, slots=True)
class Text:
    """Words as the encoder reads them, and how many of its last layers are left out. `field` is where they stand."""

    words: str
    field: Field
    clip_skip: int = 0


@dataclass(frozen=True, slots=True)
class Reading:
    """texts: each once; rows_of_step: for each step and model row the index of its text, the negative prompt's first if
    there are several rows; weights: how strongly each of the other rows acts.
    """

    options: Options
    texts: tuple[Text, ...]
    rows_of_step: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...]

    @property
    def rows(self) -> int:
        """Model rows of one image."""
        return len(self.rows_of_step[0])

    @property
    def fields(self) -> tuple[Field, ...]:
        """The fields that are read."""
        return ("prompt", "negative_prompt") if self.rows > 1 else ("prompt",)

    def tokens(self, text: Text, tokenizer: CLIPTokenizer, names: Sequence[Name]) -> Tokens:
        """Raises InvalidRequest if it is too long."""
        if self.options.grammar == "plain":
            tokens = tokenize(tokenizer, text.words, names)
        else:
            tokens = tokenize_weighted(tokenizer, parse_attention(text.words), names)
        if len(tokens.ids) > MAX_CHUNKS:
            room = tokenizer.model_max_length - 2
            raise InvalidRequest(
                f"{text.field} has {len(tokens.ids)} chunks of {room} tokens, {MAX_CHUNKS} are read; shorten it",
                field=text.field,
            )
        return tokens


def read(request: Request, steps: int, *, guided: bool) -> Reading:
    """Raises InvalidRequest for options that do not go together, and for prompts that say too much.

    Several parts, or one with a weight, stand against the negative prompt even where there is no guidance.
    """
    _check(request.options)
    options, negative = request.options, request.negative_prompt or ""
    parts = parse_composition(request.prompt) if options.grammar == "webui" else [Part(request.prompt, 1.0)]
    if len(parts) > MAX_PARTS:
        raise InvalidRequest(f"AND joins {len(parts)} prompts, {MAX_PARTS} at most are drawn", field="prompt")
    weights = tuple(part.weight for part in parts)
    skip = options.clip_skip or 0
    columns = [[Text(words, "prompt", skip) for words in _by_step(part.text, options, steps)] for part in parts]
    if guided or weights != (1.0,):
        # diffusers leaves the negative prompt's layers alone; the webui does not.
        of_negative = 0 if options.grammar == "plain" else skip
        words = _by_step(negative, options, steps)
        columns.insert(0, [Text(each, "negative_prompt", of_negative) for each in words])
    return _numbered(options, list(zip(*columns, strict=True)), weights)


def without_tags(request: Request) -> Request:
    """The request with its prompt's LoRAs among its adapters. Raises InvalidRequest."""
    options = request.options
    if options.grammar != "webui":
        return request
    for field, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt or "")):
        if (tag := find_tag(text)) is not None and (field == "negative_prompt" or not options.lora_tags):
            how = "set the option lora_tags, or" if field == "prompt" else "tags act in the prompt alone:"
            raise InvalidRequest(f"{field} has {tag}; {how} name it in adapters and leave it out here", field=field)
    text, tags = parse_tags(request.prompt)
    adapters = (
        *request.adapters,
        *(Adapter(ref=tag.ref, weight=tag.weight, text_weight=tag.text_weight) for tag in tags),
    )
    if not tags:
        return request
    return Request.parse(
        {
            **{name: getattr(request, name) for name in Request.model_fields},
            "prompt": text,
            "adapters": adapters,
            "options": options.model_copy(update={"lora_tags": False}),
        }
    )


def _check(options: Options) -> None:
    if options.grammar != "webui":
        for name in ("lora_tags", "emphasis"):
            if getattr(options, name) != Options.model_fields[name].default:
                raise InvalidRequest(
                    f"options.{name} means nothing in the grammar {options.grammar!r}; leave it out, "
                    "or set grammar to webui",
                    field=f"options.{name}",
                )


def _by_step(prompt: str, options: Options, steps: int) -> list[str]:
    return texts_by_step(prompt, steps) if options.grammar == "webui" else [prompt] * steps


def _numbered(options: Options, steps: Sequence[Sequence[Text]], weights: tuple[float, ...]) -> Reading:
    """Texts with the same words and the same layers are one."""
    numbers: dict[tuple[str, int], int] = {}
    texts: list[Text] = []
    for text in (text for step in steps for text in step):
        if (text.words, text.clip_skip) not in numbers:
            numbers[text.words, text.clip_skip] = len(texts)
            texts.append(text)
    if len(texts) > MAX_TEXTS:
        raise InvalidRequest(
            f"the prompts become {len(texts)} different texts over {len(steps)} steps, {MAX_TEXTS} at most are read; "
            "let fewer words alternate",
            field="prompt",
        )
    rows = tuple(tuple(numbers[text.words, text.clip_skip] for text in step) for step in steps)
    return Reading(options, tuple(texts), rows, weights)
