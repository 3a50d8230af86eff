"""Settings of a DreamBooth run, in addition to those of every run."""

from __future__ import annotations

from collections.abc import Sequence

from scumble.errors import InvalidRequest
from scumble_trainers.data.dataset import Example
from scumble_trainers.settings import DATA, MODEL, SAVE, TRAIN, TrainSettings, option


class DreamboothSettings(TrainSettings):
    """Prior preservation, and what is trained."""

    class_prompts: tuple[str, ...] = option(
        (), panel=DATA, name="class-prompt", help="Prompt of class pictures, which the base draws; repeat."
    )
    class_pictures: int = option(
        100, panel=DATA, help="Number of class pictures, over all class prompts.", ge=1, le=10_000
    )
    prior_weight: float = option(1.0, panel=TRAIN, help="Weight of the loss on class pictures.", ge=0, le=100)
    text_encoder: bool = option(default=False, panel=MODEL, help="Train the text encoder too.")
    text_learning_rate: float | None = option(
        None, panel=TRAIN, help="Learning rate of the text encoder; default: the UNet's.", gt=0, le=10
    )
    learning_rate: float = option(5e-6, panel=TRAIN, help="Of AdamW.", gt=0, le=10)
    server: str | None = option(
        None, panel=DATA, help="gRPC address of a server to draw class pictures; default: one is started."
    )
    save_delta: bool = option(
        default=False, panel=SAVE, help="Save only the difference to the base: small, but unusable without it."
    )

    def check_examples(self, examples: Sequence[Example]) -> None:
        super().check_examples(examples)
        if self.class_prompts and self.bucket:
            raise InvalidRequest(
                "--bucket cannot be used with --class-prompt: class pictures are square, and a batch has one size",
                field="bucket",
            )
