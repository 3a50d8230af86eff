"""Prompts → token ids in chunks (`scumble_build.chunks`), padded as diffusers pads them.

Places are kept free for embeddings.

An embedding's name is found in two ways:

* as the webui does, by its sequence of token ids; so CLIP's lower case makes names case-insensitive. Unlike there,
  a sequence begins with a word: `cat` is found neither in `category` nor in `bobcat`, however that is split;
* as diffusers does, in the text itself, if the name begins or ends with a sign: CLIP joins neighbouring signs into
  one word, so that in `<cat>, asleep` the ids of `<cat>` never occur.

Longer names go first. A name becomes as many places as its embedding has vectors.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from scumble_build.chunks import BACKTRACK, Break, Unit, chunked
from scumble_server.prompts.grammar.attention import Piece, Span


@dataclass(frozen=True, slots=True)
class PromptWord:
    """A word that stands for an embedding of `vectors` vectors in a prompt."""

    token: str
    vectors: int


@dataclass(frozen=True, slots=True)
class Slot:
    """The places of a chunk from `position` on belong to the embedding with this index."""

    embedding: int
    chunk: int
    position: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """ids `(n, 77)` int64 of n chunks; weights `(n, 77)` float32, or None where all are 1."""

    ids: Tensor
    slots: tuple[Slot, ...] = ()
    weights: Tensor | None = None

    @property
    def key(self) -> tuple[Hashable, ...]:
        """Equal for equal tokens."""
        weights = tuple(self.weights.flatten().tolist()) if self.weights is not None else None
        return tuple(self.ids.flatten().tolist()), self.slots, weights

    @property
    def chunks(self) -> int:
        return len(self.ids)

    @property
    def used(self) -> frozenset[int]:
        """The embeddings whose name is written in the prompt."""
        return frozenset(slot.embedding for slot in self.slots)


@dataclass(frozen=True, slots=True)
class WordPlace:
    """Where a word stands in a sequence of pieces; the other pieces are plain token ids."""

    embedding: int


def tokenize(tokenizer: CLIPTokenizer, prompt: str, names: Sequence[PromptWord] = ()) -> Tokens:
    """A prompt without a grammar: chunks are as full as they can be."""
    size = tokenizer.model_max_length - 2
    return _lay_out(tokenizer, chunked(_units(tokenizer, Span(prompt, 1.0), names), size))


def tokenize_weighted(tokenizer: CLIPTokenizer, pieces: Sequence[Piece], names: Sequence[PromptWord] = ()) -> Tokens:
    """Tokenize pieces of the webui's grammar. All vectors of an embedding get the weight of its name."""
    units: list[Unit | Break] = []
    for piece in pieces:
        units += [piece] if isinstance(piece, Break) else _units(tokenizer, piece, names)
    return _lay_out(tokenizer, chunked(units, tokenizer.model_max_length - 2, BACKTRACK))


def _units(tokenizer: CLIPTokenizer, span: Span, names: Sequence[PromptWord]) -> Iterator[Unit]:
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    # Not EOS, which the pooled output is taken at; whatever stands here, the embedding replaces it.
    filler = tokenizer.bos_token_id
    for piece in ids_and_words(tokenizer, span.text, names):
        if isinstance(piece, WordPlace):
            yield Unit(filler, span.weight, names[piece.embedding].vectors, piece.embedding)
        else:
            yield Unit(piece, span.weight, is_comma=piece == comma)


def _lay_out(tokenizer: CLIPTokenizer, chunks: Sequence[Sequence[Unit]]) -> Tokens:
    slots: list[Slot] = []
    ids = torch.full((len(chunks), tokenizer.model_max_length), tokenizer.pad_token_id)
    weights = torch.ones(ids.shape)
    for row, chunk in enumerate(chunks):
        ids[row, 0] = tokenizer.bos_token_id
        position = 1
        for unit in chunk:
            places = slice(position, position + unit.width)
            ids[row, places], weights[row, places] = unit.id, unit.weight
            if unit.embedding is not None:
                slots.append(Slot(unit.embedding, row, position))
            position += unit.width
        ids[row, position] = tokenizer.eos_token_id
    return Tokens(ids, tuple(slots), None if (weights == 1).all() else weights)


def ids_and_words(tokenizer: CLIPTokenizer, prompt: str, names: Sequence[PromptWord]) -> Iterator[int | WordPlace]:
    """The text's token ids, and embeddings where their names stand."""
    sequences = {index: _ids(tokenizer, name.token) for index, name in enumerate(names)}
    by_length = sorted(sequences.items(), key=lambda item: -len(item[1]))
    for part in _split_at_signs(prompt, names):
        if isinstance(part, WordPlace):
            yield part
        else:
            ids = _ids(tokenizer, part)
            yield from _find_sequences(ids, _word_starts(tokenizer, ids), by_length) if names else ids


def _ids(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    # Quietly: a long text is no mistake, it becomes several chunks.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def _word_starts(tokenizer: CLIPTokenizer, ids: list[int]) -> set[int]:
    """Positions where a word begins: behind a token that ends one, or that is special."""
    special = set(tokenizer.all_special_ids)
    words = tokenizer.convert_ids_to_tokens(ids)
    ends = (id_ in special or word.endswith("</w>") for id_, word in zip(ids, words, strict=True))
    return {0, *(position + 1 for position, is_end in enumerate(ends) if is_end)}


def _find_sequences(
    ids: list[int], word_starts: Collection[int], by_length: Sequence[tuple[int, list[int]]]
) -> Iterator[int | WordPlace]:
    position = 0
    while position < len(ids):
        for index, sequence in by_length if position in word_starts else ():
            if sequence and ids[position : position + len(sequence)] == sequence:
                yield WordPlace(index)
                position += len(sequence)
                break
        else:
            yield ids[position]
            position += 1


def _split_at_signs(prompt: str, names: Sequence[PromptWord]) -> Iterator[str | WordPlace]:
    """The prompt's text, parted at the names that begin or end with a sign."""
    patterns = {index: pattern for index, name in enumerate(names) if (pattern := _pattern(name.token))}
    if not patterns:
        yield prompt
        return
    longest_first = sorted(patterns, key=lambda index: -len(names[index].token))
    groups = "|".join(f"(?P<e{index}>{patterns[index]})" for index in longest_first)
    prompt = unicodedata.normalize("NFC", prompt)  # as CLIP's tokenizer does first
    end = 0
    for match in re.finditer(groups, prompt, re.IGNORECASE):
        assert match.lastgroup is not None
        yield prompt[end : match.start()]
        yield WordPlace(int(match.lastgroup.removeprefix("e")))
        end = match.end()
    yield prompt[end:]


_ALNUM = r"[^\W_]"


def _pattern(token: str) -> str | None:
    """Return the pattern of a name that begins or ends with a sign; None for a name of whole words."""
    words = unicodedata.normalize("NFC", token).split()
    first, last = re.match(_ALNUM, words[0]), re.match(_ALNUM, words[-1][-1])
    if first and last:
        return None
    before, after = f"(?<!{_ALNUM})" if first else "", f"(?!{_ALNUM})" if last else ""
    return before + r"\s+".join(re.escape(word) for word in words) + after
