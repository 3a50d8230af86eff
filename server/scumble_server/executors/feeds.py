"""Feeds of an exported graph for a batch: every input for all rows, zeros for those that the batch does not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from scumble_build.export.graph import DTYPES
from scumble_build.export.manifest import FactorLayout, Port
from scumble_build.graphs.adapted import Factors, Pages
from scumble_build.graphs.inputs import ImageInputs, StepInputs
from scumble_build.graphs.layout import PAGE
from scumble_build.graphs.text import TextInputs
from scumble_server.executors.sessions import GraphDescription


def text_feeds(inputs: TextInputs, config: Any, dtype: torch.dtype, layout: FactorLayout | None) -> dict[str, Tensor]:
    """Return the feeds of a text encoder with this config. Overrides become dense: a vector and a flag per position."""
    rows, length = inputs.tokens.shape
    vectors = torch.zeros(rows, length, config.hidden_size, dtype=dtype)
    overridden = torch.zeros(rows, length, dtype=torch.bool)
    if inputs.overrides is not None:
        index = inputs.overrides.row.cpu(), inputs.overrides.position.cpu()
        vectors[index] = inputs.overrides.vectors.to("cpu", dtype)
        overridden[index] = True
    return {
        "tokens": inputs.tokens,
        "mask": torch.ones_like(overridden) if inputs.mask is None else inputs.mask.bool(),
        "vectors": vectors,
        "overridden": overridden,
        "skip": torch.tensor([inputs.skip]),
        "pool": end_of_text(inputs.tokens, config.eos_token_id),
        **factor_feeds(inputs.factors, rows, layout),
    }


def end_of_text(tokens: Tensor, end: int) -> Tensor:
    """Return the position of the end token `(rows,)` of tokens `(rows, T)`; its state is the pooled text.

    As in transformers: 2 is a wrong id in old configs and means the largest id.
    """
    return tokens.argmax(-1) if end == 2 else (tokens == end).int().argmax(-1)


def constant_feeds(
    inputs: StepInputs, graph: GraphDescription, sample: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the feeds of a denoiser's graph that do not change from step to step: all but sample, timestep, and the
    residuals that the batch has.
    """
    rows = len(sample)
    mask = torch.ones(inputs.kv.shape[:2], dtype=torch.bool) if inputs.kv_mask is None else inputs.kv_mask
    feeds = {"kv": inputs.kv.to(dtype), "kv_mask": mask}
    if inputs.pooled is not None and inputs.sizes is not None:
        feeds |= {"pooled": inputs.pooled.to(dtype), "sizes": inputs.sizes}
    feeds |= factor_feeds(inputs.factors, rows, graph.factors)
    if "images" in graph.includes:
        feeds |= image_feeds(inputs.images, rows, inputs.kv.shape[-1], positions(graph, sample))
    if "features" in graph.includes:
        feeds |= _map_feeds("feature_", graph.inputs, inputs.features, sample)
    if inputs.residuals is None:
        feeds |= residual_feeds(graph.inputs, None, sample)
    dtypes = {port.name: DTYPES[port.dtype] for port in graph.inputs}
    return {name: tensor.to(dtypes[name]) for name, tensor in feeds.items() if name in dtypes}


def factor_feeds(factors: Factors | None, rows: int, layout: FactorLayout | None) -> dict[str, Tensor]:
    """Return the feeds for factors. Pages are not copied. Rows without factors, and the rest of the layout if no row
    has factors there, get zeros.
    """
    if layout is None:
        return {}
    scale = torch.zeros(rows, PAGE) if factors is None else pad(factors.scale, (0, 0, 0, rows - factors.rows))
    feeds = {"scale": scale.unflatten(1, (-1, PAGE))}
    feeds |= _page_feeds(None if factors is None else factors.small, feeds["scale"], layout.total_in, layout.total_out)
    if layout.rest_in:
        rest = None if factors is None else factors.rest
        of_rest = _page_feeds(rest, feeds["scale"], layout.rest_in, layout.rest_out)
        feeds |= {f"{name}_rest": tensor for name, tensor in of_rest.items()}
    for name, width in (
        ("stretch_out", layout.total_out + layout.rest_out),
        ("stretch_in", layout.total_in + layout.rest_in),
    ):
        given: Tensor | None = getattr(factors, name, None)
        feeds[name] = (
            torch.zeros(rows, width)
            if given is None
            else pad(given, (0, width - given.shape[1], 0, rows - given.shape[0]))
        )
    return feeds


def _page_feeds(pages: Pages | None, scale: Tensor, width_in: int, width_out: int) -> dict[str, Tensor]:
    """Return the feeds for the pages of one part of the layout; scale `(rows, n, PAGE)` has the number of rows and
    pages.
    """
    rows, count, page = scale.shape
    if pages is None:
        A, B = torch.zeros(1, page * width_in), torch.zeros(1, page * width_out)
        return {"A": A, "B": B, "pages": torch.zeros(rows, count, dtype=torch.int64)}
    return {"A": pages.A, "B": pages.B, "pages": pad(pages.table, (0, 0, 0, rows - len(pages.table)))}


def image_feeds(images: ImageInputs | None, rows: int, width: int, positions: int) -> dict[str, Tensor]:
    """Return the feeds for pictures. A row without pictures gets one token of zeros per group and a scale of 0."""
    groups, length = images.kv.shape[1:3] if images is not None else (1, 1)
    kv = torch.zeros(rows, groups, length, width)
    mask = torch.zeros(rows, groups, length, dtype=torch.bool)
    mask[:, :, 0] = True  # a softmax over nothing would be NaN
    scale = torch.zeros(rows, groups, positions)
    if images is not None:
        kv = kv.to(images.kv).index_copy(0, images.rows, images.kv)
        tokens = torch.ones(images.kv.shape[:3], dtype=torch.bool) if images.tokens is None else images.tokens
        mask = mask.to(kv.device).index_copy(0, images.rows, tokens.to(kv.device))
        own = images.scale[..., None].expand(-1, -1, positions)
        own = own if images.areas is None else own * images.areas
        scale = scale.to(own).index_copy(0, images.rows, own)
    return {"image_kv": kv, "image_mask": mask, "image_scale": scale}


def residual_feeds(inputs: Sequence[Port], residuals: Sequence[Tensor] | None, sample: Tensor) -> dict[str, Tensor]:
    """Return the feeds for ControlNets' residuals; zeros for those that are not given."""
    return _map_feeds("residual_", inputs, residuals, sample)


def _map_feeds(
    prefix: str, inputs: Sequence[Port], given: Sequence[Tensor] | None, sample: Tensor
) -> dict[str, Tensor]:
    """Return feeds for the inputs of this prefix, in order: the given maps, then zeros."""
    ports = [port for port in inputs if port.name.startswith(prefix)]
    present = list(given or ())
    maps = present + [_zero_map(port, sample) for port in ports[len(present) :]]
    return {port.name: tensor for port, tensor in zip(ports, maps, strict=True)}


def _zero_map(port: Port, sample: Tensor) -> Tensor:
    """Return zeros `(rows, C, h, w)` for a port, at the level in its dims (`height_2`: a quarter of the sample's)."""
    _, channels, height, _ = port.dims
    step = 2 ** (int(str(height).partition("_")[2] or 0))
    sides = [-(-side // step) for side in sample.shape[2:]]
    return torch.zeros(len(sample), int(channels), *sides, dtype=DTYPES[port.dtype])


def positions(graph: GraphDescription, sample: Tensor) -> int:
    """Count the positions of the hidden states over all levels of the UNet: the axis `positions` of
    `export.manifest`.
    """
    height, width = sample.shape[2:]
    return sum(-(-height // 2**level) * -(-width // 2**level) for level in range(graph.levels))
