"""Prompts in the language of compel (https://github.com/damian0815/compel), which compel itself reads and embeds.

It asks for a tokenizer and a text encoder. Ours are stand-ins: an embedding's vectors are token ids of their own behind
the tokenizer's, and the encoder is a function, so that a request's LoRAs and embeddings stay inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from math import inf
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from scumble.errors import InvalidRequest
from scumble_server.prompts.compel_parsing import parse
from scumble_server.prompts.tokens import PromptWord, Slot, Tokens, ids_and_words
from scumble_server.prompts.weights import check_weight

Run = Callable[[Tokens, Tensor | None], Tensor]
"""One chunk and its attention mask `(1, 77)`, or None → states `(1, 77, C)`."""


@dataclass(frozen=True, slots=True)
class CompelPrompt:
    """A prompt that compel has read once; `names` are those that it was looked through for."""

    words: str
    parsed: Any = field(compare=False, repr=False)
    """compel's `Conjunction`."""
    names: tuple[PromptWord, ...]
    chunks: int
    used: frozenset[int]


def read_compel(tokenizer: CLIPTokenizer, words: str, names: Sequence[PromptWord], field: str) -> CompelPrompt:
    """Everything but encoding. Raises InvalidRequest for what compel cannot read, and for what is not drawn here."""
    compel = _compel()
    vocabulary = _Tokenizer(tokenizer, names)
    try:
        parsed = parse(words, field)
        _check(parsed, field)
        states = _embed(vocabulary, parsed, lambda tokens, _: torch.zeros(*tokens.ids.shape, 1))
    except RecursionError as error:
        raise InvalidRequest(f"{field}: brackets are nested too deep for compel; use fewer", field=field) from error
    except (compel.PromptParser.ParsingException, RuntimeError, ValueError, IndexError, AssertionError) as error:
        raise InvalidRequest(f"{field}: compel cannot read it: {error}", field=field) from error
    chunks = states.shape[1] // tokenizer.model_max_length
    return CompelPrompt(words, parsed, tuple(names), chunks, frozenset(vocabulary.used))


def embed(prompt: CompelPrompt, tokenizer: CLIPTokenizer, run: Run) -> Tensor:
    """States `(1, n·77, C)`."""
    return _embed(_Tokenizer(tokenizer, prompt.names), prompt.parsed, run)


def _embed(vocabulary: _Tokenizer, parsed: Any, run: Run) -> Tensor:
    encoder = _TextEncoder(vocabulary, run)
    with torch.inference_mode():
        made = _compel().Compel(vocabulary, encoder, truncate_long_prompts=False)
        states: Tensor = made.build_conditioning_tensor_for_conjunction(parsed)[0]
    return states


def _check(conjunction: Any, field: str) -> None:
    """compel would leave this to its caller, in silence, or divide by it."""
    for part, weight in zip(conjunction.prompts, conjunction.weights, strict=True):
        check_weight(weight, _words_of(part), field)
        blended = zip(part.prompts, _blend_weights(part), strict=True) if hasattr(part, "weights") else [(part, 1.0)]
        for prompt, share in blended:
            check_weight(share, _words_of(prompt), field)
            for fragment in prompt.children:
                check_weight(getattr(fragment, "weight", 1.0), getattr(fragment, "text", ""), field)
    if any(getattr(part, "wants_cross_attention_control", False) for part in conjunction.prompts):
        raise InvalidRequest(f"{field}: swap changes attention, which is not drawn here; leave it out", field=field)


def _blend_weights(blend: Any) -> list[float]:
    """As compel uses them."""
    total = sum(blend.weights) if blend.normalize_weights else 1.0
    return [weight / total if total else inf for weight in blend.weights]


def _words_of(prompt: Any) -> str:
    """The words of a prompt or a blend, for a message."""
    parts = getattr(prompt, "prompts", None) or prompt.children
    return " ".join(_words_of(part) if hasattr(part, "children") else getattr(part, "text", "") for part in parts)


@cache
def _compel() -> ModuleType:
    """Imported when a prompt first asks for it."""
    import compel

    module: ModuleType = compel
    return module


class _Tokenizer:
    """As compel asks one. `used` are the embeddings whose word was met so far."""

    def __init__(self, tokenizer: CLIPTokenizer, names: Sequence[PromptWord]) -> None:
        self._tokenizer, self._names = tokenizer, names
        self.model_max_length = tokenizer.model_max_length
        self.bos_token_id = tokenizer.bos_token_id
        self.eos_token_id = tokenizer.eos_token_id
        self.pad_token_id = tokenizer.pad_token_id
        self._starts = list(accumulate((name.vectors for name in names), initial=len(tokenizer)))
        self.used: set[int] = set()

    def __call__(self, texts: Sequence[str], **_options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[self.bos_token_id, *self._ids(text), self.eos_token_id] for text in texts]}

    def _ids(self, text: str) -> Iterator[int]:
        for piece in ids_and_words(self._tokenizer, text, self._names):
            if isinstance(piece, int):
                yield piece
            else:
                self.used.add(piece.embedding)
                yield from range(self._starts[piece.embedding], self._starts[piece.embedding + 1])

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """compel parts long texts where a word ends: of an embedding, behind its last vector."""
        ends = {start - 1 for start in self._starts[1:]}
        return [
            str(self._tokenizer.convert_ids_to_tokens(each)) if each < self._starts[0] else "</w>" * (each in ends)
            for each in ids
        ]

    def tokens(self, ids: Tensor) -> Tokens:
        """ids `(1, 77)` as compel has them → as our encoder takes them."""
        places = enumerate(ids[0].tolist())
        slots = tuple(Slot(self._starts.index(each), 0, place) for place, each in places if each in self._starts[:-1])
        return Tokens(torch.where(ids < self._starts[0], ids, self.bos_token_id).long(), slots)


class _TextEncoder:
    """As compel asks one."""

    device = "cpu"
    dtype = torch.float32

    def __init__(self, vocabulary: _Tokenizer, run: Run) -> None:
        self._vocabulary, self._run = vocabulary, run

    def __call__(self, ids: Tensor, attention_mask: Tensor | None = None, **_options: Any) -> SimpleNamespace:
        mask = None if attention_mask is None or attention_mask.all() else attention_mask
        return SimpleNamespace(last_hidden_state=self._run(self._vocabulary.tokens(ids), mask).float().cpu())
