"""Pictures that only the scorer was trained on: of things that the base does not know, and of things that it does."""

from __future__ import annotations

from itertools import islice

import numpy as np
from PIL import Image

from scumble_demo.emoji.concepts import EXTRA_STYLES, base_concepts
from scumble_demo.emoji.extras import extra_pictures
from scumble_demo.emoji.folders import gallery
from scumble_demo.emoji.home import data_home
from scumble_demo.emoji.packages import fetch_packages


def unseen_pictures(count: int) -> list[Image.Image]:
    """Return held-out concepts in the base's styles, `count` of the 42 pictures."""
    modules = fetch_packages(data_home() / "npm")
    return [Image.fromarray(entry.pixels) for entry in islice(gallery(modules, "held-out"), count)]


def unseen_drawings(count: int) -> list[Image.Image]:
    """Return different concepts that the base knows, evenly spread, in Emoji One's style."""
    modules = fetch_packages(data_home() / "npm")
    drawn = [picture for concept in base_concepts() for picture in extra_pictures(modules, concept, EXTRA_STYLES[:1])]
    return [Image.fromarray(drawn[int(index)]) for index in np.arange(count) * len(drawn) // count]
