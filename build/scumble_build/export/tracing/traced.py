"""An ONNX model without weights: every initializer is a name, a shape and a byte range in another file.

So all graphs of one structure are one file, whatever weights they run with: a base's, a variant's, another base's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import onnx
import torch
from onnx import ModelProto, TensorProto
from torch import Tensor, nn
from torch.nn import functional

from scumble_build.export.graph import Graph

OPSET = 18
Exporter: TypeAlias = Literal["torch.export", "torchscript"]

_TYPES: Mapping[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
}


@dataclass(frozen=True, slots=True)
class ByteRange:
    """The bytes of a tensor in a file."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Traced:
    """A traced model. `parameters` maps each initializer to the name of its tensor in the component."""

    model: ModelProto
    parameters: Mapping[str, str]


def elsewhere(name: str, tensor: Tensor) -> TensorProto:
    proto = TensorProto(name=name, data_type=_TYPES[tensor.dtype], dims=list(tensor.shape))
    proto.data_location = TensorProto.EXTERNAL
    _put(proto, ByteRange("weights", 0, tensor.nbytes))
    return proto


def locate(model: ModelProto, places: Mapping[str, ByteRange]) -> None:
    """Set where each initializer's values are, by its name."""
    for proto in model.graph.initializer:
        if proto.name in places:
            _put(proto, places[proto.name])


def _put(proto: TensorProto, place: ByteRange) -> None:
    del proto.external_data[:]
    for key, value in (("location", place.file), ("offset", place.offset), ("length", place.length)):
        proto.external_data.append(onnx.StringStringEntryProto(key=key, value=str(value)))


@contextmanager
def norms_in_float32(graph: Graph) -> Iterator[None]:
    """Compute norms in float32: in half precision, sums over a whole map overflow or lose small terms."""
    if graph.precision == "fp32":
        yield
        return
    norms = [module for module in graph.module.modules() if isinstance(module, nn.GroupNorm | nn.LayerNorm)]
    forwards = [norm.forward for norm in norms]
    for norm in norms:
        norm.forward = _in_float32(norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm, forward in zip(norms, forwards, strict=True):
            norm.forward = forward  # type: ignore[method-assign]


def _in_float32(norm: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        weight, bias = (None if tensor is None else tensor.float() for tensor in (norm.weight, norm.bias))
        if isinstance(norm, nn.GroupNorm):
            return functional.group_norm(x.float(), norm.num_groups, weight, bias, norm.eps).to(x.dtype)
        return functional.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps).to(x.dtype)

    return forward
