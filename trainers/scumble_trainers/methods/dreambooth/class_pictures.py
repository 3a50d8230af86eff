"""Class pictures drawn by the base: the prior that fine-tuning must preserve."""

from __future__ import annotations

import json
from pathlib import Path

from scumble.request import Request
from scumble_trainers.base import TrainingBase, native_resolution
from scumble_trainers.data.dataset import Example, read_examples
from scumble_trainers.data.sidecars import METADATA
from scumble_trainers.methods.dreambooth.settings import DreamboothSettings
from scumble_trainers.progress import ProgressReport
from scumble_trainers.results.serving import served


def class_examples(
    base: TrainingBase, settings: DreamboothSettings, folder: Path, report: ProgressReport
) -> list[Example]:
    """Return the class pictures in `folder`, drawn now if missing; their metadata is written last."""
    if not (folder / METADATA).is_file() or not _are_of(folder, base, settings):
        _draw(base, settings, folder, report)
    return read_examples(folder, resolution=1)


def _draw(base: TrainingBase, settings: DreamboothSettings, folder: Path, report: ProgressReport) -> None:
    side = settings.resolution or native_resolution(base.folder)
    prompts = [settings.class_prompts[i % len(settings.class_prompts)] for i in range(settings.class_pictures)]
    requests = [
        Request(prompt=prompt, seed=settings.seed + index, width=side, height=side)
        for index, prompt in enumerate(prompts)
    ]
    report("class pictures", 0, len(requests))
    with served(base, url=settings.server) as server:
        pictures = server.draw(requests)
    report("class pictures", len(requests), len(requests))
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        picture.save(folder / f"{index:05}.png")
        lines.append(json.dumps({"file_name": f"{index:05}.png", "text": prompt}))
    (folder / "made.json").write_text(json.dumps(_made(base, settings)), "utf-8")
    (folder / METADATA).write_text("\n".join(lines) + "\n", "utf-8")


def _are_of(folder: Path, base: TrainingBase, settings: DreamboothSettings) -> bool:
    try:
        return bool(json.loads((folder / "made.json").read_text("utf-8")) == _made(base, settings))
    except (OSError, ValueError):
        return False


def _made(base: TrainingBase, settings: DreamboothSettings) -> dict[str, object]:
    """Return everything that the pictures depend on."""
    return {
        "base": base.content,
        "prompts": list(settings.class_prompts),
        "pictures": settings.class_pictures,
        "seed": settings.seed,
        "resolution": settings.resolution,
    }
