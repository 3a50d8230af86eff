"""Inputs and axes that several graphs share: names, dims and meaning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from scumble_build.export.manifest import Axis, DType, FactorLayout, Port
from scumble_build.export.paged import LayoutPages, PagedFactors
from scumble_build.graphs.adapted import Pages
from scumble_build.graphs.denoiser import KVSlice
from scumble_build.graphs.includes import Include
from scumble_build.graphs.layout import RANK_BUCKETS, Extent

ROWS = Axis(min=1, opt=8, max=64, about="Model rows of a call; a guided image is two.")
TOKENS = Axis(min=1, opt=77, max=616, about="Tokens of the longest text.")
HEIGHT = Axis(min=1, opt=64, max=256, about="Side of the latents: pixels / 8.")
WIDTH = Axis(min=1, opt=64, max=256, about="Side of the latents: pixels / 8.")
_MOST_PAGES = 1024
_MOST_NUMBERS = 2**31 - 1
"""Largest size of a tensor, for runtimes that index with 32 bits."""


def factor_axes(layout: FactorLayout | None) -> dict[str, Axis]:
    """Return the axes of `factor_ports`."""
    if layout is None:
        return {}
    axes = {"resident": _resident(layout.page, layout.total_in, layout.total_out)}
    if layout.rest_in:
        axes["resident_rest"] = _resident(layout.page, layout.rest_in, layout.rest_out)
    about = "Pages of the set with the highest rank in the batch: its rank bucket / 8."
    return axes | {"rank_pages": Axis(min=1, opt=4, max=RANK_BUCKETS[-1] // layout.page, about=about)}


def _resident(page: int, width_in: int, width_out: int) -> Axis:
    most = min(_MOST_PAGES, _MOST_NUMBERS // (page * max(width_in, width_out)))
    return Axis(min=1, opt=min(64, most), max=most, about="Resident rank pages of all LoRAs.")


def factor_ports(layout: FactorLayout, dtype: DType, includes: Sequence[Include]) -> tuple[Port, ...]:
    """Return the inputs for factors, in the order of `take_factors`: pages, table, scale, stretches in `includes`."""
    ports = [*_pages(layout.page, layout.total_in, layout.total_out, dtype)]
    if layout.rest_in:
        ports += _pages(layout.page, layout.rest_in, layout.rest_out, dtype, "_rest")
    about = "Weight of each rank column; 0 for an inactive one."
    ports.append(Port(name="scale", dtype=dtype, dims=("rows", "rank_pages", layout.page), about=about))
    if "stretch_out" in includes:
        about = "DoRA's gain of each output channel of W, minus 1."
        width = layout.total_out + layout.rest_out
        ports.append(Port(name="stretch_out", dtype=dtype, dims=("rows", width), about=about))
    if "stretch_in" in includes:
        about = "The same for input channels; a convolution reads the first tap of each channel."
        width = layout.total_in + layout.rest_in
        ports.append(Port(name="stretch_in", dtype=dtype, dims=("rows", width), about=about))
    return tuple(ports)


def _pages(page: int, width_in: int, width_out: int, dtype: DType, name: str = "") -> list[Port]:
    resident = f"resident{name}"
    return [
        Port(
            name=f"A{name}", dtype=dtype, dims=(resident, page * width_in), about="Down factors, one rank page per row."
        ),
        Port(
            name=f"B{name}",
            dtype=dtype,
            dims=(resident, page * width_out),
            about="Up factors, one rank page per row, times alpha / rank and block weights.",
        ),
        Port(name=f"pages{name}", dtype="int64", dims=("rows", "rank_pages"), about="The pages that each row reads."),
    ]


def take_factors(tensors: Iterator[Tensor], layout: FactorLayout, includes: Sequence[Include]) -> PagedFactors:
    extent = Extent(layout.total_in, layout.total_out)
    small = LayoutPages.of(_take_pages(tensors), Extent(0, 0))
    rest = LayoutPages.of(_take_pages(tensors), extent) if layout.rest_in else None
    scale = next(tensors).flatten(1)
    out, into = (next(tensors) if name in includes else None for name in ("stretch_out", "stretch_in"))
    return PagedFactors(small, rest, extent, scale, out, into)


def _take_pages(tensors: Iterator[Tensor]) -> Pages:
    return Pages(next(tensors), next(tensors), next(tensors))


def kv_port(slices: Sequence[KVSlice], dtype: DType, name: str = "kv") -> Port:
    return Port(
        name=name,
        dtype=dtype,
        dims=("rows", "tokens", kv_width(slices)),
        about="Keys and values of the text for every cross-attention, flat.",
    )


def kv_width(slices: Sequence[KVSlice]) -> int:
    return sum(2 * kv_slice.width for kv_slice in slices)


MASK = Port(name="kv_mask", dtype="bool", dims=("rows", "tokens"), about="True where a token is.")
TIMESTEP = Port(name="timestep", dtype="float32", dims=("rows",), about="Timestep of each row, 0 to 999.")
SIZES = Port(
    name="sizes",
    dtype="float32",
    dims=("rows", 6),
    about="Original height and width, top and left of the crop, target height and width, in pixels.",
)
