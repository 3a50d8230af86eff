"""What a ControlNet run can be told beside what every run can."""

from __future__ import annotations

from pathlib import Path

from scumble_trainers.settings import DATA, MODEL, TrainSettings, option

READY = "none"


class ControlNetSettings(TrainSettings):
    """What it looks at, and what it begins with."""

    preprocessor: str = option(
        "canny",
        panel=DATA,
        help=f'Makes control pictures of the pictures, as in requests; {READY}: lines give "conditioning_image".',
    )
    init: Path | None = option(
        None, panel=MODEL, help="Folder of a ControlNet to go on from, instead of the base's encoder."
    )
    hint_channels: tuple[int, ...] = option(
        (),
        panel=MODEL,
        name="hint-channel",
        help="Widths of what reads the control picture; repeat.",
    )
