"""A VAE, which turns latents into pixels and back, for requests that use another VAE than their base's.

A folder as `AutoencoderKL.save_pretrained` writes it: `config.json` and `diffusion_pytorch_model.safetensors`. Or its
weights alone, in diffusers' layout or the original one (`checkpoint/lone_vae.py`).
"""

from __future__ import annotations

from math import prod
from typing import Any

from scumble.errors import InvalidRequest, Refused
from scumble_registry.compatibility import BaseCompatibility, VaeCompatibility, vae_scale
from scumble_registry.formats.checkpoint import lone_vae
from scumble_registry.formats.checkpoint.lone_vae import FILE_NAME
from scumble_registry.formats.floats import check_finite
from scumble_registry.formats.format import Format
from scumble_registry.formats.safetensors_header import read_header, read_tensors
from scumble_registry.formats.source import Draft, Source, Unpacked, check_plain
from scumble_registry.formats.whole import only_whole

KIND = "vae"


def recognises(source: Source) -> bool:
    if "config.json" in source.files:
        return _config(source).get("_class_name") == "AutoencoderKL"
    return lone_vae.layout_of(source) is not None


def read(source: Source, base: BaseCompatibility | None) -> Draft:
    """Read a VAE. Raises InvalidRequest, and Refused where weights and config disagree."""
    if base is not None:
        raise InvalidRequest("a VAE is published for no base: leave --base out", field="base")
    layout = lone_vae.layout_of(source)
    whole = lone_vae.in_folder(source, layout) if layout else Unpacked(source, dialect="diffusers")
    source = whole.source
    check_plain(source)
    if FILE_NAME not in source.files:
        raise Refused(f"the VAE lacks {FILE_NAME}; save it with diffusers, in one file")
    header = read_header(source.files[FILE_NAME])
    check_finite(read_tensors(source.files[FILE_NAME], header))
    tensors = header.tensors
    config = _config(source)
    conv_in = tensors.get("decoder.conv_in.weight")
    channels = conv_in.shape[1] if conv_in is not None and len(conv_in.shape) == 4 else 0
    if channels != config.get("latent_channels", 4):
        raise Refused(
            f"config.json has latent_channels = {config.get('latent_channels', 4)!r}, but the weights have {channels}"
        )
    complete = only_whole(source, {"": "AutoencoderKL"}, "the VAE")
    tensors = read_header(complete.source.files[FILE_NAME]).tensors
    return Draft(
        complete.source.files,
        VaeCompatibility(
            latent_channels=channels,
            scale=vae_scale(config),
            parameters=sum(prod(info.shape) for info in tensors.values()),
            float32=bool(
                config.get("force_upcast")
            ),  # SDXL's configs set it; diffusers' pipelines take false where it is missing
        ),
        dialect=whole.dialect,
        details={"serving": "decodes and encodes images", **whole.details},
        leftover=tuple(sorted({*whole.leftover, *complete.leftover})),
    )


def _config(source: Source) -> dict[str, Any]:
    config = source.json("config.json")
    return config if isinstance(config, dict) else {}


FORMAT = Format(KIND, "a folder with an AutoencoderKL, or its weights alone", recognises, read)
