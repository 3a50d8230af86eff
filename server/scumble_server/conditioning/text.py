"""Texts of one request → states of the text encoders, each text once, kept by all that it was made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from scumble_build.graphs.text import EncodedText, Overrides, TextInputs
from scumble_server.factors.request import RequestFactors
from scumble_server.factors.rows import RowFactors
from scumble_server.methods import method_of
from scumble_server.methods.context import Context, Text
from scumble_server.prompts.compel import CompelPrompt, embed
from scumble_server.prompts.script import Script
from scumble_server.prompts.tokens import Tokens, tokenize
from scumble_server.request.adapter import ResolvedAdapter

_ROUNDING = 1e-5
"""A mean below this share of the mean absolute value is rounding error."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """The text encoders as one request sees them. `context` holds their weights; `factors` are the request's LoRAs;
    `words[i]` is the adapter that slots of embedding i stand for.
    """

    context: Context
    factors: RequestFactors
    words: tuple[ResolvedAdapter, ...]
    emphasis: str

    def encode_phases(self, scripts: Sequence[Script], rows: Sequence[tuple[int, ...]]) -> list[Text]:
        """Encode each script once. `rows[i]` has the index of the script that each model row reads in phase i."""
        texts = self.encode_all(scripts)
        return [together([texts[index] for index in of_phase]) for of_phase in rows]

    def encode_all(self, scripts: Sequence[Script]) -> list[Text]:
        """Encode to `(1, n·77, C)` each; shorter ones are padded with chunks of an empty text to the longest's n."""
        longest = max(script.chunks for script in scripts)
        texts = [self._encode(script, longest) if script.of_encoder is not None else None for script in scripts]
        like = next(text for text in texts if text is not None)
        zeros = Text(
            "zeros",
            torch.zeros_like(like.states),
            torch.zeros_like(like.pooled) if like.pooled is not None else None,
        )
        return [zeros if text is None else text for text in texts]

    def _encode(self, script: Script, chunks: int) -> Text:
        """Put what the encoders give side by side. Of a long text, what is pooled is its first chunk's."""
        assert script.of_encoder is not None
        parts = [self._padded(i, tokens, script.clip_skip, chunks) for i, tokens in enumerate(script.of_encoder)]
        pooled = next((part.pooled for part in parts if part.pooled is not None), None)
        return Text(tuple(part.key for part in parts), torch.cat([part.states for part in parts], dim=-1), pooled)

    def _padded(self, index: int, read: Tokens | CompelPrompt, clip_skip: int, chunks: int) -> Text:
        text, missing = self._part(index, read, clip_skip), chunks - read.chunks
        if not missing:
            return text
        empty = self._part(index, tokenize(self.context.weights.tokenizers[index], ""), clip_skip)
        states = torch.cat([text.states, *[empty.states] * missing], dim=1)
        return Text((text.key, empty.key, missing), states, text.pooled)

    def _part(self, index: int, read: Tokens | CompelPrompt, clip_skip: int) -> Text:
        """Encode with one encoder: `(1, n·77, C)` of n chunks, one behind the other."""
        context, tokenizer = self.context, self.context.weights.tokenizers[index]
        words = {i: self.words[i] for i in sorted(read.used)}
        factors = self.factors.of_text(index)
        key = (
            "text",
            context.weights.key,
            index,
            read if isinstance(read, CompelPrompt) else (self.emphasis, *read.key),
            tuple((i, adapter.version.digest, adapter.text_weight) for i, adapter in words.items()),
            factors.key if factors is not None else None,
            clip_skip,
        )
        nbytes = 4 * read.chunks * tokenizer.model_max_length * context.base.compatibility.text_widths[index]
        call = partial(self._call, index, words, factors, clip_skip)

        def encode() -> EncodedText:
            if isinstance(read, CompelPrompt):
                return _of_compel(read, tokenizer, call)
            return _of_chunks(read, call, self.emphasis)

        encoded = context.device.get(key, nbytes, encode)
        return Text(key, encoded.states, encoded.pooled)

    def _call(
        self,
        index: int,
        words: Mapping[int, ResolvedAdapter],
        factors: RowFactors | None,
        clip_skip: int,
        tokens: Tokens,
        mask: Tensor | None = None,
    ) -> EncodedText:
        """Run an encoder once; each chunk is a row."""
        context, executor = self.context, self.context.executor
        component = context.base.family.texts[index].encoder
        vectors = {i: method_of(adapter).vectors(context, adapter, component) for i, adapter in words.items()}
        own = factors.alone(tokens.chunks, executor.device) if factors is not None else None
        return executor.encode(index, TextInputs(tokens.ids, own, _overrides(tokens, vectors), clip_skip, mask))


def _overrides(tokens: Tokens, vectors: Mapping[int, Tensor]) -> Overrides | None:
    """Put vectors in place of the token embeddings of words; None if the prompt has no such word.

    `tokens` says where word i, of which `vectors[i]` `(n, C)` are the vectors, stands.
    """
    slots = [(slot.chunk, slot.position, vectors[slot.embedding]) for slot in tokens.slots]
    if not slots:
        return None
    return Overrides(
        torch.cat([values for _, _, values in slots]),
        torch.cat([torch.full((len(values),), row) for row, _, values in slots]),
        torch.cat([torch.arange(start, start + len(values)) for _, start, values in slots]),
    )


def _of_chunks(tokens: Tokens, call: Callable[[Tokens], EncodedText], emphasis: str) -> EncodedText:
    encoded = call(tokens)
    states = encoded.states
    if tokens.weights is not None:
        states = weighted(states, tokens.weights.to(states.device), restore_mean=emphasis == "original")
    return EncodedText(states.flatten(0, 1)[None], encoded.pooled[:1] if encoded.pooled is not None else None)


def _of_compel(
    prompt: CompelPrompt, tokenizer: CLIPTokenizer, call: Callable[[Tokens, Tensor | None], EncodedText]
) -> EncodedText:
    """Encode as compel does; like compel, pool the text as it is written, without its grammar."""
    like = call(tokenize(tokenizer, prompt.words, prompt.names), None)
    states = embed(prompt, tokenizer, lambda tokens, mask: call(tokens, mask).states)
    return EncodedText(states.to(like.states), like.pooled[:1] if like.pooled is not None else None)


@torch.inference_mode()
def weighted(states: Tensor, weights: Tensor, *, restore_mean: bool) -> Tensor:
    """Multiply states `(n, T, C)` by weights `(n, T)`; then, if asked, make each chunk's mean what it was before.

    A mean of nothing but rounding errors cannot be restored, and is left.
    """
    product = states.float() * weights[..., None]
    if restore_mean:
        before, after = states.float().mean((1, 2)), product.mean((1, 2))
        is_rounding = after.abs() <= _ROUNDING * product.abs().mean((1, 2))
        product = product * torch.where(is_rounding, 1.0, before / after)[:, None, None]
    return product.to(states.dtype)


def together(texts: Sequence[Text]) -> Text:
    """Join what the rows of one phase read."""
    pooled = [text.pooled for text in texts if text.pooled is not None]
    return Text(
        tuple(text.key for text in texts),
        torch.cat([text.states for text in texts]),
        torch.cat(pooled) if pooled else None,
    )
