"""Trains new token embeddings beside the frozen table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scumble.errors import InvalidRequest
from scumble_trainers.base import Pipeline, TrainingBase
from scumble_trainers.method import TrainingMethod, half
from scumble_trainers.methods.textual_inversion.settings import TextualInversionSettings
from scumble_trainers.settings import StoredType

FILE = "learned_embeds.safetensors"
SPREAD = 0.01  # initial noise, in deviations of the table: equal vectors would stay equal
SDXL_KEYS = ("clip_l", "clip_g")


class TextualInversionTraining(TrainingMethod[TextualInversionSettings]):
    """Trains the vectors of a new word, one group for each text encoder."""

    name = "textual_inversion"

    def __init__(self, pipeline: Pipeline, settings: TextualInversionSettings, base: TrainingBase) -> None:
        super().__init__(pipeline, settings, base)
        # Files for SDXL have no token name inside: it is the file's name, as in webui and kohya.
        self.adapter = FILE if len(self.text.encoders) == 1 else f"{settings.token.strip('<>')}.safetensors"
        words = token_names(settings.token, settings.vectors)
        self.vectors = nn.ParameterList()
        for encoder, tokenizer in zip(self.text.encoders, self.text.tokenizers, strict=True):
            table = cast(Any, encoder).get_input_embeddings()
            begin = _beginning(tokenizer, table.weight, settings)
            added = tokenizer.add_tokens(words)
            if added != len(words):
                raise InvalidRequest(
                    f"the tokenizer has {settings.token!r} already: choose another token", field="token"
                )
            self.vectors.append(nn.Parameter(begin.float().to(self.device)))
            cast(Any, encoder).set_input_embeddings(
                _Table(table, self.vectors[-1], [cast(int, tokenizer.convert_tokens_to_ids(word)) for word in words])
            )

    @property
    def trains_text(self) -> bool:
        return True

    @property
    def trigger_words(self) -> tuple[str, ...]:
        return (self.settings.token, *self.settings.trigger_words)

    def trained(self) -> dict[str, nn.Parameter]:
        return {f"vectors.{index}": vectors for index, vectors in enumerate(self.vectors)}

    def save(self, folder: Path, dtype: StoredType) -> None:
        one = len(self.vectors) == 1
        names = (self.settings.token,) if one else SDXL_KEYS
        save_file(half(dict(zip(names, self.vectors, strict=True)), dtype), folder / self.adapter)


class _Table(nn.Module):
    """The encoder's table with rows for the tokens that were added last. Only those have gradients.

    A table may have more rows than the tokenizer has words, so the new tokens' ids may be existing rows.
    """

    def __init__(self, table: nn.Embedding, further: nn.Parameter, numbers: Sequence[int]) -> None:
        super().__init__()
        self.table, self.further, self.first = table, further, numbers[0]

    @property
    def weight(self) -> Tensor:
        """Weight of the table, whose device and dtype callers read."""
        return self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed token ids `(…)` as `(…, D)`."""
        new = tokens >= self.first
        known = self.table(tokens.masked_fill(new, 0))
        own = self.further[(tokens - self.first).clamp(min=0)]
        return torch.where(new[..., None], own.to(known.dtype), known)


def token_names(token: str, vectors: int) -> list[str]:
    """Return the tokens of a word of several vectors, named as in diffusers: `<bell>`, `<bell>_1`, …"""
    return [token, *(f"{token}_{index}" for index in range(1, vectors))]


def _beginning(tokenizer: Any, table: Tensor, settings: TextualInversionSettings) -> Tensor:
    """Return initial vectors `(vectors, D)`: the initial words' rows, repeated, or the table's mean."""
    ids = tokenizer(settings.initial_words, add_special_tokens=False).input_ids if settings.initial_words else []
    if len(ids) > settings.vectors:
        raise InvalidRequest(
            f"--initial-words {settings.initial_words!r} are {len(ids)} tokens, more than --vectors "
            f"{settings.vectors}: use more vectors or fewer words",
            field="initial_words",
        )
    rows = table[[ids[index % len(ids)] for index in range(settings.vectors)]] if ids else table.mean(dim=0)[None]
    noise = torch.randn(settings.vectors, table.shape[1])
    return rows.float().cpu() + SPREAD * float(table.float().std()) * noise
