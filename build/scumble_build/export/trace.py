"""A graph → an ONNX model without weights: every initializer is a name, a shape and a place in another file.

So all graphs of one structure are one file, whatever weights they run with: a base's, a variant's, another base's.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import onnx
import torch
from onnx import ModelProto, TensorProto
from torch import Tensor, nn
from torch.nn import functional

from scumble_build.export.graph import Graph

OPSET = 18
EXPORTER: Literal["torchscript"] = "torchscript"

_TYPES: Mapping[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
}
_tracing = threading.Lock()


@dataclass(frozen=True, slots=True)
class Place:
    """Of a tensor's bytes in a file."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Traced:
    """`parameters` maps each of the model's initializers to its name among the component's tensors."""

    model: ModelProto
    parameters: Mapping[str, str]


def trace(graph: Graph) -> Traced:
    """By the TorchScript exporter. Callers may be of any thread; one is served at a time."""
    buffer = io.BytesIO()
    inputs, outputs = graph.inputs, graph.outputs
    with _tracing, torch.no_grad(), _norms_in_float32(graph), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, of branches on shapes: `Graph.examples` takes the general ones
        torch.onnx.export(
            graph.module,
            graph.examples(),
            cast("Any", buffer),
            dynamo=False,
            opset_version=OPSET,
            export_params=False,
            do_constant_folding=False,
            input_names=[port.name for port in inputs],
            output_names=[port.name for port in outputs],
            dynamic_axes={
                port.name: {i: dim for i, dim in enumerate(port.dims) if isinstance(dim, str)}
                for port in (*inputs, *outputs)
            },
        )
    model = onnx.load_model_from_string(buffer.getvalue())
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "Cast" else ():
            if attribute.i == TensorProto.COMPLEX128:  # what the exporter calls bfloat16 where it scales attention
                attribute.i = TensorProto.BFLOAT16
    return Traced(model, _weights_aside(model, graph))


def _weights_aside(model: ModelProto, graph: Graph) -> dict[str, str]:
    """Turns parameters, which the exporter left as inputs, into initializers whose values are elsewhere."""
    tensors = {**dict(graph.module.named_parameters()), **dict(graph.module.named_buffers())}
    names = {tensor.data_ptr(): name for name, tensor in graph.parameters.items()}
    used = {name for node in model.graph.node for name in node.input}
    kept = {port.name for port in graph.inputs}
    found: dict[str, str] = {}
    for value in [each for each in model.graph.input if each.name not in kept]:
        model.graph.input.remove(value)
        if value.name in used:
            tensor = tensors[value.name]
            found[value.name] = names[tensor.data_ptr()]
            model.graph.initializer.append(_elsewhere(value.name, tensor))
    return found


def _elsewhere(name: str, tensor: Tensor) -> TensorProto:
    proto = TensorProto(name=name, data_type=_TYPES[tensor.dtype], dims=list(tensor.shape))
    proto.data_location = TensorProto.EXTERNAL
    _put(proto, Place("weights", 0, tensor.nbytes))
    return proto


def locate(model: ModelProto, places: Mapping[str, Place]) -> None:
    """Say where each initializer's values are, by its name."""
    for proto in model.graph.initializer:
        if proto.name in places:
            _put(proto, places[proto.name])


def _put(proto: TensorProto, place: Place) -> None:
    del proto.external_data[:]
    for key, value in (("location", place.file), ("offset", place.offset), ("length", place.length)):
        proto.external_data.append(onnx.StringStringEntryProto(key=key, value=str(value)))


@contextmanager
def _norms_in_float32(graph: Graph) -> Iterator[None]:
    """In half precision, sums over a whole map overflow or lose what is small."""
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
        weight, bias = (None if each is None else each.float() for each in (norm.weight, norm.bias))
        if isinstance(norm, nn.GroupNorm):
            return functional.group_norm(x.float(), norm.num_groups, weight, bias, norm.eps).to(x.dtype)
        return functional.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps).to(x.dtype)

    return forward


__all__ = ["EXPORTER", "OPSET", "Place", "Traced", "locate", "trace"]
