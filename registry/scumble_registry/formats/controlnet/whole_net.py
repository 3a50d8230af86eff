"""Compare a net with its config, or, in the original layout, which has none, with the encoder of its base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from scumble_registry.compatibility import Shape
from scumble_registry.formats import structure
from scumble_registry.formats.controlnet.conversion import Converted
from scumble_registry.formats.controlnet.derive import CLASSES
from scumble_registry.formats.controlnet.inferred_config import EMBEDDING, embedding_widths, net_config
from scumble_registry.formats.controlnet.weights import is_difference, is_own, names_of, shapes_of
from scumble_registry.formats.safetensors_header import Header, read_header
from scumble_registry.formats.source import Source
from scumble_registry.formats.structure import Mismatch, ModelClass
from scumble_registry.formats.whole import write_without

_HEADS = {"attention_head_dim": 1, "norm_num_groups": 1}
"""Fields that change no shape, with values that suit every width."""


def only_whole_net(source: Source, converted: Converted) -> Converted:
    """Return the net, without unknown tensors if the publisher allows that.

    Raises Refused, naming missing, unknown and misshapen tensors, and Unavailable without diffusers.
    """
    header = read_header(converted.file)
    mismatch = _of_config(converted.config, header) if converted.config is not None else _of_base(source, header)
    if mismatch.unknown and source.allow_leftover:
        assert source.work is not None
        ours = {new: old for old, new in names_of(header).items()}
        leftover = [ours.get(name, name) for name in mismatch.unknown]
        file = write_without(converted.file, leftover, source.work / "whole_net.safetensors")
        converted = replace(converted, file=file, leftover=tuple(sorted({*converted.leftover, *leftover})))
        mismatch = replace(mismatch, unknown=())
    mismatch.refuse("the net")
    return converted


def _of_config(config: Mapping[str, Any], header: Header) -> Mismatch:
    shapes = {name: info.shape for name, info in header.tensors.items()}
    name = str(config["_class_name"])
    return structure.compare(cast("ModelClass", name) if name in CLASSES else "ControlNetModel", config, shapes)


def _of_base(source: Source, header: Header) -> Mismatch:
    shapes = shapes_of(header)
    if source.base_folder is None and is_difference(header):
        return Mismatch()  # what it lacks is its base's, which is not known yet
    mismatch = structure.compare_shapes(_described(source, shapes), shapes)
    if is_difference(header):
        return replace(mismatch, missing=tuple(name for name in mismatch.missing if is_own(name)))
    return mismatch


def _described(source: Source, shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
    most = structure.most_of(shapes)
    if source.base_folder is None:
        config = net_config(shapes, None, pools=False, heads=_HEADS)
        return structure.described("ControlNetModel", json.dumps(config), most)
    unet = json.loads((source.base_folder() / "unet/config.json").read_text(encoding="utf-8"))
    channels = shapes.get(f"{EMBEDDING}conv_in.weight", (0, 0))[1]
    return structure.described_net(unet, embedding_widths(shapes), channels, most)
