"""The picture that a request begins with → latents."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from scumble_server.denoise.original import OriginalLatents
from scumble_server.executors.protocol import LatentDistribution
from scumble_server.methods.context import Context
from scumble_server.request.original import Original
from scumble_server.request.pictures import Picture
from scumble_server.request.settings import Settings


def encode(context: Context, original: Original) -> OriginalLatents:
    """Encode the original; whoever begins with the same picture finds it."""
    settings, base = context.settings, context.base
    picture = _encode(context, original, masked=False)
    if original.mask is None:
        return OriginalLatents(picture)
    mask = interpolate(_mask(original.mask, settings), scale_factor=1 / base.compatibility.vae_scale)[0]
    return OriginalLatents(
        picture,
        mask.to(context.executor.device),
        _encode(context, original, masked=True),
        pure_noise=settings.first_step == 0 and settings.strength == 1,
        inpaints=base.inpaints,
    )


def _encode(context: Context, original: Original, *, masked: bool) -> LatentDistribution:
    settings = context.settings
    mask = original.mask if masked else None
    key = (
        "latents",
        context.weights.vae_key,
        original.picture.digest,
        None if mask is None else mask.digest,
        settings.width,
        settings.height,
    )
    pixels = settings.width * settings.height
    nbytes = 2 * context.base.compatibility.latent_channels * pixels // context.base.compatibility.vae_scale**2 * 4

    def make() -> LatentDistribution:
        picture = _pixels(original.picture, settings)
        return context.weights.vae.encode(picture if mask is None else picture * (_mask(mask, settings) < 0.5))

    return context.device.get(key, nbytes, make)


def _pixels(picture: Picture, settings: Settings) -> Tensor:
    """`(1, 3, H, W)` in -1…1, resized as diffusers resizes."""
    resized = Image.fromarray(picture.on_white).resize((settings.width, settings.height), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
    return pixels.view(1, settings.height, settings.width, 3).permute(0, 3, 1, 2).float() / 127.5 - 1


def _mask(picture: Picture, settings: Settings) -> Tensor:
    """`(1, 1, H, W)`, 1 where it is lighter than half; what is transparent is not covered."""
    resized = Image.fromarray(picture.on_black).resize((settings.width, settings.height), Image.Resampling.LANCZOS)
    light = torch.frombuffer(bytearray(resized.convert("L").tobytes()), dtype=torch.uint8)
    return (light.view(1, 1, settings.height, settings.width).float() / 255 >= 0.5).float()
