"""A graph ready to be exported: a module whose forward takes plain tensors, with their names, dims and dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scumble_build.export.manifest import FLOAT, Axis, FactorLayout, GraphPart, Port, Precision
from scumble_build.graphs.denoiser import KVSlice
from scumble_build.graphs.includes import Include

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "bool": torch.bool,
}
PRECISIONS: Mapping[Precision, torch.dtype] = {name: DTYPES[dtype] for name, dtype in FLOAT.items()}


@dataclass(frozen=True, slots=True)
class Graph:
    """`parameters` are the tensors that the module reads, by component and name in its file (`unet.conv_in.weight`)."""

    name: str
    part: GraphPart
    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    axes: Mapping[str, Axis]
    precision: Precision
    parameters: Mapping[str, Tensor]
    includes: tuple[Include, ...] = ()
    factors: FactorLayout | None = None
    kv: tuple[KVSlice, ...] = ()
    levels: int = 0
    kept_in_fp32: tuple[str, ...] = ()

    def examples(self) -> tuple[Tensor, ...]:
        """Return inputs to trace with: all axes differ in size, none is 0 or 1, and none is even at every level."""
        known = dict(zip(self.axes, _EXAMPLES, strict=False)) | {"rows": 2, "height": 9, "width": 11, "rank_pages": 2}
        for name, axis in self.axes.items():
            if axis.of is not None:
                known[name] = -(-known[axis.of] // 2**axis.halvings)
            elif axis.multiple > 1:
                known[name] = 2 * axis.multiple
        places = (-(-known["height"] // 2**level) * -(-known["width"] // 2**level) for level in range(self.levels))
        known["positions"] = sum(places)
        generator = torch.Generator().manual_seed(0)
        return tuple(
            _example(port, [known[dim] if isinstance(dim, str) else dim for dim in port.dims], generator)
            for port in self.inputs
        )


_EXAMPLES = (13, 7, 5, 4, 3, 6, 10, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22)


def _example(port: Port, shape: list[int], generator: torch.Generator) -> Tensor:
    dtype = DTYPES[port.dtype]
    if dtype.is_floating_point:
        return (0.1 * torch.randn(shape, generator=generator)).to(dtype)
    return torch.ones(shape, dtype=dtype) if dtype == torch.bool else torch.zeros(shape, dtype=dtype)


def named(component: str, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a component by their names in its file. Call it before the component is adapted."""
    return {f"{component}.{name}": tensor for name, tensor in model.state_dict(keep_vars=True).items()}
