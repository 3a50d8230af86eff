"""Checks a run's data against its base and settings, before torch is imported: what is wrong is told at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scumble.errors import InvalidRequest
from scumble_trainers.base import native_resolution, side_multiple
from scumble_trainers.data.dataset import Example, data_digest, read_examples, with_captions
from scumble_trainers.settings import TrainSettings


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Checked pictures with the captions that they are trained with."""

    examples: tuple[Example, ...]
    digest: str
    """Of the data as they are in the folder, without `--caption`."""
    resolution: int


def check_data(base: Path, data: Path, settings: TrainSettings) -> TrainingData:
    """Read and check all data for a base's folder. Raises NotFound or InvalidRequest."""
    resolution, multiple = settings.resolution or native_resolution(base), side_multiple(base)
    if resolution % multiple:
        raise InvalidRequest(
            f"--resolution {resolution} is not a multiple of this base's {multiple}", field="resolution"
        )
    read = read_examples(data, resolution=resolution, templates=settings.captions)
    examples = with_captions(read, settings.captions)
    settings.check_examples(examples)
    return TrainingData(tuple(examples), data_digest(read), resolution)
