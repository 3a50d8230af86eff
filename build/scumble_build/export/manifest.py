"""The manifest of an exported graph: the JSON file beside each ONNX file, the contract for whatever runs the graph.

    unet.small.onnx           the graph, without weights
    unet.small.json           this manifest
        unet.safetensors          the weights, which all graphs of the component read as external data

Its guarantees:

* The graph has exactly these inputs and outputs, in this order, with these names, dtypes and dims. Every input must be
  fed. A dim is a number or the name of an axis; an axis has the same size everywhere.
* An axis may have any size from `min` to `max` that is a multiple of `multiple`; an engine is tuned for `opt`. An axis
  with `of` follows another one: ⌈of / 2^halvings⌉, as a UNet's levels do; `positions` is Σ ⌈height / 2^l⌉ ⌈width / 2^l⌉
  over the levels l. Inputs must have these sizes; `shapes` computes them. An optimization profile is the shapes at
  `min`, `opt` and `max`.
* The graph is strongly typed: an operator computes in the dtype of its inputs and casts are explicit. `kept_in_fp32`
  lists what is computed in float32 in every precision, `in_int8` the products in int8.
* `factors` is the layout of the graph's rank pages. A page of A has a block (page, fan_in) for target t at
  `page · in_offset`, one of B a block (page, fan_out) at `page · out_offset`. A graph over the full layout has a second
  pair, A_rest and B_rest, for targets whose offsets are not below `total_in` and `total_out`, which are subtracted from
  their offsets. `pages` has the pages that each row reads, in the order of its rank columns. A page of zeros, or a
  scale of zeros, adds nothing.
* `includes` lists the inputs of a denoiser's graph besides text; the graph serves all batches that need no others.
* `onnx.sha256` and `weights.sha256` are those of the files. `parameters` maps each initializer to the tensor of the
  component, in the diffusers layout, that it holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scumble.errors import InvalidRequest, Refused
from scumble_build.graphs.includes import Include
from scumble_build.graphs.layout import PAGE, Layout

SUFFIX = ".json"

Precision: TypeAlias = Literal["fp32", "fp16", "bf16"]
DType: TypeAlias = Literal["float32", "float16", "bfloat16", "int64", "bool"]
GraphPart: TypeAlias = Literal[
    "text_encoder",
    "text_encoder_2",
    "kv_projection",
    "denoiser",
    "vae_encoder",
    "vae_decoder",
    "image_encoder",
    "controlnet",
    "controlnet_kv",
    "controlnet_hint",
    "controlnet_condition",
]

FLOAT: Mapping[Precision, DType] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Axis(_Model):
    """A dynamic size. `of` names the axis that it follows, with how many halvings, each rounded up."""

    min: int = Field(ge=0)
    opt: int
    max: int
    multiple: int = 1
    of: str | None = None
    halvings: int = 0
    about: str = ""


class Port(_Model):
    """An input or an output."""

    name: str
    dtype: DType
    dims: tuple[int | str, ...]
    about: str


class FactorTarget(_Model):
    """A layer that takes factors, by its canonical name."""

    name: str
    fan_in: int
    fan_out: int
    in_offset: int
    out_offset: int


class FactorLayout(_Model):
    """Offsets of each layer's factors. A page of A has page · total_in numbers, one of B page · total_out; those of
    A_rest and B_rest page · rest_in and page · rest_out, 0 for a graph without.
    """

    targets: tuple[FactorTarget, ...]
    page: int
    total_in: int
    total_out: int
    rest_in: int = 0
    rest_out: int = 0

    @classmethod
    def of(cls, layout: Layout, *, full: bool) -> Self:
        """Describe the full layout, or the small one, which is its beginning."""
        extent = layout.full if full else layout.small
        targets = [target for target in layout.targets.values() if target.in_end <= extent.total_in]
        return cls(
            targets=tuple(
                FactorTarget(
                    name=target.name,
                    fan_in=target.fan_in,
                    fan_out=target.fan_out,
                    in_offset=target.in_offset,
                    out_offset=target.out_offset,
                )
                for target in targets
            ),
            page=PAGE,
            total_in=layout.small.total_in,
            total_out=layout.small.total_out,
            rest_in=layout.rest.total_in if full else 0,
            rest_out=layout.rest.total_out if full else 0,
        )


class KVPlace(_Model):
    """A cross-attention's keys at `offset … offset + width` of K; its values come right after."""

    name: str
    offset: int
    width: int


class File(_Model):
    """A file beside the manifest."""

    name: str
    sha256: str
    size: int


class GraphManifest(_Model):
    """One exported graph."""

    version: Literal[1] = 1
    part: GraphPart
    graph: str
    """Unique among a base's graphs and the stem of its files: the part, or `unet.bare`, `unet.small` and so on."""
    includes: tuple[Include, ...] = ()
    family: Literal["sd1", "sd2", "sdxl"]
    base: str
    """Digest of the version whose weights these are (`sha256:…`), or of the files if it is not in a registry."""
    precision: Precision
    kept_in_fp32: tuple[str, ...]
    in_int8: tuple[str, ...] = ()
    """Weights of the products in int8 (`export.quantise`), by their names in `parameters`."""
    opset: int
    exporter: Literal["torch.export", "torchscript"]
    made_with: dict[str, str]
    """Versions of the libraries that exported it."""
    code: str
    """sha256 of the code that the graph was traced from."""
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    axes: dict[str, Axis]
    levels: int = 0
    """Levels of the UNet, for `positions`."""
    factors: FactorLayout | None = None
    kv: tuple[KVPlace, ...] = ()
    parameters: dict[str, str]
    """Initializer → `component.tensor`, as its file in the diffusers layout names it."""
    onnx: File
    weights: File

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a manifest. Raises Refused for a file that is not one of this version."""
        try:
            return cls.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            raise Refused(
                f"{file.name} is not a valid graph manifest: {error}; export it again with `scumble build export`"
            ) from error

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(self.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")

    def shapes(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Return each input's shape at these sizes of axes. Dependent axes are computed, missing ones default to `opt`.

        Raises InvalidRequest for a size outside its axis, naming both.
        """
        known = self.sizes(sizes)
        return {
            port.name: tuple(known[dim] if isinstance(dim, str) else dim for dim in port.dims) for port in self.inputs
        }

    def sizes(self, given: Mapping[str, int]) -> dict[str, int]:
        """Return the size of every axis. Raises InvalidRequest for a size outside its axis."""
        known = {name: given.get(name, axis.opt) for name, axis in self.axes.items() if axis.of is None}
        for name, axis in self.axes.items():
            if axis.of is not None:
                known[name] = -(-known[axis.of] // 2**axis.halvings)
        if "positions" in self.axes:
            places = (-(-known["height"] // 2**level) * -(-known["width"] // 2**level) for level in range(self.levels))
            known["positions"] = sum(places)
        for name, size in known.items():
            axis = self.axes[name]
            if not axis.min <= size <= axis.max or size % axis.multiple:
                raise InvalidRequest(
                    f"{self.graph} takes {axis.min} to {axis.max} {name} in steps of {axis.multiple}, not {size}",
                    field=name,
                )
        return known

    def profile(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """Return the least, usual and largest shape of each input."""
        ends = ({name: getattr(axis, end) for name, axis in self.axes.items()} for end in ("min", "opt", "max"))
        least, usual, most = (
            self.shapes({n: s for n, s in sizes.items() if self.axes[n].of is None}) for sizes in ends
        )
        return {port.name: (least[port.name], usual[port.name], most[port.name]) for port in self.inputs}
