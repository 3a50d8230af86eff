"""Texts of one request → states of the text encoder, each text once, kept by all that it was made of."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scumble_server.bound import Bound
from scumble_server.carried import RowFactors
from scumble_server.context import Context
from scumble_server.methods import textual_inversion
from scumble_server.prompts import Tokens, tokenize
from scumble_server.stacking import factors_of


@dataclass(frozen=True, slots=True)
class Encoded:
    """States `(rows, T, C)`, and what they were made of."""

    key: Hashable
    states: Tensor


@dataclass(frozen=True, slots=True)
class Encoder:
    """The text encoder as one request sees it. `context` holds its weights, `factors` the request's LoRAs on it, of
    which `factors_key` says what they are; `embeddings[i]` is what slots of embedding i stand for.
    """

    context: Context
    factors: RowFactors | None
    factors_key: Hashable
    embeddings: Mapping[int, Bound]

    def encode(self, tokens: Tokens, clip_skip: int, emphasis: str) -> Encoded:
        """`(1, n·77, C)` of n chunks, one behind the other."""
        context = self.context
        used = {index: self.embeddings[index] for index in sorted(tokens.found)}
        key = (
            "text",
            context.weights,
            tuple(tokens.ids.flatten().tolist()),
            tokens.slots,
            tuple((index, each.version.digest, each.text_weight) for index, each in used.items()),
            self.factors_key if self.factors is not None else None,
            clip_skip,
            (emphasis, tuple(tokens.weights.flatten().tolist())) if tokens.weights is not None else None,
        )
        width = context.base.compatibility.text_widths[0]
        states = context.device.get(
            key, tokens.ids.numel() * width * 4, lambda: self._states(tokens, used, clip_skip, emphasis)
        )
        return Encoded(key, states)

    def encode_all(self, texts: Sequence[tuple[Tokens, int]], emphasis: str) -> list[Encoded]:
        """Texts, each with its clip skip, padded to the same number of chunks with those of an empty one."""
        longest = max(len(tokens.ids) for tokens, _ in texts)
        nothing = tokenize(self.context.tokenizer, "")
        found = []
        for tokens, clip_skip in texts:
            encoded = self.encode(tokens, clip_skip, emphasis)
            if missing := longest - len(tokens.ids):
                empty = self.encode(nothing, clip_skip, emphasis)
                states = torch.cat([encoded.states, *[empty.states] * missing], dim=1)
                encoded = Encoded((encoded.key, empty.key, missing), states)
            found.append(encoded)
        return found

    def _states(self, tokens: Tokens, embeddings: Mapping[int, Bound], clip_skip: int, emphasis: str) -> Tensor:
        context, executor = self.context, self.context.executor
        vectors = {
            index: textual_inversion.vectors(context.record(each, textual_inversion.read_record), each.text_weight)
            for index, each in embeddings.items()
        }
        states = executor.encode(
            tokens.ids,
            factors_of(self.factors, len(tokens.ids), executor.device),
            textual_inversion.overrides(tokens, vectors),
            clip_skip,
        )
        if tokens.weights is not None:
            states = weighted(states, tokens.weights.to(states.device), restore_mean=emphasis == "original")
        return states.flatten(0, 1)[None]


@torch.inference_mode()
def weighted(states: Tensor, weights: Tensor, *, restore_mean: bool) -> Tensor:
    """states `(n, T, C)` times weights `(n, T)`; then, if asked, each chunk's mean is what it was before."""
    found = states.float() * weights[..., None]
    if restore_mean:
        found = found * (states.float().mean((1, 2)) / found.mean((1, 2)))[:, None, None]
    return found.to(states.dtype)


def together(texts: Sequence[Encoded]) -> Encoded:
    """What the rows of one phase read, as one tensor."""
    return Encoded(tuple(text.key for text in texts), torch.cat([text.states for text in texts]))
