"""A VAE's folder in the registry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from scumble.errors import InvalidRequest, Refused
from scumble_registry import Registry
from scumble_registry.compatibility import VaeCompatibility
from scumble_registry.formats import read
from scumble_registry.formats.source import Hints, Source
from support.single_files import to_vae
from support.tiny_families import make_vae


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
    with pytest.raises(InvalidRequest, match="published for no base"):
        read(Source.scan(folder), object())  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["original", "original, in a state_dict", "diffusers"])
def test_weights_alone_take_the_config_of_the_vae_that_they_are_like(
    folder: Path, tiny_base: Path, tmp_path: Path, layout: str
) -> None:
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    file = tmp_path / "vae.safetensors"
    if layout == "diffusers":
        save_file(state, file)
    elif layout == "original":
        save_file({name: values.contiguous() for name, values in to_vae(state).items()}, file)
    else:
        file = tmp_path / "vae.ckpt"
        loss = {"loss.discriminator.weight": torch.zeros(2)}
        torch.save({"state_dict": to_vae(state) | loss, "epoch": 1}, file)
    with Registry.open(tmp_path / "home", create=True) as registry:
        with pytest.raises(Refused, match="--like"):
            registry.publish(file, "v/a")
        registry.publish(tiny_base, "b/base")
        version = registry.publish(file, "v/a", hints=Hints(registry.folder_of("b/base")))
        registry.pull("v/a", tmp_path / "pulled")
        scale = json.loads((tiny_base / "vae/config.json").read_text())["scaling_factor"]
    made = AutoencoderKL.from_pretrained(tmp_path / "pulled", local_files_only=True)
    assert made.config.scaling_factor == scale
    assert all(torch.equal(values, state[name]) for name, values in made.state_dict().items())
    assert version.manifest.kind == "vae"


def test_a_vae_of_another_structure_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    other = AutoencoderKL(block_out_channels=(4, 8), norm_num_groups=4, **kinds)
    save_file(other.state_dict(), tmp_path / "vae.safetensors")
    with (
        Registry.open(tmp_path / "home", create=True) as registry,
        pytest.raises(Refused, match=r"block_out_channels \[4, 8\]"),
    ):
        registry.publish(tmp_path / "vae.safetensors", "v/a", hints=Hints(lambda: tiny_base))
