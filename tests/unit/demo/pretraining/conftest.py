from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from scumble_demo.emoji.concepts import STYLES, concepts
from scumble_demo.emoji.extras import Extras, save_extras
from scumble_demo.emoji.gallery import Gallery, save_gallery
from scumble_demo.emoji.render import render
from scumble_demo.pretraining.loop import LoopConfig
from scumble_demo.pretraining.recipe import Recipe
from scumble_demo.pretraining.stages import Workshop

SIDE = 32


def shape(row: int, style: int) -> str:
    """A disc, square or triangle, coloured by row; the style is its outline."""
    colour = f"hsl({row * 47 % 360},90%,50%)"
    line = f'fill="{colour}" stroke="#222" stroke-width="{style}"'
    body = (f'<circle cx="16" cy="16" r="11" {line}/>', f'<rect x="6" y="6" width="20" height="20" {line}/>')
    triangle = f'<path d="M16 5L27 27H5Z" {line}/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{(*body, triangle)[row % 3]}</svg>'


@pytest.fixture(scope="session")
def gallery() -> Gallery:
    """All concepts and six other emoji, as plain shapes of 32 pixels."""
    codes = [concept.code for concept in concepts()] + [f"f{n}" for n in range(6)]
    pictures = [[render(shape(row, style), SIDE) for style in range(len(STYLES))] for row in range(len(codes))]
    names = [concept.name for concept in concepts()] + [f"shape {n}" for n in range(6)]
    return Gallery(np.array(pictures), tuple(codes), tuple(names))


def tiny(steps: int) -> LoopConfig:
    return LoopConfig(steps=steps, learning_rate=2e-3, warmup=2, validate_every=2, save_every=2)


@pytest.fixture
def shop(tmp_path: Path, gallery: Gallery) -> Workshop:
    """A run of two steps per stage with models of a few thousand weights."""
    torch.set_num_threads(1)
    extras = Extras(gallery.pictures[:3, 0], np.arange(3))
    save_extras(extras, tmp_path / "gallery")
    save_gallery(gallery, tmp_path / "gallery")
    recipe = Recipe(
        vae=tiny(2),
        clip=tiny(2),
        unet=tiny(2),
        scorer=tiny(2),
        vae_batch=4,
        clip_batch=4,
        unet_batch=2,
        scorer_batch=4,
        vae_channels=(8, 8, 8, 8),
        unet_channels=(16, 32),
        unet_heads=(1, 1),
        concept_share=1,
    )
    return Workshop(tmp_path, recipe, torch.device("cpu"))
