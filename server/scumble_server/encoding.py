"""Texts of one request → states of the text encoders, each text once, kept by all that it was made of."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scumble_build.text import Encoded
from scumble_server.bound import Bound
from scumble_server.carried import RowFactors
from scumble_server.context import Context, Text
from scumble_server.methods import textual_inversion
from scumble_server.prompts import Tokens, tokenize
from scumble_server.stacking import factors_of


@dataclass(frozen=True, slots=True)
class Script:
    """A text as each of the base's encoders reads it, or None where zeros stand for it; `clip_skip` of the last
    layers are left out.
    """

    of_encoder: tuple[Tokens, ...] | None
    clip_skip: int

    @property
    def chunks(self) -> int:
        return max((len(tokens.ids) for tokens in self.of_encoder or ()), default=0)

    @property
    def found(self) -> frozenset[int]:
        """The embeddings whose name is written in it."""
        return frozenset[int]().union(*(tokens.found for tokens in self.of_encoder or ()))


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

    def _padded(self, index: int, tokens: Tokens, clip_skip: int, chunks: int) -> Text:
        text, missing = self._part(index, tokens, clip_skip), chunks - len(tokens.ids)
        if not missing:
            return text
        empty = self._part(index, tokenize(self.context.tokenizers[index], ""), clip_skip)
        states = torch.cat([text.states, *[empty.states] * missing], dim=1)
        return Text((text.key, empty.key, missing), states, text.pooled)

    def _part(self, index: int, tokens: Tokens, clip_skip: int) -> Text:
        """Of one encoder: `(1, n·77, C)` of n chunks, one behind the other."""
        context = self.context
        used = {i: self.embeddings[i] for i in sorted(tokens.found)}
        key = (
            "text",
            context.weights,
            index,
            tuple(tokens.ids.flatten().tolist()),
            tokens.slots,
            tuple((i, each.version.digest, each.text_weight) for i, each in used.items()),
            self.factors_key if self.factors[index] is not None else None,
            clip_skip,
            (self.emphasis, tuple(tokens.weights.flatten().tolist())) if tokens.weights is not None else None,
        )
        nbytes = tokens.ids.numel() * context.base.compatibility.text_widths[index] * 4
        encoded = context.device.get(key, nbytes, lambda: self._run(index, tokens, used, clip_skip))
        return Text(key, encoded.states, encoded.pooled)

    def _run(self, index: int, tokens: Tokens, embeddings: Mapping[int, Bound], clip_skip: int) -> Encoded:
        context, executor = self.context, self.context.executor
        component = context.base.family.texts[index].encoder
        vectors = {
            i: textual_inversion.vectors(
                context.record(each, textual_inversion.read_record), component, each.text_weight
            )
            for i, each in embeddings.items()
        }
        found = executor.encode(
            index,
            tokens.ids,
            factors_of(self.factors[index], len(tokens.ids), executor.device),
            textual_inversion.overrides(tokens, vectors),
            clip_skip,
        )
        states = found.states
        if tokens.weights is not None:
            restore = self.emphasis == "original"
            states = weighted(states, tokens.weights.to(states.device), restore_mean=restore)
        return Encoded(states.flatten(0, 1)[None], found.pooled[:1] if found.pooled is not None else None)


@torch.inference_mode()
def weighted(states: Tensor, weights: Tensor, *, restore_mean: bool) -> Tensor:
    """states `(n, T, C)` times weights `(n, T)`; then, if asked, each chunk's mean is what it was before."""
    found = states.float() * weights[..., None]
    if restore_mean:
        found = found * (states.float().mean((1, 2)) / found.mean((1, 2)))[:, None, None]
    return found.to(states.dtype)


def together(texts: Sequence[Text]) -> Text:
    """What the rows of one phase read, as one tensor."""
    pooled = [text.pooled for text in texts if text.pooled is not None]
    return Text(
        tuple(text.key for text in texts),
        torch.cat([text.states for text in texts]),
        torch.cat(pooled) if pooled else None,
    )
