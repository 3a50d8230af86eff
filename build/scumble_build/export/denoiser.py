"""The denoiser's graphs; each takes all inputs of the one before it.

| graph  | inputs besides text |
|--------|---------------------------|
| bare   | nothing |
| small  | factors over the small layout |
| guided | and pictures' keys and values, ControlNet's residuals, T2I-Adapters' features |
| full   | and factors over the full layout, DoRA's stretch of output channels |
| every  | and DoRA's stretch of input channels, for which each product with W is computed twice |

A batch runs in the first of them that has all inputs it needs. The others are fed as zeros: one group of one image
token with a scale of 0, residuals and features of 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from scumble_build.export.graph import Graph
from scumble_build.export.manifest import FLOAT, Axis, DType, FactorLayout, Port, Precision
from scumble_build.export.ports import (
    HEIGHT,
    MASK,
    ROWS,
    SIZES,
    TIMESTEP,
    TOKENS,
    WIDTH,
    factor_axes,
    factor_ports,
    kv_port,
    kv_width,
    take_factors,
)
from scumble_build.graphs.adapted import Factors
from scumble_build.graphs.denoiser import Denoiser, KVSlice
from scumble_build.graphs.includes import Include
from scumble_build.graphs.inputs import ImageInputs, StepInputs

_GUIDED: tuple[Include, ...] = ("factors", "images", "residuals", "features")
GRAPHS: Mapping[str, tuple[Include, ...]] = {
    "bare": (),
    "small": ("factors",),
    "guided": _GUIDED,
    "full": (*_GUIDED, "full", "stretch_out"),
    "every": (*_GUIDED, "full", "stretch_out", "stretch_in"),
}
"""From the cheapest to the one that serves every batch."""

IMAGE_AXES = {
    "groups": Axis(min=1, opt=1, max=8, about="Groups of pictures, each with a softmax of its own."),
    "image_tokens": Axis(min=1, opt=16, max=1028, about="Tokens of the longest group."),
    "positions": Axis(min=1, opt=0, max=1 << 20, about="Positions of the hidden states, flat over the UNet's levels."),
}


def graph_for(needs: AbstractSet[Include]) -> str:
    """Return the cheapest graph that has all inputs of `needs`."""
    return next(name for name, includes in GRAPHS.items() if needs <= set(includes))


def denoiser_graph(
    which: str,
    denoiser: Denoiser,
    slices: list[KVSlice],
    parameters: Mapping[str, Tensor],
    precision: Precision,
    kept_in_fp32: tuple[str, ...],
) -> Graph:
    """Make one of GRAPHS around a denoiser whose weights are in `precision`."""
    includes, dtype = GRAPHS[which], FLOAT[precision]
    layout = FactorLayout.of(denoiser.layout, full="full" in includes) if "factors" in includes else None
    module = _Denoiser(denoiser, includes, layout)
    inputs = _inputs(denoiser, slices, includes, layout, dtype)
    named = {dim for port in inputs for dim in port.dims if isinstance(dim, str)}
    axes = {"rows": ROWS, "tokens": TOKENS, "height": HEIGHT, "width": WIDTH, **factor_axes(layout), **IMAGE_AXES}
    axes = {name: axis for name, axis in axes.items() if name in named} | level_axes(denoiser.levels, named)
    out = Port(
        name="prediction",
        dtype="float32",
        dims=("rows", int(_unet(denoiser).config.out_channels), "height", "width"),
        about="The base's prediction: noise or velocity.",
    )
    graph = Graph(
        f"unet.{which}",
        "denoiser",
        module,
        inputs,
        (out,),
        axes,
        precision,
        parameters,
        includes,
        layout,
        tuple(slices),
        denoiser.levels,
        kept_in_fp32,
    )
    return replace(graph, axes=_with_positions(graph)) if "positions" in axes else graph


class _Denoiser(nn.Module):
    """The denoiser with flat inputs, as `_inputs` lists them. What the loop keeps in float32 is float32 here too."""

    def __init__(self, denoiser: Denoiser, includes: tuple[Include, ...], layout: FactorLayout | None) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.includes = includes
        self.layout = layout
        self.sizes = _reads_sizes(denoiser)
        self.residuals = len(residual_places(denoiser)) if "residuals" in includes else 0
        self.features = len(feature_places(denoiser)) if "features" in includes else 0

    def forward(self, sample: Tensor, timestep: Tensor, kv: Tensor, kv_mask: Tensor, *more: Tensor) -> Tensor:
        rest = iter(more)
        pooled, sizes = (next(rest), next(rest)) if self.sizes else (None, None)
        factors = take_factors(rest, self.layout, self.includes) if self.layout is not None else None
        images = None
        if "images" in self.includes:
            image_kv, tokens, areas = next(rest), next(rest), next(rest)
            rows = torch.arange(1)  # not read if every row has pictures
            images = ImageInputs(rows, image_kv, tokens, torch.ones_like(areas[:, :, 0]), areas)
        residuals = tuple(next(rest) for _ in range(self.residuals)) or None
        features = tuple(next(rest) for _ in range(self.features)) or None
        inputs = StepInputs(
            kv,
            kv_mask,
            cast("Factors | None", factors),  # layers accept both types
            images,
            residuals,
            features,
            pooled=pooled,
            sizes=sizes,
        )
        prediction: Tensor = self.denoiser(sample.to(kv.dtype), timestep, inputs)
        return prediction.float()


def _inputs(
    denoiser: Denoiser,
    slices: list[KVSlice],
    includes: tuple[Include, ...],
    layout: FactorLayout | None,
    dtype: DType,
) -> tuple[Port, ...]:
    config = _unet(denoiser).config
    channels = int(config.in_channels)
    ports = [
        Port(
            name="sample",
            dtype="float32",
            dims=("rows", channels, "height", "width"),
            about="Latents, scaled for their timestep; for an inpainting base followed by mask and masked picture.",
        ),
        TIMESTEP,
        kv_port(slices, dtype),
        MASK,
    ]
    if _reads_sizes(denoiser):
        width = int(_unet(denoiser).get_submodule("add_embedding.linear_1").base.in_features)
        pooled = width - 6 * int(config.addition_time_embed_dim)
        ports += [Port(name="pooled", dtype=dtype, dims=("rows", pooled), about="The pooled text."), SIZES]
    if layout is not None:
        ports += factor_ports(layout, dtype, includes)
    if "images" in includes:
        groups: tuple[int | str, ...] = ("rows", "groups", "image_tokens")
        ports += [
            Port(name="image_kv", dtype=dtype, dims=(*groups, kv_width(slices)), about="Pictures' keys and values."),
            Port(name="image_mask", dtype="bool", dims=groups, about="True where a token is; one or more per group."),
            Port(
                name="image_scale",
                dtype=dtype,
                dims=("rows", "groups", "positions"),
                about="How strongly each group acts at each position, flat over the UNet's levels.",
            ),
        ]
    if "residuals" in includes:
        ports += _maps(
            "residual", residual_places(denoiser), dtype, "ControlNet's, per skip connection; the last: middle block"
        )
    if "features" in includes:
        ports += _maps(
            "feature", feature_places(denoiser), dtype, "T2I-Adapters', per down block; SDXL: the last: middle block"
        )
    return tuple(ports)


def _maps(name: str, places: list[tuple[int, int]], dtype: DType, about: str) -> list[Port]:
    return [
        Port(name=f"{name}_{i}", dtype=dtype, dims=("rows", channels, *level_dims(level)), about=about)
        for i, (channels, level) in enumerate(places)
    ]


def level_dims(level: int) -> tuple[str, str]:
    return (f"height_{level}", f"width_{level}") if level else ("height", "width")


def level_axes(levels: int, named: AbstractSet[str]) -> dict[str, Axis]:
    """Return the axes of heights and widths at each level of the UNet that `named` has."""
    return {
        name: _halved(side, axis, level)
        for level in range(1, levels)
        for name, side, axis in zip(level_dims(level), ("height", "width"), (HEIGHT, WIDTH), strict=True)
        if name in named
    }


def _halved(of: str, axis: Axis, level: int) -> Axis:
    least, usual, most = (-(-size // 2**level) for size in (axis.min, axis.opt, axis.max))
    return Axis(min=least, opt=usual, max=most, of=of, halvings=level, about=f"{of} at level {level} of the UNet.")


def _with_positions(graph: Graph) -> dict[str, Axis]:
    def count(end: str) -> int:
        height, width = (getattr(graph.axes[side], end) for side in ("height", "width"))
        return sum(-(-height // 2**level) * -(-width // 2**level) for level in range(graph.levels))

    changes = {end: count(end) for end in ("min", "opt", "max")}
    return {**graph.axes, "positions": graph.axes["positions"].model_copy(update=changes)}


def _unet(denoiser: Denoiser) -> Any:
    return denoiser.unet


def _reads_sizes(denoiser: Denoiser) -> bool:
    return bool(_unet(denoiser).config.addition_embed_type == "text_time")


def residual_places(denoiser: Denoiser) -> list[tuple[int, int]]:
    """Return channels and level of every skip connection, then of the middle block."""
    widths = _widths(denoiser)
    layers = [len(block.resnets) for block in _unet(denoiser).down_blocks]
    places = [(widths[0], 0)]
    for level, (width, count) in enumerate(zip(widths, layers, strict=True)):
        places += [(width, level)] * count
        if level + 1 < len(widths):
            places.append((width, level + 1))
    return [*places, (widths[-1], len(widths) - 1)]


def feature_places(denoiser: Denoiser) -> list[tuple[int, int]]:
    """Return channels and level of each down block's feature: added inside a block with attention, else after it.

    diffusers adds a remaining feature in the middle block, as SDXL's adapters have one.
    """
    widths = _widths(denoiser)
    last = len(widths) - 1
    places = [
        (width, level if hasattr(block, "attentions") else min(level + 1, last))
        for level, (width, block) in enumerate(zip(widths, _unet(denoiser).down_blocks, strict=True))
    ]
    return [*places, (widths[-1], last)] if _reads_sizes(denoiser) else places


def _widths(denoiser: Denoiser) -> list[int]:
    return [int(width) for width in _unet(denoiser).config.block_out_channels]
