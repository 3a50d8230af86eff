"""A VAE's folder in the registry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_families import make_vae

from scumble.errors import InvalidRequest, Refused
from scumble_registry.compatibility import VaeCompatibility
from scumble_registry.formats import read
from scumble_registry.formats.source import Source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_vae(seed=0).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_it_is_known_by_its_files(folder: Path) -> None:
    found = read(Source.scan(folder), None).compatibility
    model = make_vae(seed=0)
    assert found == VaeCompatibility(
        latent_channels=4, scale=8, parameters=sum(each.numel() for each in model.state_dict().values()), float32=True
    )


def test_a_config_that_says_otherwise_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "latent_channels": 16}))
    with pytest.raises(Refused, match="latent_channels = 16, but the weights have 4"):
        read(Source.scan(folder), None)


def test_other_weights_are_refused(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(Refused, match=r"lacks diffusion_pytorch_model\.safetensors"):
        read(Source.scan(folder), None)


def test_it_stands_alone(folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="stands alone"):
        read(Source.scan(folder), object())  # type: ignore[arg-type]
