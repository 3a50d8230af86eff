"""Inputs and axes that several graphs share: their names, dims and what they mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from scumble_build.denoiser import KVSlice
from scumble_build.export.manifest import Axis, DType, FactorLayout, Include, Port
from scumble_build.export.slots import SlotFactors

ROWS = Axis(min=1, opt=8, max=64, about="Model rows of a call; a guided image is two.")
TOKENS = Axis(min=1, opt=77, max=616, about="Tokens of the longest text.")
HEIGHT = Axis(min=1, opt=64, max=256, about="Of the latents: pixels / 8.")
WIDTH = Axis(min=1, opt=64, max=256, about="Of the latents: pixels / 8.")
FACTOR_AXES = {
    "slots": Axis(min=1, opt=8, max=64, about="Sets of LoRAs in this batch."),
    "rank": Axis(min=8, opt=32, max=256, multiple=8, about="Rank bucket of the widest set: 8, 16, 32, 64, 128 or 256."),
}


def factor_ports(layout: FactorLayout, dtype: DType, includes: Sequence[Include]) -> tuple[Port, ...]:
    """A, B, slot, scale, and the stretches among `includes`, in the order in which `take_factors` reads them."""
    ports = [
        Port(name="A", dtype=dtype, dims=("slots", layout.total_in, "rank"), about="Down factors of every slot, flat."),
        Port(
            name="B",
            dtype=dtype,
            dims=("slots", layout.total_out, "rank"),
            about="Up factors of every slot, flat; alpha / rank and block weights are in them.",
        ),
        Port(name="slot", dtype="int64", dims=("rows",), about="Which slot each row reads."),
        Port(
            name="scale", dtype=dtype, dims=("rows", "rank"), about="Weight of each rank column; 0 for what acts not."
        ),
    ]
    if "stretch_out" in includes:
        about = "What DoRAs add to the 1 that each output channel of W is multiplied by."
        ports.append(Port(name="stretch_out", dtype=dtype, dims=("rows", layout.total_out), about=about))
    if "stretch_in" in includes:
        about = "The same for input channels; of a convolution the first of each channel's taps counts."
        ports.append(Port(name="stretch_in", dtype=dtype, dims=("rows", layout.total_in), about=about))
    return tuple(ports)


def take_factors(tensors: Iterator[Tensor], includes: Sequence[Include]) -> SlotFactors:
    A, B, slot, scale = (next(tensors) for _ in range(4))
    out, into = (next(tensors) if each in includes else None for each in ("stretch_out", "stretch_in"))
    return SlotFactors(A, B, slot, scale, out, into)


def kv_port(slices: Sequence[KVSlice], dtype: DType, name: str = "kv") -> Port:
    return Port(
        name=name,
        dtype=dtype,
        dims=("rows", "tokens", kv_width(slices)),
        about="Keys and values of the text for every cross-attention, flat.",
    )


def kv_width(slices: Sequence[KVSlice]) -> int:
    return sum(2 * each.width for each in slices)


MASK = Port(name="kv_mask", dtype="bool", dims=("rows", "tokens"), about="True where a token is.")
TIMESTEP = Port(name="timestep", dtype="float32", dims=("rows",), about="Of each row, 0 to 999.")
SIZES = Port(
    name="sizes",
    dtype="float32",
    dims=("rows", 6),
    about="Original height and width, top and left of the crop, height and width aimed at, in pixels.",
)
