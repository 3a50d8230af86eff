"""Prompts → token ids, padded as diffusers pads them, with places kept free for embeddings.

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
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPTokenizer


@dataclass(frozen=True, slots=True)
class Name:
    """What stands for an embedding of `vectors` vectors in a prompt."""

    token: str
    vectors: int


@dataclass(frozen=True, slots=True)
class Slot:
    """The places from `position` on belong to the embedding with this index."""

    embedding: int
    position: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """ids `(1, 77)` int64; `cut` is the end of the prompt that did not fit, or None.

    `found` are the embeddings whose name is written in the prompt, be it in the part that was cut.
    """

    ids: Tensor
    slots: tuple[Slot, ...]
    cut: str | None
    found: frozenset[int]


@dataclass(frozen=True, slots=True)
class _Place:
    """An embedding in a sequence of pieces; the other pieces are plain token ids."""

    embedding: int


def tokenize(tokenizer: CLIPTokenizer, prompt: str, names: Sequence[Name] = ()) -> Tokens:
    """The first 75 places of `prompt` between BOS and EOS. What was cut is said, never lost in silence.

    An embedding is never split: one that does not fit is cut whole, with all that follows.
    """
    pieces = list(_pieces(tokenizer, prompt, names))
    room = tokenizer.model_max_length - 1
    # Not EOS, which the pooled output is taken at; whatever stands here, the embedding replaces it.
    filler = tokenizer.bos_token_id
    ids: list[int] = [tokenizer.bos_token_id]
    slots: list[Slot] = []
    kept = 0
    for piece in pieces:
        width = names[piece.embedding].vectors if isinstance(piece, _Place) else 1
        if len(ids) + width > room:
            break
        if isinstance(piece, _Place):
            slots.append(Slot(piece.embedding, len(ids)))
            ids += [filler] * width
        else:
            ids.append(piece)
        kept += 1
    ids.append(tokenizer.eos_token_id)
    ids += [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(ids))
    return Tokens(
        torch.tensor([ids], dtype=torch.int64),
        tuple(slots),
        _spell(tokenizer, pieces[kept:], names) if kept < len(pieces) else None,
        frozenset(piece.embedding for piece in pieces if isinstance(piece, _Place)),
    )


def _pieces(tokenizer: CLIPTokenizer, prompt: str, names: Sequence[Name]) -> Iterator[int | _Place]:
    sequences = {index: _ids(tokenizer, name.token) for index, name in enumerate(names)}
    by_length = sorted(sequences.items(), key=lambda item: -len(item[1]))
    for part in _split_at_signs(prompt, names):
        if isinstance(part, _Place):
            yield part
        else:
            ids = _ids(tokenizer, part)
            yield from _find_sequences(ids, _word_starts(tokenizer, ids), by_length) if names else ids


def _ids(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def _word_starts(tokenizer: CLIPTokenizer, ids: list[int]) -> set[int]:
    """Positions where a word begins: behind a token that ends one, or that is special."""
    special = set(tokenizer.all_special_ids)
    words = tokenizer.convert_ids_to_tokens(ids)
    ends = (id_ in special or word.endswith("</w>") for id_, word in zip(ids, words, strict=True))
    return {0, *(position + 1 for position, is_end in enumerate(ends) if is_end)}


def _find_sequences(
    ids: list[int], word_starts: Collection[int], by_length: Sequence[tuple[int, list[int]]]
) -> Iterator[int | _Place]:
    position = 0
    while position < len(ids):
        for index, sequence in by_length if position in word_starts else ():
            if sequence and ids[position : position + len(sequence)] == sequence:
                yield _Place(index)
                position += len(sequence)
                break
        else:
            yield ids[position]
            position += 1


def _split_at_signs(prompt: str, names: Sequence[Name]) -> Iterator[str | _Place]:
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
        yield _Place(int(match.lastgroup.removeprefix("e")))
        end = match.end()
    yield prompt[end:]


_ALNUM = r"[^\W_]"


def _pattern(token: str) -> str | None:
    """How a name with a sign at an end stands in a text; None for a name of whole words."""
    words = unicodedata.normalize("NFC", token).split()
    first, last = re.match(_ALNUM, words[0]), re.match(_ALNUM, words[-1][-1])
    if first and last:
        return None
    before, after = f"(?<!{_ALNUM})" if first else "", f"(?!{_ALNUM})" if last else ""
    return before + r"\s+".join(re.escape(word) for word in words) + after


def _spell(tokenizer: CLIPTokenizer, pieces: Sequence[int | _Place], names: Sequence[Name]) -> str:
    """Pieces as text again."""
    words: list[str] = []
    run: list[int] = []
    for piece in [*pieces, None]:
        if isinstance(piece, int):
            run.append(piece)
            continue
        if run:
            words.append(str(tokenizer.decode(run)))
            run = []
        if piece is not None:
            words.append(names[piece.embedding].token)
    return " ".join(words)
