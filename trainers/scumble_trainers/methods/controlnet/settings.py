"""Settings of a ControlNet run, in addition to those of every run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scumble.errors import InvalidRequest
from scumble_trainers.data.dataset import Example
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

    def check_examples(self, examples: Sequence[Example]) -> None:
        from scumble_build.control_maps import NAMES  # with OpenCV

        super().check_examples(examples)
        if self.preprocessor != READY:
            if self.preprocessor not in NAMES:
                known = ", ".join((*NAMES, READY))
                raise InvalidRequest(
                    f"--preprocessor {self.preprocessor} is unknown; there are {known}", field="preprocessor"
                )
            return
        missing = [example.name for example in examples if example.control is None]
        if missing:
            raise InvalidRequest(
                f'{missing[0]} has no "conditioning_image" ({len(missing)} in all have none): add one to every line, '
                "or let a --preprocessor make them",
                field="data",
            )
