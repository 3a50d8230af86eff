"""Texts of one request → states of the text encoders, each text once, kept by all that it was made of."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from scumble_build.graphs.text import EncodedText, TextInputs
from scumble_server.denoise.phase import RowFactors
from scumble_server.denoise.stacking import factors_of
from scumble_server.methods import textual_inversion
from scumble_server.methods.context import Context, Text
from scumble_server.prompts.compel import CompelPrompt, embed
from scumble_server.prompts.script import Script
from scumble_server.prompts.tokens import Tokens, tokenize
from scumble_server.request.adapter import Bound

_ROUNDING = 1e-5
"""Of the mean size of numbers: a mean below is none."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """The text encoders as one request sees them. `context` holds their weights; `factors[i]` are the request's LoRAs
    on encoder i, and `factors_key` says what they are; `embeddings[i]` is what slots of embedding i stand for.
    """

    context: Context
    factors: tuple[RowFactors | None, ...]
    factors_key: Hashable
    embeddings: Mapping[int, Bound]
    emphasis: str

    def encode_all(self, scripts: Sequence[Script]) -> list[Text]:
        """`(1, n·77, C)` each; shorter ones are padded with chunks of an empty text to the n of the longest."""
        longest = max(script.chunks for script in scripts)
        found = [self._encode(script, longest) if script.of_encoder is not None else None for script in scripts]
        like = next(text for text in found if text is not None)
        zeros = Text(
            "zeros",
            torch.zeros_like(like.states),
            torch.zeros_like(like.pooled) if like.pooled is not None else None,
        )
        return [zeros if text is None else text for text in found]

    def _encode(self, script: Script, chunks: int) -> Text:
        """What the encoders say side by side. Of a long text, what is pooled is its first chunk's."""
        assert script.of_encoder is not None
        parts = [self._padded(i, tokens, script.clip_skip, chunks) for i, tokens in enumerate(script.of_encoder)]
        pooled = next((part.pooled for part in parts if part.pooled is not None), None)
        return Text(tuple(part.key for part in parts), torch.cat([part.states for part in parts], dim=-1), pooled)

    def _padded(self, index: int, read: Tokens | CompelPrompt, clip_skip: int, chunks: int) -> Text:
        text, missing = self._part(index, read, clip_skip), chunks - read.chunks
        if not missing:
            return text
        empty = self._part(index, tokenize(self.context.tokenizers[index], ""), clip_skip)
        states = torch.cat([text.states, *[empty.states] * missing], dim=1)
        return Text((text.key, empty.key, missing), states, text.pooled)

    def _part(self, index: int, read: Tokens | CompelPrompt, clip_skip: int) -> Text:
        """Of one encoder: `(1, n·77, C)` of n chunks, one behind the other."""
        context = self.context
        used = {i: self.embeddings[i] for i in sorted(read.found)}
        key = (
            "text",
            context.weights,
            index,
            read if isinstance(read, CompelPrompt) else (self.emphasis, *read.key),
            tuple((i, each.version.digest, each.text_weight) for i, each in used.items()),
            self.factors_key if self.factors[index] is not None else None,
            clip_skip,
        )
        nbytes = (
            read.chunks * context.tokenizers[index].model_max_length * context.base.compatibility.text_widths[index]
        )
        call = partial(self._call, index, used, clip_skip)

        def encode() -> EncodedText:
            if isinstance(read, CompelPrompt):
                return _of_compel(read, context.tokenizers[index], call)
            return _of_chunks(read, call, self.emphasis)

        encoded = context.device.get(key, nbytes * 4, encode)
        return Text(key, encoded.states, encoded.pooled)

    def _call(
        self,
        index: int,
        embeddings: Mapping[int, Bound],
        clip_skip: int,
        tokens: Tokens,
        mask: Tensor | None = None,
    ) -> EncodedText:
        """One run of an encoder, in which each chunk is a row."""
        context, executor = self.context, self.context.executor
        component = context.base.family.texts[index].encoder
        vectors = {
            i: textual_inversion.vectors(
                context.record(each, textual_inversion.read_record), component, each.text_weight
            )
            for i, each in embeddings.items()
        }
        factors = factors_of(self.factors[index], tokens.chunks, executor.device)
        overrides = textual_inversion.overrides(tokens, vectors)
        return executor.encode(index, TextInputs(tokens.ids, factors, overrides, clip_skip, mask))


def _of_chunks(tokens: Tokens, call: Callable[[Tokens], EncodedText], emphasis: str) -> EncodedText:
    found = call(tokens)
    states = found.states
    if tokens.weights is not None:
        states = weighted(states, tokens.weights.to(states.device), restore_mean=emphasis == "original")
    return EncodedText(states.flatten(0, 1)[None], found.pooled[:1] if found.pooled is not None else None)


def _of_compel(
    prompt: CompelPrompt, tokenizer: CLIPTokenizer, call: Callable[[Tokens, Tensor | None], EncodedText]
) -> EncodedText:
    """What is pooled is the text as it is written, without a grammar: so compel has it."""
    like = call(tokenize(tokenizer, prompt.words, prompt.names), None)
    states = embed(prompt, tokenizer, lambda tokens, mask: call(tokens, mask).states)
    return EncodedText(states.to(like.states), like.pooled[:1] if like.pooled is not None else None)


@torch.inference_mode()
def weighted(states: Tensor, weights: Tensor, *, restore_mean: bool) -> Tensor:
    """states `(n, T, C)` times weights `(n, T)`; then, if asked, each chunk's mean is what it was before.

    A mean of nothing but rounding errors cannot be restored, and is left.
    """
    found = states.float() * weights[..., None]
    if restore_mean:
        before, after = states.float().mean((1, 2)), found.mean((1, 2))
        is_rounding = after.abs() <= _ROUNDING * found.abs().mean((1, 2))
        found = found * torch.where(is_rounding, 1.0, before / after)[:, None, None]
    return found.to(states.dtype)


def together(texts: Sequence[Text]) -> Text:
    """What the rows of one phase read, as one tensor."""
    pooled = [text.pooled for text in texts if text.pooled is not None]
    return Text(
        tuple(text.key for text in texts),
        torch.cat([text.states for text in texts]),
        torch.cat(pooled) if pooled else None,
    )
