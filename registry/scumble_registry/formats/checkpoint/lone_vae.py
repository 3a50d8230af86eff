"""A VAE's weights alone, by diffusers' names or by the original ones, which become a folder of an AutoencoderKL.

What a config says (the scale of latents above all) no weights show, so it is that of the VAE that the publisher says
they can stand for (`Hints.like`).
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

from pydantic import JsonValue

from scumble.errors import Refused
from scumble_registry.formats.checkpoint import configs
from scumble_registry.formats.checkpoint.vae import convert
from scumble_registry.formats.safetensors_header import read_header, read_tensors, write_file
from scumble_registry.formats.source import Source, Unpacked
from scumble_registry.formats.unknown_keys import leave_out

FILE_NAME = "diffusion_pytorch_model.safetensors"
_PREFIX = re.compile(r"^(?:state_dict\.)?(?:first_stage_model\.)?")
_UNUSED = re.compile(r"(?:loss|model_ema|optimizer_states|lr_schedulers|callbacks)\b.*")
"""What only training needs."""
_MARKS = {"decoder.up.0.block.0.conv1.weight": "original", "decoder.up_blocks.0.resnets.0.conv1.weight": "diffusers"}
_STRUCTURE = {"block_out_channels": [64], "layers_per_block": 1, "latent_channels": 4}
"""What shapes tell of a config, and what it is where a config leaves it out."""


def layout_of(source: Source) -> str | None:
    """Whose names the weights have, if they are a VAE's and no config stands beside them."""
    weights = list(source.weights().values())
    if len(weights) != 1 or {"config.json", "model_index.json"} & source.files.keys():
        return None
    names = {_PREFIX.sub("", name) for name in read_header(weights[0]).tensors}
    return next((layout for mark, layout in _MARKS.items() if mark in names), None)


def in_folder(source: Source, layout: str) -> Unpacked:
    """Raises Refused where no VAE is named that it is like, or one of another structure; and for what is left over."""
    if source.hints.like is None:
        raise Refused(
            "a VAE's weights do not say the scale of its latents: name the folder in the diffusers layout, or the "
            "base, whose VAE it can stand for, --like DIR or REF"
        )
    (file,) = source.weights().values()
    header = read_header(file)
    tensors = {_PREFIX.sub("", name): values for name, values in read_tensors(file, header).items()}
    known = {name: values for name, values in tensors.items() if not _UNUSED.fullmatch(name)}
    converted, unknown = convert(known) if layout == "original" else (known, [])
    leftover = leave_out(source, unknown, "in a VAE in the original layout")
    config: dict[str, Any] = json.loads((source.hints.like() / "vae/config.json").read_text(encoding="utf-8"))
    told = configs.vae_config({name: values.shape for name, values in converted.items()}, "sd1", "epsilon")
    for key, default in _STRUCTURE.items():
        if config.get(key, default) != told[key]:
            raise Refused(
                f"the VAE has {key} {told[key]}, the one that it is said to be like {config.get(key, default)}; name "
                "one of its own kind"
            )
    assert source.work is not None
    folder = source.work / "vae"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    write_file(folder / FILE_NAME, converted, {"format": "pt"})
    files = {name: folder / name for name in ("config.json", FILE_NAME)}
    unused = list[JsonValue](sorted(tensors.keys() - known.keys()))
    whole = replace(source, path=folder, files=files)
    return Unpacked(whole, {"unused": unused}, leftover, f"weights alone ({layout})")
