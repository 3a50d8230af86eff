"""Chooses the layers of a base that get factors, with rank and alpha, by name, before any weight is read.

A layer's name is the canonical one: `unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k`,
`text_encoder.text_model.encoder.layers.0.self_attn.q_proj`. A pattern is a regular expression that matches the whole
name or its end after a dot, as PEFT's rank_pattern.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from scumble.errors import InvalidRequest
from scumble_registry.formats.lora.peft import match_pattern
from scumble_trainers.methods.lora.settings import LoraSettings

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
CONVOLUTION = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_FEED_FORWARD = ("fc1", "fc2")


@dataclass(frozen=True, slots=True)
class Size:
    """Rank and alpha of one layer's factors."""

    rank: int
    alpha: float


def endings(settings: LoraSettings, component: str) -> tuple[str, ...]:
    """Return the name endings of the trained layers in `unet`, `text_encoder` or `text_encoder_2`."""
    if component == "unet":
        return (
            *ATTENTION,
            *(FEED_FORWARD if settings.feed_forward else ()),
            *(CONVOLUTION if settings.convolution else ()),
        )
    if settings.text_encoder:
        return (*TEXT_ATTENTION, *(TEXT_FEED_FORWARD if settings.feed_forward else ()))
    return ()


def choose_layers(settings: LoraSettings, names: Iterable[str]) -> dict[str, Size]:
    """Choose the trained layers among `names`, in order. Raises InvalidRequest for a pattern without a match."""
    known = sorted(names)
    skipped = unused_layer(known)
    chosen = [
        name
        for name in known
        for component, _, rest in [name.partition(".")]
        if ends_with(rest, endings(settings, component)) and not (skipped and name.startswith(skipped))
    ]
    _check_patterns(settings, chosen)
    return {name: _size(settings, name) for name in chosen}


def ends_with(name: str, ends: Iterable[str]) -> bool:
    """Return whether `name` ends with one of `ends` after a dot, PEFT's rule for target_modules."""
    return any(name == end or name.endswith(f".{end}") for end in ends)


def unused_layer(names: Iterable[str]) -> str | None:
    """Return the name prefix of SDXL's first encoder's last layer, whose output is never read."""
    known = list(names)
    if not any(name.startswith("text_encoder_2.") for name in known):
        return None
    numbers = [re.match(r"text_encoder\..*?layers\.(\d+)\.", name) for name in known]
    last = max((int(match[1]) for match in numbers if match), default=0)
    return f"text_encoder.text_model.encoder.layers.{last}."


def _size(settings: LoraSettings, name: str) -> Size:
    convolution = settings.convolution_rank if ends_with(name, CONVOLUTION) else None
    rank: int = match_pattern(settings.rank_pattern, name, convolution or settings.rank)
    alpha: float = match_pattern(settings.alpha_pattern, name, settings.alpha or rank)
    return Size(rank, float(alpha))


def _check_patterns(settings: LoraSettings, names: list[str]) -> None:
    if settings.convolution_rank is not None and not settings.convolution:
        raise InvalidRequest("--convolution-rank needs --convolution", field="convolution_rank")
    tables: Mapping[str, Mapping[str, float]] = {
        "rank_pattern": settings.rank_pattern,
        "alpha_pattern": settings.alpha_pattern,
    }
    for field, table in tables.items():
        for pattern in table:
            option = f"--{field.replace('_', '-')} {pattern!r}"
            try:
                matches = any(match_pattern({pattern: True}, name, default=False) for name in names)
            except re.error as error:
                raise InvalidRequest(f"{option} is not a regular expression: {error}", field=field) from error
            if not matches:
                raise InvalidRequest(
                    f"{option} matches none of the {len(names)} trained layers, such as {names[0]}: it must match a "
                    "whole name, or the end of one after a dot",
                    field=field,
                )
