"""Pictures that nothing but the scorer ever saw: of things that the base does not know, and of things that it does."""

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
    """The held-out concepts as the base's hands drew them, `count` of the 42 pictures."""
    modules = fetch_packages(data_home() / "npm")
    return [Image.fromarray(entry.pixels) for entry in islice(gallery(modules, "held-out"), count)]


def unseen_drawings(count: int) -> list[Image.Image]:
    """Different concepts that the base knows, evenly spread, as Emoji One drew them."""
    modules = fetch_packages(data_home() / "npm")
    drawn = [picture for concept in base_concepts() for picture in extra_pictures(modules, concept, EXTRA_STYLES[:1])]
    return [Image.fromarray(drawn[int(place)]) for place in np.arange(count) * len(drawn) // count]
