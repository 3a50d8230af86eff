"""An image encoder: CLIP's vision tower with its projection, for the IP-Adapters that name it.

A folder as `CLIPVisionModelWithProjection.save_pretrained` writes it: `config.json`, `model.safetensors` and, if its
preprocessing differs from CLIP's, `preprocessor_config.json`. One encoder serves many adapters.
"""

from __future__ import annotations

import math
from typing import Any

from scumble.errors import InvalidRequest, Refused
from scumble_registry.compatibility import BaseCompatibility, ImageEncoderCompatibility
from scumble_registry.formats.floats import check_finite
from scumble_registry.formats.format import Format
from scumble_registry.formats.safetensors_header import Header, read_header, read_tensors
from scumble_registry.formats.source import Draft, Source, check_plain
from scumble_registry.formats.whole import only_whole

KIND = "image_encoder"
FOLDER = "image_encoder/"
"""The folder of an IP-Adapter's own encoder, beside its file."""
_MODEL_TYPE = "clip_vision_model"
_DEFAULTS = {"hidden_size": 768, "projection_dim": 512, "image_size": 224, "patch_size": 32}
"""transformers' defaults for fields that a config leaves out."""


def recognises(source: Source) -> bool:
    return has_config(source, "")


def has_config(source: Source, prefix: str) -> bool:
    """Return whether `prefix + config.json` is an image encoder's."""
    return f"{prefix}config.json" in source.files and _config(source, prefix).get("model_type") == _MODEL_TYPE


def read(source: Source, base: BaseCompatibility | None) -> Draft:
    if base is not None:
        raise InvalidRequest("an image encoder is published for no base: leave --base out", field="base")
    check_plain(source)
    compatibility = inspect(source, "")
    whole = only_whole(source, {"": "CLIPVisionModelWithProjection"}, "the image encoder")
    return Draft(whole.source.files, compatibility, leftover=whole.leftover)


def inspect(source: Source, prefix: str) -> ImageEncoderCompatibility:
    """Derive the compatibility of the encoder whose files are `prefix + name`.

    Raises Refused where weights and config disagree.
    """
    config = _config(source, prefix)
    if config.get("model_type") != _MODEL_TYPE:
        raise Refused(
            f"{prefix}config.json has model_type {config.get('model_type')!r}; an image encoder is a "
            "CLIPVisionModelWithProjection (clip_vision_model)"
        )
    file = source.files.get(f"{prefix}model.safetensors")
    if file is None:
        raise Refused(f"the image encoder lacks {prefix}model.safetensors; save it with safe_serialization=True")
    header = read_header(file)
    check_finite(read_tensors(file, header))
    sizes = _sizes(header)
    for name, value in sizes.items():
        stated = config.get(name, _DEFAULTS[name])
        if stated != value:
            raise Refused(f"{prefix}config.json has {name} = {stated}, but the weights have {value}; fix the config")
    _check_preparation(source, f"{prefix}preprocessor_config.json", sizes["image_size"])
    return ImageEncoderCompatibility.model_validate(sizes)


def _sizes(header: Header) -> dict[str, int]:
    """Derive the sizes from the weights: `patch_embedding` (C, 3, p, p), `position_embedding` (1 + (S/p)², C)."""
    ends = {"visual_projection.weight": 2, "patch_embedding.weight": 4, "position_embedding.weight": 2}
    shapes: dict[str, tuple[int, ...]] = {}
    for end, dimensions in ends.items():
        matching = [info.shape for name, info in header.tensors.items() if name.endswith(end)]
        if len(matching) != 1 or len(matching[0]) != dimensions:
            raise Refused(f"the image encoder has no {end}; it is no CLIPVisionModelWithProjection")
        shapes[end] = matching[0]
    projection, hidden = shapes["visual_projection.weight"]
    patch = shapes["patch_embedding.weight"][2]
    side = math.isqrt(max(shapes["position_embedding.weight"][0] - 1, 0))
    return {"hidden_size": hidden, "projection_dim": projection, "image_size": side * patch, "patch_size": patch}


def _check_preparation(source: Source, name: str, image_size: int) -> None:
    if name not in source.files:
        return
    given = source.json(name)
    crop = given.get("crop_size", image_size) if isinstance(given, dict) else None
    sides = set(crop.values()) if isinstance(crop, dict) else {crop}
    if sides != {image_size}:
        raise Refused(f"{name} crops images to {crop!r}, but the image encoder reads {image_size}x{image_size}")


def _config(source: Source, prefix: str) -> dict[str, Any]:
    config = source.json(f"{prefix}config.json")
    return config if isinstance(config, dict) else {}


FORMAT = Format(KIND, "a folder with CLIP's vision tower", recognises, read, has_sampling=False)
