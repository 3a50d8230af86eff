"""Settings of an IP-Adapter run, in addition to those of every run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from scumble_trainers.settings import DATA, MODEL, TRAIN, TrainSettings, option

Variant = Literal["base", "plus"]


class IpAdapterSettings(TrainSettings):
    """Kind and size of the adapter, and picture dropout."""

    variant: Variant = option(
        "base", panel=MODEL, help="base: 4 tokens from the tower's embedding; plus: a resampler over its states."
    )
    tokens: int = option(16, panel=MODEL, help="Tokens per picture, with --variant plus.", ge=1, le=256)
    width: int | None = option(
        None, panel=MODEL, help="Width of the resampler; default: the tower's.", ge=64, le=4096, multiple_of=64
    )
    image_dropout: float = option(0.1, panel=TRAIN, help="Share of rows trained without a picture.", ge=0, le=1)
    image_encoder: Path | None = option(
        None, panel=DATA, help="Folder of the vision tower; default: the base's image_encoder/."
    )
