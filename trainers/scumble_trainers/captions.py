"""Captions as token ids and, where the text encoder stays as it is, as embeddings made once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from scumble_trainers.dataset import Example

CACHE_LIMIT = 2 * 2**30
"""Bytes of embeddings kept in memory; beyond it they are made again at every step."""


@dataclass(frozen=True, slots=True)
class Captions:
    """The distinct captions of N examples. Row 0 is the empty one, for caption dropout."""

    tokens: Tensor  # (U, T) int64
    first: Tensor  # (N,) int64: an example's captions are rows first … first + count - 1 of `rows`
    count: Tensor  # (N,) int64
    rows: Tensor  # (Σ count,) int64: rows of `tokens`
    embeddings: Tensor | None  # (U, T, D), or None where they are made at every step

    def choose(self, pictures: Tensor, which: Tensor, dropped: Tensor) -> Tensor:
        """`(B,)` rows of `tokens`: of each picture the caption at `which` in [0, 1), row 0 where dropped."""
        offset = (which * self.count[pictures]).long()
        return torch.where(dropped, 0, self.rows[self.first[pictures] + offset])

    def of(self, pictures: Tensor) -> Tensor:
        """`(B,)` rows of `tokens`: each picture's first caption."""
        return self.rows[self.first[pictures]]

    def embed(self, text_encoder: nn.Module, rows: Tensor, device: torch.device) -> Tensor:
        """`(B, T, D)` on `device`: cached, or computed now (with gradients if the encoder has any)."""
        if self.embeddings is not None:
            return self.embeddings[rows].to(device)
        return encode_tokens(text_encoder, self.tokens[rows].to(device))


def tokenise(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """`(N, T)` int64, padded and cut to the tokenizer's length as the pipeline does."""
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


def encode_tokens(text_encoder: nn.Module, tokens: Tensor) -> Tensor:
    """`(N, T) -> (N, T, D)`: the last hidden state, which SD 1.x conditions on."""
    states = text_encoder(tokens)[0]
    assert isinstance(states, Tensor)
    return states


@torch.no_grad()
def read_captions(
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    examples: Sequence[Example],
    *,
    cache: bool,
    batch: int = 32,
) -> Captions:
    """All captions of `examples`; embedded at once if `cache` is wanted and they fit CACHE_LIMIT."""
    row_of: dict[str, int] = {"": 0}
    rows = [row_of.setdefault(text, len(row_of)) for example in examples for text in example.texts]
    count = torch.tensor([len(example.texts) for example in examples])
    tokens = tokenise(tokenizer, list(row_of))
    device = text_encoder.device
    size = tokens.numel() * text_encoder.config.hidden_size * 4
    embeddings = None
    if cache and size <= CACHE_LIMIT:
        shares = [encode_tokens(text_encoder, share.to(device)).float().cpu() for share in tokens.split(batch)]
        embeddings = torch.cat(shares)
    return Captions(tokens, count.cumsum(0) - count, count, torch.tensor(rows), embeddings)
