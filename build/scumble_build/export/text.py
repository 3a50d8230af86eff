"""The graphs of a text encoder, and of the projection of its states to cross-attention's keys and values.

Overrides are dense here: a vector for every position, and a mask that says which are used. So no input of the graph can
have size zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scumble_build.export.graph import Graph
from scumble_build.export.manifest import FLOAT, Axis, FactorLayout, GraphPart, Port, Precision
from scumble_build.export.ports import ROWS, TOKENS, factor_axes, factor_ports, kv_port, take_factors
from scumble_build.graphs.denoiser import KVProjection, added_mask
from scumble_build.graphs.includes import Include
from scumble_build.graphs.text import TextEncoder

_STRETCHED: tuple[Include, ...] = ("factors", "stretch_out", "stretch_in")


@dataclass(frozen=True, slots=True)
class DenseOverrides:
    """Overrides as vectors `(rows, T, C)`, used where `overridden` `(rows, T)` is True."""

    vectors: Tensor
    overridden: Tensor

    def within(self, embeddings: Tensor) -> Tensor:
        return torch.where(self.overridden[..., None], self.vectors, embeddings)


def text_graph(
    part: GraphPart, encoder: TextEncoder, parameters: Mapping[str, Tensor], precision: Precision, kept: tuple[str, ...]
) -> Graph:
    dtype = FLOAT[precision]
    config: Any = encoder.model.config
    layout = FactorLayout.of(encoder.layout, full=True)
    length, width = int(config.max_position_embeddings), int(config.hidden_size)
    projects = hasattr(encoder.model, "text_projection")
    inputs = (
        Port(name="tokens", dtype="int64", dims=("rows", length), about="Token ids."),
        Port(name="mask", dtype="bool", dims=("rows", length), about="False where a token is not visible."),
        Port(
            name="vectors",
            dtype=dtype,
            dims=("rows", length, width),
            about="Overriding embeddings, at their positions.",
        ),
        Port(
            name="overridden",
            dtype="bool",
            dims=("rows", length),
            about="True where `vectors` replace the token's embedding.",
        ),
        Port(name="skip", dtype="int64", dims=(1,), about="How many of the last layers are skipped."),
        Port(name="pool", dtype="int64", dims=("rows",), about="Position of the state that becomes the pooled text."),
        *factor_ports(layout, dtype, _STRETCHED),
    )
    inputs = inputs if projects else tuple(port for port in inputs if port.name != "pool")
    outputs = [
        Port(name="states", dtype=dtype, dims=("rows", length, width), about="The text states that the UNet reads.")
    ]
    if projects:
        outputs.append(
            Port(
                name="pooled",
                dtype=dtype,
                dims=("rows", int(config.projection_dim)),
                about="One vector for the whole text.",
            )
        )
    axes = {"rows": ROWS, **factor_axes(layout)}
    module = _Text(encoder, layout, projects=projects)
    return Graph(
        part, part, module, inputs, tuple(outputs), axes, precision, parameters, _STRETCHED, layout, kept_in_fp32=kept
    )


class _Text(nn.Module):
    def __init__(self, encoder: TextEncoder, layout: FactorLayout, *, projects: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.layout = layout
        self.projects = projects

    def forward(
        self, tokens: Tensor, mask: Tensor, vectors: Tensor, overridden: Tensor, skip: Tensor, *more: Tensor
    ) -> tuple[Tensor, ...]:
        rest = iter(more)
        pool = next(rest) if self.projects else None
        self.encoder.source.factors = take_factors(rest, self.layout, _STRETCHED)
        self.encoder.override_input.overrides = DenseOverrides(vectors, overridden)
        tower: nn.Module = self.encoder.tower
        states = tower.get_submodule("embeddings")(tokens)
        length = tokens.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None] & mask[:, None, None]
        every = [states]
        added = added_mask(seen, states.dtype)
        for layer in tower.get_submodule("encoder.layers").children():
            states = layer(states, added)
            every.append(states)
        # The layers to choose from, the last first.
        last = len(every) - 1 - self.encoder.penultimate
        chosen = torch.stack(every[last::-1]).index_select(0, skip)[0]
        output = chosen if self.encoder.penultimate else self.encoder.norm(chosen)
        if pool is None:
            return (output,)
        whole = self.encoder.norm(every[-1])
        index = pool[:, None, None].expand(-1, 1, whole.shape[-1])
        pooled = self.encoder.model.get_submodule("text_projection")(whole.gather(1, index)[:, 0])
        return output, pooled


def projection_graph(projection: KVProjection, parameters: Mapping[str, Tensor], precision: Precision) -> Graph:
    dtype = FLOAT[precision]
    layout = FactorLayout.of(projection.layout, full=True)
    (width,) = {target.fan_in for target in layout.targets}
    text: tuple[int | str, ...] = ("rows", "tokens", width)
    inputs = (
        Port(
            name="states",
            dtype=dtype,
            dims=text,
            about="States of the text encoders, concatenated; keys are projected from them.",
        ),
        Port(
            name="of_values",
            dtype=dtype,
            dims=text,
            about="States that values are projected from; equal to `states` without hypernetworks.",
        ),
        *factor_ports(layout, dtype, _STRETCHED),
    )
    axes: dict[str, Axis] = {"rows": ROWS, "tokens": TOKENS, **factor_axes(layout)}
    outputs = (kv_port(projection.slices, dtype),)
    module = _Projection(projection, layout)
    kv = tuple(projection.slices)
    return Graph(
        "kv_projection", "kv_projection", module, inputs, outputs, axes, precision, parameters, _STRETCHED, layout, kv
    )


class _Projection(nn.Module):
    def __init__(self, projection: KVProjection, layout: FactorLayout) -> None:
        super().__init__()
        self.projection = projection
        self.layout = layout

    def forward(self, states: Tensor, of_values: Tensor, *more: Tensor) -> Tensor:
        kv: Tensor = self.projection(states, take_factors(iter(more), self.layout, _STRETCHED), of_values)
        return kv
