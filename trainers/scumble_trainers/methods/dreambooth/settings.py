"""What a DreamBooth run can be told beside what every run can."""

from __future__ import annotations

from scumble_trainers.settings import DATA, MODEL, SAVE, TRAIN, TrainSettings, option


class DreamboothSettings(TrainSettings):
    """The class that must stay what it was."""

    class_prompts: tuple[str, ...] = option(
        (), panel=DATA, name="class-prompt", help="Of pictures of the class, which the base draws; repeat."
    )
    class_pictures: int = option(100, panel=DATA, help="How many, over all class prompts.", ge=1, le=10_000)
    prior_weight: float = option(1.0, panel=TRAIN, help="Of the loss on the class.", ge=0, le=100)
    text_encoder: bool = option(default=False, panel=MODEL, help="Fine-tune the text encoder as well.")
    text_learning_rate: float | None = option(
        None, panel=TRAIN, help="Of the text encoder; by default the UNet's.", gt=0, le=10
    )
    learning_rate: float = option(5e-6, panel=TRAIN, help="Of AdamW.", gt=0, le=10)
    server: str | None = option(
        None, panel=DATA, help="gRPC address of the server that draws the class; by default one is started."
    )
    save_delta: bool = option(
        default=False, panel=SAVE, help="Keep only the difference to the base: small, but useless without it."
    )
