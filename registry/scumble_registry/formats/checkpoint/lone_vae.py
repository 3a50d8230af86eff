"""Convert a VAE's weights alone, by diffusers' or the original names, to a folder of an AutoencoderKL.

Weights do not determine the config (above all the latents' scaling factor), so it is copied from the VAE of the folder
that the publisher names (`Hints.like`).
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
"""Tensors that only training needs."""
_MARKS = {"decoder.up.0.block.0.conv1.weight": "original", "decoder.up_blocks.0.resnets.0.conv1.weight": "diffusers"}
_STRUCTURE = {"block_out_channels": [64], "layers_per_block": 1, "latent_channels": 4}
"""Fields of a config that the shapes determine → diffusers' default."""


def layout_of(source: Source) -> str | None:
    """Return `original` or `diffusers` by the names of a VAE's weights; None with a config, or for other weights."""
    weights = list(source.weights().values())
    if len(weights) != 1 or {"config.json", "model_index.json"} & source.files.keys():
        return None
    names = {_PREFIX.sub("", name) for name in read_header(weights[0]).tensors}
    return next((layout for mark, layout in _MARKS.items() if mark in names), None)


def in_folder(source: Source, layout: str) -> Unpacked:
    """Write config and weights into `source.work`.

    Raises Refused without `Hints.like` or with a VAE of another structure, and for unknown keys.
    """
    if source.hints.like is None:
        raise Refused(
            "a VAE's weights do not contain the scaling factor of its latents: name a folder in the diffusers layout, "
            "or a base, whose VAE it can replace: --like DIR or REF"
        )
    (file,) = source.weights().values()
    header = read_header(file)
    tensors = {_PREFIX.sub("", name): values for name, values in read_tensors(file, header).items()}
    known = {name: values for name, values in tensors.items() if not _UNUSED.fullmatch(name)}
    converted, unknown = convert(known) if layout == "original" else (known, [])
    leftover = leave_out(source, unknown, "in a VAE in the original layout")
    config: dict[str, Any] = json.loads((source.hints.like() / "vae/config.json").read_text(encoding="utf-8"))
    derived = configs.vae_config({name: values.shape for name, values in converted.items()}, "sd1", "epsilon")
    for key, default in _STRUCTURE.items():
        if config.get(key, default) != derived[key]:
            raise Refused(
                f"the VAE has {key} {derived[key]}, but the VAE of --like has {config.get(key, default)}; name one of "
                "the same architecture"
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
