"""img2img, inpainting (on any base, and on those with nine channels) and guidance rescale against diffusers."""

from __future__ import annotations

import hashlib
import io
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image

from scumble.errors import Incompatible, InvalidRequest, Refused
from scumble.events import Done, Event, Failed, Step
from scumble.redraw import read_receipt, request_from_receipt
from scumble.request import Options, Request
from scumble_registry import Registry
from support.control_nets import load_unet, make_net
from support.every_kind import coarse_png
from support.oracle import diffusers_scheduler
from support.tiny_families import make_tiny_inpainting, make_tiny_sdxl, make_vae

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

    from support.running import Running

pytestmark = pytest.mark.every_executor
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
def many(
    tiny_base: Path,
    make_lora: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    start: Callable[..., Running],
) -> Iterator[Running]:
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
        registry.publish(make_lora(tiny_base, made / "lora", seed=5, full=True), name="lora/full", base="tiny/base")
        for name, config in {"other": {"scaling_factor": 0.3}, "wide": {"latent_channels": 8}}.items():
            make_vae(seed=5, **config).save_pretrained(made / name)
            registry.publish(made / name, name=f"vae/{name}")
    running = start(
        home,
        "tiny/base",
        {**files, "net/one": made / "net", "vae/other": made / "other"},
        more_bases=("tiny/nine", "tiny/sdxl"),
    )
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


@pytest.mark.parametrize("base", ["tiny/base", "tiny/sdxl"])
def test_a_second_pass_begins_with_the_enlarged_picture(many: Running, base: str) -> None:
    hires = {"scale": 1.5, "strength": 0.5, "steps": 12}
    asked = request(base, "euler_a", hires=hires).model_copy(update={"num_images": 2})
    events: list[Event] = []
    done = threading.Event()

    def listen(event: Event) -> None:
        events.append(event)
        if isinstance(event, Done | Failed):
            done.set()

    many.service.submit(asked, listen)
    assert done.wait(120)
    assert isinstance(events[-1], Done), events[-1]
    ours = events[-1].images
    assert ours.shape == (2, 96, 96, 3)
    assert [event for event in events if isinstance(event, Step)] == [Step(step, 16) for step in range(1, 17)]
    assert events[-1].receipt.request.width == 64
    first = many.run([request(base, "euler_a").model_copy(update={"num_images": 2})])[0].done.images
    kind = StableDiffusionXLImg2ImgPipeline if base == "tiny/sdxl" else StableDiffusionImg2ImgPipeline
    for index in range(2):
        enlarged = Image.fromarray(first[index]).resize((96, 96), Image.Resampling.LANCZOS)
        second = asked.model_copy(update={"steps": 12, "seed": 7 + index, "options": Options()})
        latents = by_diffusers(many, second, kind, image=enlarged, strength=0.5)
        theirs = many.executor_of(base).vae.decode(latents).numpy()[0]
        assert np.abs(ours[index].astype(float) - theirs).max() <= 2
        assert np.abs(ours[index].astype(float) - np.asarray(enlarged)).mean() >= 1


def test_the_receipt_names_what_acted_in_either_pass(many: Running) -> None:
    early = {"ref": "net/one", "image": "other", "end": 0.1}  # in the first of ten steps, in none of six
    done = many.run([request("tiny/base", hires={"scale": 1.5, "strength": 0.6}, adapters=(early,))])[0].done
    assert [adapter.ref for adapter in done.receipt.adapters] == ["net/one"]
    assert done.receipt.dropped == ()
    again = request_from_receipt(done.receipt, {digest_of("other"): PICTURES["other"]})
    assert np.array_equal(many.run([again])[0].done.images, done.images)


def test_a_second_pass_equals_itself_among_strangers(many: Running) -> None:
    asked = [
        request("tiny/base", hires={"scale": 1.5}, image="photo", mask="mask"),
        request("tiny/base", hires={"scale": 2}, adapters=({"ref": "net/one", "image": "other"},)),
        request("tiny/base"),
    ]
    for one, together in zip(asked, many.run(asked), strict=True):
        assert np.abs(many.run([one])[0].done.images.astype(int) - together.done.images).max() <= 1


@pytest.mark.parametrize("base", ["tiny/base", "tiny/sdxl"])
def test_another_vae_encodes_and_decodes(many: Running, base: str) -> None:
    assert many.files["vae/other"].is_dir()
    options = {"image": "photo", "strength": 0.6}
    asked = request(base, vae="vae/other", **options)
    ours = many.run([asked])[0]
    other = AutoencoderKL.from_pretrained(many.files["vae/other"])
    latents = by_diffusers(many, asked, parts={"vae": other})
    assert (ours.latents - latents).abs().max() <= TOLERANCE
    decoded = other.decode(latents / other.config.scaling_factor, return_dict=False)[0].detach()
    theirs = ((decoded / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours.done.images - theirs).max() <= 2
    own = many.run([request(base, **options)])[0]
    assert np.abs(ours.done.images.astype(float) - own.done.images).mean() >= 5
    assert ours.done.receipt.vae.name == "vae/other"
    again = request_from_receipt(ours.done.receipt, {digest_of("photo"): PICTURES["photo"]})
    assert again.options.vae == f"vae/other@{ours.done.receipt.vae.digest}"
    assert torch.equal(many.run([again])[0].latents, ours.latents)


def digest_of(name: str) -> str:
    return f"sha256:{hashlib.sha256(PICTURES[name]).hexdigest()}"


def test_what_is_no_vae_is_refused(many: Running) -> None:
    with pytest.raises(Refused, match=r"options\.vae: net/one@1 is a controlnet"):
        many.run([request("tiny/base", vae="net/one")])
    with pytest.raises(Incompatible, match="latents with channels 8"):
        many.run([request("tiny/base", vae="vae/wide")])


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_files_instead_of_pixels_carry_the_receipt(many: Running, tmp_path: Path, kind: str) -> None:
    pixels = many.run([request("tiny/base")])[0].done
    found = many.run([request("tiny/base", format=kind, quality=95)])[0].done
    assert found.images.size == 0
    (content,) = found.encoded
    file = tmp_path / f"a.{kind}"
    file.write_bytes(content)
    assert read_receipt(file) == found.receipt.of_image(0)
    with Image.open(file) as picture:
        difference = np.abs(np.asarray(picture).astype(float) - pixels.images[0]).mean()
    assert difference <= (0 if kind == "png" else 12)


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "a mask without a picture": ("tiny/base", {"mask": "mask"}, r"options\.mask"),
    "strength without a picture": ("tiny/base", {"strength": 0.5}, r"options\.strength"),
    "less than a step": ("tiny/base", {"image": "photo", "strength": 0.05}, "less than one step"),
    "too large a second pass": ("tiny/base", {"hires": {"scale": 4, "strength": 0.01}}, r"less than one step"),
    "no second pass": ("tiny/base", {"hires": {"scale": 1}}, r"options\.hires\.scale"),
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


def test_one_lora_on_two_bases_of_one_family_is_laid_out_for_each(many: Running, start: Callable[..., Running]) -> None:
    """A first convolution that reads nine channels moves every layer behind it."""
    for base in ("tiny/base", "tiny/nine"):
        asked = request(base, adapters=({"ref": "lora/full"},), image="photo", mask="mask")
        bare = many.run([request(base, image="photo", mask="mask")])[0].latents
        found = many.run([asked])[0].latents
        alone = start(many.home, base, {})
        assert (found - alone.run([asked])[0].latents).abs().max() <= 1e-5
        assert (found - bare).abs().max() > 1e-2
        alone.service.close()
