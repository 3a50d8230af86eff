"""A base of each family that has an image encoder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.tiny_families import make_tiny_sd2, make_tiny_sdxl
from support.tiny_ip import make_image_encoder


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
