"""img2img, inpainting (on any base, and on those with nine channels) and guidance rescale against diffusers."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from control_nets import load_unet, make_net
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from every_kind import coarse_png
from PIL import Image
from tiny_families import make_tiny_inpainting, make_tiny_sdxl

from scumble.errors import InvalidRequest
from scumble.request import Request
from scumble_registry import Registry

from .conftest import diffusers_scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

    from .conftest import Running

TOLERANCE = 1e-3
VISIBLE = 50 * TOLERANCE
PLAIN = {"prompt": "a red apple", "negative_prompt": "", "seed": 7, "steps": 10, "guidance_scale": 5.0}
SCHEDULERS = ("ddim", "euler", "euler_a", "dpmpp_2m_karras", "dpmpp_2m_sde", "unipc", "lcm")
KINDS: dict[tuple[str, bool], Any] = {
    ("tiny/base", False): StableDiffusionImg2ImgPipeline,
    ("tiny/base", True): StableDiffusionInpaintPipeline,
    ("tiny/nine", True): StableDiffusionInpaintPipeline,
    ("tiny/sdxl", False): StableDiffusionXLImg2ImgPipeline,
    ("tiny/sdxl", True): StableDiffusionXLInpaintPipeline,
}


def half_mask() -> bytes:
    light = np.zeros((64, 64), np.uint8)
    light[10:50, :33] = 255
    buffer = io.BytesIO()
    Image.fromarray(light).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = {"photo": coarse_png(3, 80), "other": coarse_png(4, 80), "mask": half_mask()}


def request(
    base: str, scheduler: str = "ddim", *, adapters: tuple[dict[str, Any], ...] = (), **options: Any
) -> Request:
    """64x64, from the options' pictures."""
    named = [options.get("image"), options.get("mask"), *(adapter.get("image") for adapter in adapters)]
    images = {name: PICTURES[name] for name in named if name}
    size = {"width": 64, "height": 64}
    fields = {"base": base, "scheduler": scheduler, "adapters": adapters, "options": options, "images": images}
    return Request.parse({**PLAIN, **size, **fields})


@pytest.fixture(scope="module")
def many(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Running]) -> Iterator[Running]:
    home, made = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("bases")
    files = {
        "tiny/base": tiny_base,
        "tiny/nine": make_tiny_inpainting(tiny_base, made / "nine"),
        "tiny/sdxl": make_tiny_sdxl(made / "sdxl", zero_negative=False),
    }
    make_net(load_unet(tiny_base), 1).save_pretrained(made / "net")
    with Registry.open(home, create=True) as registry:
        for name, folder in files.items():
            registry.publish(folder, name=name)
        registry.publish(made / "net", name="net/one", base="tiny/base")
    running = start(home, "tiny/base", {**files, "net/one": made / "net"}, more_bases=("tiny/nine", "tiny/sdxl"))
    yield running
    running.service.close()


def picture(name: str) -> Image.Image:
    return Image.open(io.BytesIO(PICTURES[name])).convert("RGB")


def by_diffusers(many: Running, asked: Request, kind: Any = None, **more: Any) -> Tensor:
    assert asked.base is not None
    options, folder = asked.options, many.files[asked.base]
    parts = more.pop("parts", {})
    kind = kind or KINDS[asked.base, options.mask is not None]
    pipeline = kind.from_pretrained(folder, local_files_only=True, **parts)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers_scheduler(asked, DDIMScheduler.load_config(folder / "scheduler"))
    if options.image is not None:
        resized = picture(options.image).resize((64, 64), Image.Resampling.LANCZOS)
        default = 0.8 if options.mask is None else 1.0
        more |= {"image": resized, "strength": default if options.strength is None else options.strength}
    if options.mask is not None:
        more |= {"mask_image": picture(options.mask), "width": 64, "height": 64}
    with torch.inference_mode():
        latents: Tensor = pipeline(
            asked.prompt,
            negative_prompt=asked.negative_prompt,
            num_inference_steps=asked.steps,
            guidance_scale=asked.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(asked.seed or 0),
            output_type="latent",
            **more,
        ).images
    return latents


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("strength", [None, 0.35, 1.0])
def test_img2img(many: Running, scheduler: str, strength: float | None) -> None:
    asked = request("tiny/base", scheduler, image="photo", strength=strength)
    ours = many.run([asked])[0].latents
    assert (ours - by_diffusers(many, asked)).abs().max() <= TOLERANCE
    other = many.run([request("tiny/base", scheduler, image="other", strength=strength)])[0].latents
    # A solver that forgets where it began at full strength shows less of the picture.
    assert (ours - other).abs().max() >= (VISIBLE if strength != 1.0 else TOLERANCE)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("strength", [None, 0.6])
@pytest.mark.parametrize("base", ["tiny/base", "tiny/nine"])
def test_inpainting(many: Running, base: str, scheduler: str, strength: float | None) -> None:
    asked = request(base, scheduler, image="photo", mask="mask", strength=strength)
    ours = many.run([asked])[0].latents
    assert (ours - by_diffusers(many, asked)).abs().max() <= TOLERANCE
    other = many.run([request(base, scheduler, image="other", mask="mask", strength=strength)])[0].latents
    assert (ours - other).abs().max() >= VISIBLE


@pytest.mark.parametrize("options", [{"image": "photo"}, {"image": "photo", "mask": "mask"}], ids=["picture", "mask"])
@pytest.mark.parametrize("strength", [None, 0.5])
def test_sdxl(many: Running, options: dict[str, Any], strength: float | None) -> None:
    asked = request("tiny/sdxl", "euler_a", strength=strength, **options)
    assert (many.run([asked])[0].latents - by_diffusers(many, asked)).abs().max() <= TOLERANCE


def test_a_controlnet_acts_by_the_steps_that_are_run(many: Running) -> None:
    how = {"ref": "net/one", "image": "other", "weight": 0.8, "end": 0.5}
    asked = request("tiny/base", adapters=(how,), image="photo", strength=0.6)
    theirs = by_diffusers(
        many,
        asked,
        StableDiffusionControlNetImg2ImgPipeline,
        parts={"controlnet": ControlNetModel.from_pretrained(many.files["net/one"])},
        control_image=picture("other").resize((64, 64), Image.Resampling.LANCZOS),
        controlnet_conditioning_scale=0.8,
        control_guidance_end=0.5,
    )
    assert (many.run([asked])[0].latents - theirs).abs().max() <= TOLERANCE


def test_guidance_rescale(many: Running) -> None:
    asked = request("tiny/base", guidance_rescale=0.7)
    theirs = by_diffusers(many, asked, StableDiffusionPipeline, guidance_rescale=0.7, width=64, height=64)
    plain = many.run([request("tiny/base")])[0].latents
    assert (many.run([asked])[0].latents - theirs).abs().max() <= TOLERANCE
    assert (plain - theirs).abs().max() >= VISIBLE


def test_strangers_with_and_without_pictures_share_their_steps(many: Running) -> None:
    asked = [
        request("tiny/base"),
        request("tiny/base", "euler_a", image="photo", strength=0.5),
        request("tiny/base", image="photo", mask="mask"),
        request("tiny/base", guidance_rescale=0.7),
        request("tiny/nine", image="photo", mask="mask"),
    ]
    for one, together in zip(asked, many.run(asked), strict=True):
        assert (many.run([one])[0].latents - together.latents).abs().max() <= 1e-4


def test_the_size_is_the_pictures_own_unless_one_is_asked_for(many: Running) -> None:
    asked = request("tiny/base", image="photo").model_copy(update={"width": None, "height": None})
    assert many.run([asked])[0].done.images.shape == (1, 80, 80, 3)


def test_tiles_show_the_same_picture(many: Running) -> None:
    plain, tiled = (
        many.run([request("tiny/base", vae_tiling=tiling).model_copy(update={"width": 128, "height": 128})])[0]
        for tiling in (False, True)
    )
    assert torch.equal(plain.latents, tiled.latents)
    difference = np.abs(plain.done.images.astype(float) - tiled.done.images).mean()
    assert 0 < difference <= 8


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "a mask without a picture": ("tiny/base", {"mask": "mask"}, r"options\.mask"),
    "strength without a picture": ("tiny/base", {"strength": 0.5}, r"options\.strength"),
    "less than a step": ("tiny/base", {"image": "photo", "strength": 0.05}, "less than one step"),
    "beyond one": ("tiny/base", {"image": "photo", "strength": 1.5}, r"options\.strength"),
    "a base that fills without a mask": ("tiny/nine", {"image": "photo"}, r"options\.mask"),
    "a base that fills without a picture": ("tiny/nine", {}, r"options\.image"),
}


@pytest.mark.parametrize(("base", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(many: Running, base: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        many.run([request(base, **options)])


def test_a_picture_that_is_not_there_is_named(many: Running) -> None:
    asked = request("tiny/base", image="photo").model_copy(update={"images": {}})
    with pytest.raises(InvalidRequest, match=r"options\.image names 'photo'"):
        many.run([asked])
