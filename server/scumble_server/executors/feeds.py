"""A batch's inputs as exported graphs take them: for all rows, and zeros for what a batch does not bring."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from scumble_build.export.graph import DTYPES
from scumble_build.export.manifest import FactorLayout, Port
from scumble_build.graphs.adapted import Factors, Pages
from scumble_build.graphs.inputs import ImageInputs
from scumble_build.graphs.layout import PAGE
from scumble_server.executors.sessions import AboutGraph


def pooled_place(tokens: Tensor, end: int) -> Tensor:
    """Where a text ends: as transformers finds it, which for files that say 2 is the largest id."""
    return tokens.argmax(-1) if end == 2 else (tokens == end).int().argmax(-1)


def factor_feeds(factors: Factors | None, rows: int, layout: FactorLayout | None) -> dict[str, Tensor]:
    """For all rows: behind those that have factors, and where the layout is larger, zeros. Pages are read where they
    are.
    """
    if layout is None:
        return {}
    scale = torch.zeros(rows, PAGE) if factors is None else pad(factors.scale, (0, 0, 0, rows - factors.rows))
    found = {"scale": scale.unflatten(1, (-1, PAGE))}
    found |= _page_feeds(None if factors is None else factors.small, found["scale"], layout.total_in, layout.total_out)
    if layout.rest_in:
        rest = None if factors is None else factors.rest
        of_rest = _page_feeds(rest, found["scale"], layout.rest_in, layout.rest_out)
        found |= {f"{name}_rest": tensor for name, tensor in of_rest.items()}
    for name, width in (
        ("stretch_out", layout.total_out + layout.rest_out),
        ("stretch_in", layout.total_in + layout.rest_in),
    ):
        given: Tensor | None = getattr(factors, name, None)
        found[name] = (
            torch.zeros(rows, width)
            if given is None
            else pad(given, (0, width - given.shape[1], 0, rows - given.shape[0]))
        )
    return found


def _page_feeds(pages: Pages | None, scale: Tensor, width_in: int, width_out: int) -> dict[str, Tensor]:
    """`scale` (rows, n, PAGE) says for how many rows and pages."""
    rows, count, page = scale.shape
    if pages is None:
        A, B = torch.zeros(1, page * width_in), torch.zeros(1, page * width_out)
        return {"A": A, "B": B, "pages": torch.zeros(rows, count, dtype=torch.int64)}
    return {"A": pages.A, "B": pages.B, "pages": pad(pages.table, (0, 0, 0, rows - len(pages.table)))}


def image_feeds(images: ImageInputs | None, rows: int, width: int, positions: int) -> dict[str, Tensor]:
    """For all rows: one without images has a token of zeros in each group, and a scale of 0."""
    groups, length = images.kv.shape[1:3] if images is not None else (1, 1)
    kv = torch.zeros(rows, groups, length, width)
    mask = torch.zeros(rows, groups, length, dtype=torch.bool)
    mask[:, :, 0] = True  # a softmax over nothing would be NaN
    scale = torch.zeros(rows, groups, positions)
    if images is not None:
        kv = kv.to(images.kv).index_copy(0, images.rows, images.kv)
        there = torch.ones(images.kv.shape[:3], dtype=torch.bool) if images.tokens is None else images.tokens
        mask = mask.to(kv.device).index_copy(0, images.rows, there.to(kv.device))
        acts = images.scale[..., None].expand(-1, -1, positions)
        acts = acts if images.areas is None else acts * images.areas
        scale = scale.to(acts).index_copy(0, images.rows, acts)
    return {"image_kv": kv, "image_mask": mask, "image_scale": scale}


def residual_feeds(inputs: Sequence[Port], residuals: Sequence[Tensor] | None, sample: Tensor) -> dict[str, Tensor]:
    ports = [port for port in inputs if port.name.startswith("residual_")]
    return {port.name: tensor for port, tensor in zip(ports, maps(ports, residuals, sample), strict=True)}


def maps(ports: Sequence[Port], given: Sequence[Tensor] | None, sample: Tensor) -> list[Tensor]:
    """Those given, and zeros for the rest."""
    present = list(given or ())
    return present + [_zero_map(port, sample) for port in ports[len(present) :]]


def _zero_map(port: Port, sample: Tensor) -> Tensor:
    """`(rows, C, h, w)` at the level that the port's dims name."""
    _, channels, height, _ = port.dims
    step = 2 ** (int(str(height).partition("_")[2] or 0))
    sides = [-(-side // step) for side in sample.shape[2:]]
    return torch.zeros(len(sample), int(channels), *sides, dtype=DTYPES[port.dtype])


def positions(graph: AboutGraph, sample: Tensor) -> int:
    height, width = sample.shape[2:]
    return sum(-(-height // 2**level) * -(-width // 2**level) for level in range(graph.levels))
