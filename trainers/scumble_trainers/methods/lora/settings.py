"""Settings of a LoRA run, in addition to those of every run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from scumble_trainers.settings import MODEL, SAVE, TRAIN, TrainSettings, option

Layout = Literal["diffusers", "kohya"]
Rank = Annotated[int, Field(ge=1, le=256)]
Alpha = Annotated[float, Field(gt=0, le=1e5)]


class LoraSettings(TrainSettings):
    """The layers that get factors, and the factors' size. Patterns are PEFT's: see `layers.py`."""

    rank: Rank = option(8, panel=MODEL, help="Rank of every factor.")
    alpha: Alpha | None = option(None, panel=MODEL, help="The update is multiplied by alpha / rank; default: the rank.")
    rank_pattern: dict[str, Rank] = option(
        {}, panel=MODEL, help="Rank of the layers whose name matches: 'attn2.*=4'; repeat, the first match applies."
    )
    alpha_pattern: dict[str, Alpha] = option(
        {}, panel=MODEL, help="Alpha of the layers whose name matches; repeat, the first match applies."
    )
    feed_forward: bool = option(default=False, panel=MODEL, help="Feed-forward layers as well as attention.")
    convolution: bool = option(default=False, panel=MODEL, help="Convolutions as well (LoCon).")
    convolution_rank: Rank | None = option(
        None, panel=MODEL, help="Rank of the convolutions' factors; default: --rank."
    )
    rank_stabilised: bool = option(
        default=False, panel=MODEL, help="Multiply by alpha / sqrt(rank), so that high ranks learn as fast (rsLoRA)."
    )
    dora: bool = option(default=False, panel=MODEL, help="Train the magnitude of each row of the weights too (DoRA).")
    text_encoder: bool = option(default=False, panel=MODEL, help="Train the text encoder too; SDXL: both.")
    text_learning_rate: float | None = option(
        None, panel=TRAIN, help="Learning rate of the text encoder's factors; default: the UNet's.", gt=0, le=10
    )
    plus_ratio: float = option(
        1.0, panel=TRAIN, help="Learning rate of B divided by that of A (LoRA+); 16 is usual.", ge=1, le=1000
    )
    layout: Layout = option("diffusers", panel=SAVE, help="Names in the file: diffusers/PEFT's or kohya's.")
