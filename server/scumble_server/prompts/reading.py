"""Reads the prompts of a request: which texts there are, and which of them each model row reads at each step."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from transformers import CLIPTokenizer

from scumble.errors import InvalidRequest
from scumble.request import Options
from scumble_build.chunks import MAX_CHUNKS
from scumble_server.prompts.compel import CompelPrompt, read_compel
from scumble_server.prompts.grammar.attention import Span, parse_attention
from scumble_server.prompts.grammar.composition import PromptPart, parse_composition
from scumble_server.prompts.grammar.schedule import texts_by_step
from scumble_server.prompts.script import Script
from scumble_server.prompts.tokens import PromptWord, Tokens, tokenize, tokenize_weighted
from scumble_server.prompts.weights import check_weight
from scumble_server.request.settings import Settings

Field: TypeAlias = Literal["prompt", "negative_prompt"]
MAX_PARTS = 8
"""Prompts that AND joins."""
MAX_TEXTS = 64
"""Different texts that a request's prompts become from step to step."""


@dataclass(frozen=True, slots=True)
class PromptText:
    """The text for each of the base's text encoders, or None for zeros; how many of their last layers are
    left out; and the field where it is written.
    """

    of_encoder: tuple[str, ...] | None
    field: Field
    clip_skip: int = 0

    @property
    def key(self) -> Hashable:
        """Texts with the same key are read alike."""
        return self.of_encoder, self.clip_skip


@dataclass(frozen=True, slots=True)
class Reading:
    """texts: each once; rows_of_step: for each step and model row the index of its text, the negative prompt's first if
    there are several rows; weights: how strongly each of the other rows acts.
    """

    options: Options
    texts: tuple[PromptText, ...]
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

    def scripts(self, tokenizers: Sequence[CLIPTokenizer], names: Sequence[PromptWord]) -> list[Script]:
        """Tokenize each text. Raises InvalidRequest for one that is too long."""
        return [self._script(text, tokenizers, names) for text in self.texts]

    def _script(self, text: PromptText, tokenizers: Sequence[CLIPTokenizer], names: Sequence[PromptWord]) -> Script:
        if text.of_encoder is None:
            return Script(None, text.clip_skip)
        read = zip(tokenizers, text.of_encoder, strict=True)
        script = Script(tuple(self._read(*each, names, text.field) for each in read), text.clip_skip)
        if script.chunks > MAX_CHUNKS:
            size = tokenizers[0].model_max_length - 2
            raise InvalidRequest(
                f"{text.field} has {script.chunks} chunks of {size} tokens, {MAX_CHUNKS} are read; shorten it",
                field=text.field,
            )
        return script

    def _read(
        self, tokenizer: CLIPTokenizer, words: str, names: Sequence[PromptWord], field: Field
    ) -> Tokens | CompelPrompt:
        if self.options.grammar == "plain":
            return tokenize(tokenizer, words, names)
        if self.options.grammar == "compel":
            return read_compel(tokenizer, words, names, field)
        pieces = parse_attention(words)
        for piece in pieces:
            if isinstance(piece, Span):
                check_weight(piece.weight, piece.text, field)
        return tokenize_weighted(tokenizer, pieces, names)


def read(settings: Settings, options: Options, encoders: int) -> Reading:
    """For a base with so many text encoders. Raises InvalidRequest for options that do not go together, and for prompts
    that say too much.

    Several parts, or one with a weight, stand against the negative prompt even where there is no guidance.
    """
    _check(options)
    parts = parse_composition(settings.prompt) if options.grammar == "webui" else [PromptPart(settings.prompt, 1.0)]
    if len(parts) > MAX_PARTS:
        raise InvalidRequest(f"AND joins {len(parts)} prompts, {MAX_PARTS} at most are drawn", field="prompt")
    for part in parts:
        check_weight(part.weight, part.text, "prompt")
    weights = tuple(part.weight for part in parts)
    skip = options.clip_skip or 0

    def column(text: str | None, second: str | None, field: Field, clip_skip: int) -> list[PromptText]:
        if text is None:
            return [PromptText(None, field)] * settings.run_steps
        of_first = (
            texts_by_step(text, settings.run_steps) if options.grammar == "webui" else [text] * settings.run_steps
        )
        return [PromptText((words, *[second or words] * (encoders - 1)), field, clip_skip) for words in of_first]

    columns = [column(part.text, settings.prompt_2, "prompt", skip) for part in parts]
    if settings.guided or weights != (1.0,):
        # diffusers leaves the negative prompt's layers alone; the webui does not.
        of_negative = 0 if options.grammar == "plain" else skip
        negative = column(settings.negative_prompt, settings.negative_prompt_2, "negative_prompt", of_negative)
        columns.insert(0, negative)
    return _numbered(options, list(zip(*columns, strict=True)), weights)


def _check(options: Options) -> None:
    """Raises InvalidRequest for an option that the grammar has no use for."""
    of_webui, of_plain = ("lora_tags", "emphasis"), ("prompt_2", "negative_prompt_2")
    useless = (*(of_webui if options.grammar != "webui" else ()), *(of_plain if options.grammar != "plain" else ()))
    for name in useless:
        if getattr(options, name) != Options.model_fields[name].default:
            other = "webui" if name in of_webui else "plain"
            raise InvalidRequest(
                f"options.{name} means nothing in the grammar {options.grammar!r}; leave it out, "
                f"or set grammar to {other}",
                field=f"options.{name}",
            )


def _numbered(options: Options, steps: Sequence[Sequence[PromptText]], weights: tuple[float, ...]) -> Reading:
    """Give each text a number; texts that are read alike are one."""
    numbers: dict[Hashable, int] = {}
    texts: list[PromptText] = []
    for text in (text for step in steps for text in step):
        if text.key not in numbers:
            numbers[text.key] = len(texts)
            texts.append(text)
    if len(texts) > MAX_TEXTS:
        raise InvalidRequest(
            f"the prompts become {len(texts)} different texts over {len(steps)} steps, {MAX_TEXTS} at most are read; "
            "let fewer words alternate",
            field="prompt",
        )
    rows = tuple(tuple(numbers[text.key] for text in step) for step in steps)
    return Reading(options, tuple(texts), rows, weights)
