"""Pictures of concepts that nothing but the scorer ever saw."""

from __future__ import annotations

from itertools import islice

from PIL import Image

from scumble_trainers.emoji.folders import gallery
from scumble_trainers.emoji.home import data_home
from scumble_trainers.emoji.packages import fetch_packages


def unseen_pictures(count: int) -> list[Image.Image]:
    """The held-out concepts as the base's hands drew them, `count` of the 42 pictures."""
    modules = fetch_packages(data_home() / "npm")
    return [Image.fromarray(entry.pixels) for entry in islice(gallery(modules, "held-out"), count)]
