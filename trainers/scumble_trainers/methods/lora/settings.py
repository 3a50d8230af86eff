"""What a LoRA run can be told beside what every run can."""

from __future__ import annotations

from scumble_trainers.settings import MODEL, TRAIN, TrainSettings, option


class LoraSettings(TrainSettings):
    """Factors beside which layers, of which size."""

    rank: int = option(8, panel=MODEL, help="Rank of every factor.", ge=1, le=256)
    alpha: float | None = option(
        None, panel=MODEL, help="The update is multiplied by alpha / rank; by default alpha = rank.", gt=0
    )
    feed_forward: bool = option(default=False, panel=MODEL, help="Feed-forward layers as well as attention.")
    text_encoder: bool = option(default=False, panel=MODEL, help="The text encoder as well.")
    text_learning_rate: float | None = option(
        None, panel=TRAIN, help="Of the text encoder's factors; by default the UNet's.", gt=0, le=10
    )

    @property
    def scale_alpha(self) -> float:
        return float(self.rank) if self.alpha is None else self.alpha
