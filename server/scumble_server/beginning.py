"""What an image begins with: noise alone, or a picture (img2img), of which a mask may keep a part (inpainting).

Whatever is drawn at random is drawn in the order of diffusers' own pipelines, so that the same seed gives the same.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from scumble.errors import InvalidRequest
from scumble.request import Options
from scumble_server.context import Context
from scumble_server.executors import Spread
from scumble_server.noise import Noise
from scumble_server.pictures import Picture
from scumble_server.rows import Kept, Row
from scumble_server.schedulers import Table
from scumble_server.settings import Settings

IMG2IMG_STRENGTH, INPAINTING_STRENGTH = 0.8, 1.0
"""What diffusers' pipelines take where nothing is said."""


@dataclass(frozen=True, slots=True, eq=False)
class Original:
    """The picture that a request begins with, and what of it is drawn anew (white in the mask), or None: all of it."""

    picture: Picture
    mask: Picture | None


@dataclass(frozen=True, slots=True, eq=False)
class Beginning:
    """One request's, on the executor's device, shared by its images.

    picture, and what of it is kept (`kept`, for bases that look at it), as latents; mask `(1, H/8, W/8)`, 1 where the
    image is drawn anew.
    """

    picture: Spread
    mask: Tensor | None = None
    kept: Spread | None = None
    pure_noise: bool = False
    """The schedule begins with noise alone, though a mask keeps a part of the picture."""
    shown: bool = False
    """The base looks at mask and kept part itself, in channels of its own."""


def strength_of(options: Options) -> float:
    """How much of the schedule is run. 1 where no picture is given."""
    if options.image is None:
        return 1.0
    default = IMG2IMG_STRENGTH if options.mask is None else INPAINTING_STRENGTH
    return default if options.strength is None else options.strength


def check(options: Options, *, inpaints: bool) -> None:
    """`inpaints`: the base looks at a mask. Raises InvalidRequest naming the option."""
    if options.image is None:
        for name in ("mask", "strength"):
            if getattr(options, name) is not None:
                raise InvalidRequest(
                    f"options.{name} is for a request that begins with a picture; name one of its images in "
                    "options.image, or leave it out",
                    field=f"options.{name}",
                )
    if inpaints and options.mask is None:
        raise InvalidRequest(
            "this base fills masked parts of a picture; name a picture in options.image and a mask in options.mask",
            field="options.mask" if options.image else "options.image",
        )


def prepare(context: Context, original: Original) -> Beginning:
    """Encodes the picture; whoever begins with the same one finds it."""
    settings, base = context.settings, context.base
    shown = base.inpaints
    picture = _encode(context, original, masked=False)
    if original.mask is None:
        return Beginning(picture)
    mask = interpolate(_mask(original.mask, settings), scale_factor=1 / base.compatibility.vae_scale)[0]
    return Beginning(
        picture,
        mask.to(context.executor.device),
        _encode(context, original, masked=True),
        pure_noise=settings.first_step == 0 and settings.strength == 1,
        shown=shown,
    )


def again(pixels: NDArray[np.uint8], mask: Picture | None) -> Original:
    """What a second pass begins with: pixels `(H, W, 3)` of the first."""
    digest = f"sha256:{hashlib.sha256(pixels.tobytes()).hexdigest()}"
    return Original(Picture("", digest, pixels), mask)


def begin(row: Row, beginning: Beginning | None) -> None:
    """Gives a row its first sample, and what it keeps of a picture."""
    noise, table, device = row.noise, row.table, row.sample.device
    if beginning is None:
        row.sample = noise.draw().to(device) * table.init_sigma
        return
    picture = None
    if not (beginning.shown and beginning.pure_noise):
        picture = _sample(beginning.picture, noise)
    fresh = noise.draw().to(device)
    row.sample = _first(picture, fresh, table) if not beginning.pure_noise else fresh * table.init_sigma
    if beginning.mask is not None and beginning.kept is not None:
        kept = _sample(beginning.kept, noise)  # drawn even where it is not looked at
        if beginning.shown:
            row.shown = torch.cat([beginning.mask, kept])
        else:
            assert picture is not None
            row.kept = Kept(picture, fresh, beginning.mask)


def _first(picture: Tensor | None, fresh: Tensor, table: Table) -> Tensor:
    assert picture is not None
    of_picture, of_noise = table.noised[0].tolist()
    first: Tensor = of_picture * picture + of_noise * fresh
    return first


def _sample(spread: Spread, noise: Noise) -> Tensor:
    return spread.mean + spread.deviation * noise.draw().to(spread.mean)


def _encode(context: Context, original: Original, *, masked: bool) -> Spread:
    settings = context.settings
    mask = original.mask if masked else None
    key = (
        "latents",
        context.vae_key,
        original.picture.digest,
        None if mask is None else mask.digest,
        settings.width,
        settings.height,
    )
    pixels = settings.width * settings.height
    nbytes = 2 * context.base.compatibility.latent_channels * pixels // context.base.compatibility.vae_scale**2 * 4

    def encode() -> Spread:
        picture = _pixels(original.picture, settings)
        return context.vae.encode(picture if mask is None else picture * (_mask(mask, settings) < 0.5))

    return context.device.get(key, nbytes, encode)


def _pixels(picture: Picture, settings: Settings) -> Tensor:
    """`(1, 3, H, W)` in -1…1, resized as diffusers resizes."""
    resized = Image.fromarray(picture.rgb).resize((settings.width, settings.height), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
    return pixels.view(1, settings.height, settings.width, 3).permute(0, 3, 1, 2).float() / 127.5 - 1


def _mask(picture: Picture, settings: Settings) -> Tensor:
    """`(1, 1, H, W)`, 1 where it is lighter than half."""
    resized = Image.fromarray(picture.rgb).resize((settings.width, settings.height), Image.Resampling.LANCZOS)
    light = torch.frombuffer(bytearray(resized.convert("L").tobytes()), dtype=torch.uint8)
    return (light.view(1, 1, settings.height, settings.width).float() / 255 >= 0.5).float()
