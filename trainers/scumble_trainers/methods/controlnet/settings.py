"""Settings of a ControlNet run, in addition to those of every run."""

from __future__ import annotations

from pathlib import Path

from scumble_trainers.settings import DATA, MODEL, TrainSettings, option

READY = "none"


class ControlNetSettings(TrainSettings):
    """Control pictures and initial weights."""

    preprocessor: str = option(
        "canny",
        panel=DATA,
        help=f'Preprocessor that makes the control pictures, as in requests; {READY}: lines have "conditioning_image".',
    )
    init: Path | None = option(
        None, panel=MODEL, help="Folder of a ControlNet to start from, instead of the base's encoder."
    )
    hint_channels: tuple[int, ...] = option(
        (),
        panel=MODEL,
        name="hint-channel",
        help="Widths of the layers that embed the control picture; repeat.",
    )
