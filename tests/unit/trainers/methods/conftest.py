"""Bases that can see, and pictures of things that share a word."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from scumble_trainers.base import TrainingBase, find_base
from support.every_method import TOKEN
from support.tiny_families import make_tiny_sd2, make_tiny_sdxl
from support.tiny_ip import make_image_encoder

COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="session", params=["sd1", "sd2", "sdxl"])
def any_folder(request: pytest.FixtureRequest, base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of each family that has an image encoder."""
    folder = tmp_path_factory.mktemp(request.param) / "base"
    if request.param == "sd1":
        shutil.copytree(base_folder, folder)
    else:
        {"sd2": make_tiny_sd2, "sdxl": make_tiny_sdxl}[request.param](folder)
    make_image_encoder(folder / "image_encoder", preparation=True)
    return folder


@pytest.fixture(scope="session")
def seeing_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SD 1 with an image encoder."""
    folder = tmp_path_factory.mktemp("seeing") / "base"
    shutil.copytree(base_folder, folder)
    make_image_encoder(folder / "image_encoder", preparation=True)
    return folder


@pytest.fixture
def base(seeing_folder: Path, tmp_path: Path) -> TrainingBase:
    return find_base(str(seeing_folder), tmp_path / "home")


@pytest.fixture
def things(tmp_path: Path) -> Path:
    """Six pictures of three things by two hands, 64x64, each captioned with the token."""
    folder = tmp_path / "things"
    folder.mkdir()
    lines = []
    for index in range(6):
        colour, style = COLOURS[index // 2], ("flat", "round")[index % 2]
        picture = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(picture).ellipse((4, 4, 40 + 3 * index, 50), fill=colour)
        picture.save(folder / f"{index}.png")
        line = {"file_name": f"{index}.png", "text": f"{colour} disc {TOKEN}, {style} style"}
        lines.append(json.dumps(line | {"concept": colour, "style": style}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    return folder
