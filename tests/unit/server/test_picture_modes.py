"""Whatever mode a picture comes in, and wherever it is transparent, every way in reads it as what it shows."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from scumble.request import Request
from scumble_registry import Registry
from support.control_nets import load_unet, make_net
from support.running import Running
from support.tiny_ip import make_image_encoder, make_ip_adapter

PLAIN = {"prompt": "a red apple", "seed": 7, "steps": 4, "guidance_scale": 3.0, "width": 64, "height": 64}
DRAW = np.random.default_rng(3)
COLOURS = DRAW.integers(0, 256, (64, 64, 3), np.uint8)
ALPHA = np.zeros((64, 64), np.uint8)
ALPHA[16:48, 8:56] = 255  # whole levels only, so that laying on a ground rounds nothing
LEVELS = DRAW.integers(0, 256, (64, 64), np.uint8)

SEE_THROUGH = Image.fromarray(np.dstack([COLOURS, ALPHA]))
ON_WHITE = Image.fromarray(np.where(ALPHA[..., None] == 255, COLOURS, 255).astype(np.uint8))
ON_BLACK = Image.fromarray(np.where(ALPHA[..., None] == 255, COLOURS, 0).astype(np.uint8))
COVERING = Image.fromarray(np.dstack([np.full((64, 64, 3), 255, np.uint8), ALPHA]))
COVERED = Image.fromarray(ALPHA)
GREY, DEEP_GREY = Image.fromarray(LEVELS), Image.fromarray(LEVELS.astype(np.uint16) * 257)


@pytest.fixture(scope="module")
def looking(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Running]
) -> Iterator[Running]:
    """The tiny base with an IP-Adapter `a/ip` and a ControlNet `a/net`."""
    files = tmp_path_factory.mktemp("looking")
    make_image_encoder(files / "ip" / "image_encoder")
    make_ip_adapter(tiny_base, files / "ip" / "ip_adapter.safetensors", "base", gain=3.0)
    make_net(load_unet(tiny_base), 1).save_pretrained(files / "net")
    with Registry.open(files / "home", create=True) as registry:
        registry.publish(tiny_base, name="tiny/base")
        registry.publish(files / "ip", name="a/ip", base="tiny/base")
        registry.publish(files / "net", name="a/net", base="tiny/base")
    started = start(files / "home", "tiny/base", {})
    yield started
    started.service.close()


def original(picture: Image.Image, **more: Any) -> dict[str, Any]:
    return {"images": {"p": picture}, "options": {"image": "p", **more}}


def adapter(ref: str, picture: Image.Image, **more: Any) -> dict[str, Any]:
    return {"images": {"p": picture}, "adapters": [{"ref": ref, "images": ["p"], **more}]}


def masked(mask: Image.Image) -> dict[str, Any]:
    return {"images": {"p": ON_WHITE, "m": mask}, "options": {"image": "p", "mask": "m"}}


def masked_reference(mask: Image.Image) -> dict[str, Any]:
    return {
        "images": {"p": ON_WHITE, "m": mask},
        "adapters": [{"ref": "a/ip", "images": ["p"], "masks": ["m"]}],
    }


def draw(running: Running, asked: dict[str, Any]) -> Tensor:
    images = {}
    for name, picture in asked["images"].items():
        file = io.BytesIO()
        picture.save(file, "PNG")
        images[name] = file.getvalue()
    return running.run([Request.parse({**PLAIN, **asked, "images": images})])[0].latents


@pytest.mark.parametrize(
    ("given", "shows", "other"),
    [
        (original(SEE_THROUGH), original(ON_WHITE), original(ON_BLACK)),
        (adapter("a/ip", SEE_THROUGH), adapter("a/ip", ON_WHITE), adapter("a/ip", ON_BLACK)),
        (
            adapter("a/net", SEE_THROUGH, preprocess="invert"),
            adapter("a/net", ON_WHITE, preprocess="invert"),
            adapter("a/net", ON_BLACK, preprocess="invert"),
        ),
        (adapter("a/net", SEE_THROUGH), adapter("a/net", ON_BLACK), adapter("a/net", ON_WHITE)),
        (masked(COVERING), masked(COVERED), masked(Image.new("L", (64, 64), 255))),
        (masked_reference(COVERING), masked_reference(COVERED), masked_reference(Image.new("L", (64, 64), 255))),
        (original(DEEP_GREY), original(GREY), original(Image.new("L", (64, 64), 255))),
        (adapter("a/ip", DEEP_GREY), adapter("a/ip", GREY), adapter("a/ip", Image.new("L", (64, 64), 255))),
        (adapter("a/net", DEEP_GREY), adapter("a/net", GREY), adapter("a/net", Image.new("L", (64, 64), 255))),
        (masked(DEEP_GREY), masked(GREY), masked(Image.new("L", (64, 64), 255))),
    ],
    ids=[
        "an original on white",
        "a reference on white",
        "what is preprocessed on white",
        "a ready map on black",
        "a mask's alpha is coverage",
        "so is that of a reference's mask",
        "a 16-bit original",
        "a 16-bit reference",
        "a 16-bit depth map",
        "a 16-bit mask",
    ],
)
def test_a_picture_is_read_as_what_it_shows(
    looking: Running, given: dict[str, Any], shows: dict[str, Any], other: dict[str, Any]
) -> None:
    drawn = draw(looking, given)
    assert torch.equal(drawn, draw(looking, shows))
    assert not torch.equal(drawn, draw(looking, other))
