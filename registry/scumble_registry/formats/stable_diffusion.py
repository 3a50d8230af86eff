"""Modules of the original Stable Diffusion 1.x, 2.x and XL, by name and shape: for files that are published without a
base and whose module names cannot be resolved without one.

Bases of other sizes (small ones, inpainting ones) are read from their own files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from scumble_registry.compatibility import BaseCompatibility, Family, Shape

_TIME = 1280


@dataclass(frozen=True, slots=True)
class _Text:
    name: str
    layers: int
    width: int
    projection: bool = False


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Sizes of a family. `depths` are transformer blocks for each down level, 0 where a level has no attention."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    context: int
    texts: tuple[_Text, ...]
    side: int
    added: int = 0


_SD_WIDTHS, _SD_DEPTHS = (320, 640, 1280, 1280), (1, 1, 1, 0)
_SIZES: dict[Family, _Sizes] = {
    "sd1": _Sizes(_SD_WIDTHS, _SD_DEPTHS, 768, (_Text("text_encoder", 12, 768),), 64),
    "sd2": _Sizes(_SD_WIDTHS, _SD_DEPTHS, 1024, (_Text("text_encoder", 23, 1024),), 96),
    "sdxl": _Sizes(
        (320, 640, 1280),
        (0, 2, 10),
        2048,
        (_Text("text_encoder", 12, 768), _Text("text_encoder_2", 32, 1280, projection=True)),
        128,
        2816,
    ),
}
FAMILIES: tuple[Family, ...] = ("sd1", "sd2", "sdxl")


@cache
def stable_diffusion(family: Family) -> BaseCompatibility:
    sizes = _SIZES[family]
    targets = {f"unet.{name}": shape for name, shape in _unet(sizes)}
    for text in sizes.texts:
        targets |= {f"{text.name}.{name}": shape for name, shape in _text(text)}
    return BaseCompatibility(
        family=family,
        prediction_type="epsilon",
        in_channels=4,
        latent_channels=4,
        sample_size=sizes.side,
        vae_scale=8,
        cross_attention_dim=sizes.context,
        text_widths=tuple(text.width for text in sizes.texts),
        targets=targets,
    )


def _unet(sizes: _Sizes) -> Iterator[tuple[str, Shape]]:
    first, last = sizes.widths[0], sizes.widths[-1]
    yield "conv_in", (first, 4, 3, 3)
    yield "conv_out", (4, first, 3, 3)
    yield from _embedding("time_embedding", first)
    if sizes.added:
        yield from _embedding("add_embedding", sizes.added)
    yield from _down(sizes)
    for i in range(2):
        yield from _resnet(f"mid_block.resnets.{i}", last, last)
    yield from _attention("mid_block.attentions.0", last, sizes.depths[-1] or 1, sizes.context)
    yield from _up(sizes)


def _embedding(name: str, into: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.linear_1", (_TIME, into)
    yield f"{name}.linear_2", (_TIME, _TIME)


def _down(sizes: _Sizes) -> Iterator[tuple[str, Shape]]:
    before = sizes.widths[0]
    for level, (width, depth) in enumerate(zip(sizes.widths, sizes.depths, strict=True)):
        block = f"down_blocks.{level}"
        for i in range(2):
            yield from _resnet(f"{block}.resnets.{i}", before if i == 0 else width, width)
            if depth:
                yield from _attention(f"{block}.attentions.{i}", width, depth, sizes.context)
        if level < len(sizes.widths) - 1:
            yield f"{block}.downsamplers.0.conv", (width, width, 3, 3)
        before = width


def _up(sizes: _Sizes) -> Iterator[tuple[str, Shape]]:
    """Yield the up blocks: three resnets a level, each of which also reads a skip connection."""
    widths, depths = sizes.widths[::-1], sizes.depths[::-1]
    before = widths[0]
    for level, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        block, below = f"up_blocks.{level}", widths[min(level + 1, len(widths) - 1)]
        for i in range(3):
            into = (before if i == 0 else width) + (below if i == 2 else width)
            yield from _resnet(f"{block}.resnets.{i}", into, width)
            if depth:
                yield from _attention(f"{block}.attentions.{i}", width, depth, sizes.context)
        if level < len(widths) - 1:
            yield f"{block}.upsamplers.0.conv", (width, width, 3, 3)
        before = width


def _resnet(name: str, into: int, out: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.conv1", (out, into, 3, 3)
    yield f"{name}.time_emb_proj", (out, _TIME)
    yield f"{name}.conv2", (out, out, 3, 3)
    if into != out:
        yield f"{name}.conv_shortcut", (out, into, 1, 1)


def _attention(name: str, width: int, depth: int, context: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.proj_in", (width, width)
    yield f"{name}.proj_out", (width, width)
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        for which, into in (("attn1", width), ("attn2", context)):
            yield f"{block}.{which}.to_q", (width, width)
            yield f"{block}.{which}.to_k", (width, into)
            yield f"{block}.{which}.to_v", (width, into)
            yield f"{block}.{which}.to_out.0", (width, width)
        yield f"{block}.ff.net.0.proj", (8 * width, width)
        yield f"{block}.ff.net.2", (width, 4 * width)


def _text(text: _Text) -> Iterator[tuple[str, Shape]]:
    for i in range(text.layers):
        layer = f"text_model.encoder.layers.{i}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{layer}.self_attn.{projection}", (text.width, text.width)
        yield f"{layer}.mlp.fc1", (4 * text.width, text.width)
        yield f"{layer}.mlp.fc2", (text.width, 4 * text.width)
    if text.projection:
        yield "text_projection", (text.width, text.width)
