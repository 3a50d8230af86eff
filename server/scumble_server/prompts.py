"""Prompts → token ids, padded as diffusers pads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPTokenizer


@dataclass(frozen=True, slots=True)
class Tokens:
    """ids `(1, 77)` int64; `cut` is the end of the prompt that did not fit, or None."""

    ids: Tensor
    cut: str | None


def tokenize(tokenizer: CLIPTokenizer, prompt: str) -> Tokens:
    """The first 75 tokens of `prompt` between BOS and EOS. What was cut is said, never lost in silence."""
    length = tokenizer.model_max_length
    ids: list[int] = tokenizer(prompt).input_ids
    cut = None
    if len(ids) > length:
        cut = str(tokenizer.decode(ids[length - 1 : -1]))
        ids = [*ids[: length - 1], ids[-1]]
    ids = ids + [tokenizer.pad_token_id] * (length - len(ids))
    return Tokens(torch.tensor([ids], dtype=torch.int64), cut)
