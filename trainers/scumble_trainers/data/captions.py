"""Captions as token ids and, if the text encoders are frozen, as embeddings computed once.

SD 1.x and 2.x condition on the last hidden state of one encoder. SDXL has two: it reads their last but one hidden
states, concatenated, and the second one's pooled output (2307.01952).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from scumble_trainers.base import Pipeline
from scumble_trainers.data.dataset import Example

CACHE_LIMIT = 2 * 2**30
"""Largest size in bytes of embeddings in memory; beyond it they are computed at every step."""


@dataclass(frozen=True, slots=True)
class TextStates:
    """The text conditioning of a UNet."""

    states: Tensor  # (B, T, D)
    pooled: Tensor | None  # (B, P), SDXL only

    def rows(self, chosen: Tensor) -> TextStates:
        return TextStates(self.states[chosen], None if self.pooled is None else self.pooled[chosen])

    def to(self, device: torch.device) -> TextStates:
        return TextStates(self.states.to(device), None if self.pooled is None else self.pooled.to(device))


class TextEncoders(nn.Module):
    """A pipeline's one or two text encoders as one module, with their tokenizers."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        second = getattr(pipeline, "text_encoder_2", None)
        self.encoders = nn.ModuleList([pipeline.text_encoder, *([second] if second is not None else [])])
        self.expand = pipeline.maybe_convert_prompt  # words of several vectors, if any
        self.tokenizers: list[CLIPTokenizer] = [pipeline.tokenizer]
        if second is not None:
            self.tokenizers.append(pipeline.tokenizer_2)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Tokenize texts: `(N, encoders, T)` int64."""
        expanded = [[self.expand(text, tokenizer) for text in texts] for tokenizer in self.tokenizers]
        return torch.stack([tokenize(t, own) for t, own in zip(self.tokenizers, expanded, strict=True)], dim=1)

    def forward(self, tokens: Tensor) -> TextStates:
        """Encode token ids `(N, encoders, T)` on the encoders' device."""
        if len(self.encoders) == 1:
            return TextStates(self.encoders[0](tokens[:, 0])[0], None)
        outputs = [encoder(tokens[:, i], output_hidden_states=True) for i, encoder in enumerate(self.encoders)]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return TextStates(states, outputs[-1][0])

    @property
    def width(self) -> int:
        """Number of floats of a token's state."""
        return sum(int(cast(Any, encoder).config.hidden_size) for encoder in self.encoders)


@dataclass(frozen=True, slots=True)
class Captions:
    """The distinct captions of N examples. Row 0 is the empty one, for caption dropout."""

    tokens: Tensor  # (U, encoders, T) int64
    first: Tensor  # (N,) int64: an example's captions are rows first … first + count - 1 of `rows`
    count: Tensor  # (N,) int64
    rows: Tensor  # (Σ count,) int64: rows of `tokens`
    embeddings: TextStates | None  # U rows, or None if they are computed at every step

    def choose(self, pictures: Tensor, which: Tensor, dropped: Tensor) -> Tensor:
        """Return the rows of `tokens` `(B,)`: each picture's caption at `which` in [0, 1), row 0 if dropped."""
        offset = (which * self.count[pictures]).long()
        return torch.where(dropped, 0, self.rows[self.first[pictures] + offset])

    def of(self, pictures: Tensor) -> Tensor:
        """Return the rows of `tokens` `(B,)` of each picture's first caption."""
        return self.rows[self.first[pictures]]

    def embed(self, encoders: TextEncoders, rows: Tensor, device: torch.device) -> TextStates:
        """Return the states of rows on `device`: cached, or computed now, with gradients if the
        encoders are trained.
        """
        if self.embeddings is not None:
            return self.embeddings.rows(rows).to(device)
        text: TextStates = encoders(self.tokens[rows].to(device))
        return text


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Tokenize texts to `(N, T)` int64, padded and cut to the tokenizer's length as in the pipeline."""
    encoded = tokenizer(
        list(texts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    tokens = encoded["input_ids"]
    assert isinstance(tokens, Tensor)
    return tokens


@torch.no_grad()
def read_captions(
    encoders: TextEncoders, examples: Sequence[Example], *, cache: bool, device: torch.device, batch: int = 32
) -> Captions:
    """Read all captions of `examples`; with `cache` they are embedded now if they fit CACHE_LIMIT."""
    row_of: dict[str, int] = {"": 0}
    rows = [row_of.setdefault(text, len(row_of)) for example in examples for text in example.texts]
    count = torch.tensor([len(example.texts) for example in examples])
    tokens = encoders.tokenize(list(row_of))
    size = len(tokens) * tokens.shape[-1] * encoders.width * 4
    embeddings = None
    if cache and size <= CACHE_LIMIT:
        shares = [encoders(share.to(device)) for share in tokens.split(batch)]
        pooled = [share.pooled.float().cpu() for share in shares if share.pooled is not None]
        states = torch.cat([share.states.float().cpu() for share in shares])
        embeddings = TextStates(states, torch.cat(pooled) if pooled else None)
    return Captions(tokens, count.cumsum(0) - count, count, torch.tensor(rows), embeddings)
