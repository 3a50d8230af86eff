"""Quantises a base's products in an exported graph to int8; adapters are unchanged (docs/quantisation.md).

For each product of hidden states with a weight of the base, as in ModelOpt: `QuantizeLinear → DequantizeLinear` on the
states, with one calibrated scale, and on the weight, with one scale per output channel. TensorRT fuses them into one
int8 product. Products of two computed operands (factors, attention scores) have no weight and stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from scumble.errors import InvalidRequest, NotFound
from scumble_build.export.tracing.traced import Traced

LARGEST = 127.0
_NOT_QUANTISED = ("conv_in", "conv_out", "time_emb", "time_embedding", "add_embedding")
"""Layers with little arithmetic and a large error in int8."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """A quantised model. `products` are the initializers of the quantised weights."""

    model: ModelProto
    products: tuple[str, ...]


def quantise(
    model: ModelProto,
    weights: Mapping[str, NDArray[Any]],
    maxima: Mapping[str, float],
    names: Mapping[str, str] | None = None,
) -> Quantised:
    """Quantise every product whose weight is in `weights` (by initializer, `(out, in[, k, k])`) to int8, in place.

    `maxima` has the largest magnitude of each product's input states, by the weight's initializer. Raises
    InvalidRequest if one is missing or not above 0, since a guessed scale would clip silently. The error has the
    weight's name from `names`, if given.
    """
    graph = model.graph
    transposed = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Transpose"}
    nodes: list[NodeProto] = []
    added: list[TensorProto] = []
    done: list[str] = []
    for node in graph.node:
        weight = _weight_of(node, weights, transposed)
        if weight is None or any(part in weight for part in _NOT_QUANTISED):
            nodes.append(node)
            continue
        if not maxima.get(weight, 0.0) > 0:
            name = (names or {}).get(weight, weight)
            raise InvalidRequest(f"there is no calibrated maximum for {name}; calibrate with more prompts", field=name)
        values = weights[weight].astype(np.float32)
        of_channels = np.maximum(np.abs(values.reshape(len(values), -1)).max(1), 1e-8) / LARGEST
        # A linear layer's weight is transposed before the product, so its output channels come last.
        axis = 0 if node.op_type == "Conv" else 1
        states = _between(node, 0, np.float32(maxima[weight] / LARGEST), None, weights[weight].dtype, nodes, added)
        quantised = _between(node, 1, of_channels, axis, weights[weight].dtype, nodes, added)
        changed = NodeProto()
        changed.CopyFrom(node)
        changed.input[0], changed.input[1] = states, quantised
        nodes.append(changed)
        done.append(weight)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(added)
    return Quantised(model, tuple(done))


def quantise_traced(traced: Traced, parameters: Mapping[str, Tensor], maxima: Mapping[str, float]) -> tuple[str, ...]:
    """Quantise as `quantise` does, with maxima by the weights' names in `parameters`. Returns the names in int8."""
    names = {own: theirs for own, theirs in traced.parameters.items() if parameters[theirs].ndim > 1}
    weights = {own: parameters[theirs].detach().cpu().numpy() for own, theirs in names.items()}
    of_initializers = {own: maxima[theirs] for own, theirs in names.items() if theirs in maxima}
    return tuple(names[own] for own in quantise(traced.model, weights, of_initializers, names).products)


def read_maxima(file: Path) -> dict[str, float]:
    """Read maxima from a JSON object: `unet.….weight` → the largest magnitude of the states that this layer reads.

    Raises NotFound, InvalidRequest.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFound(f"--int8: {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InvalidRequest(f"{file} is not JSON: {error}", field="int8") from error
    if not isinstance(content, dict) or not all(isinstance(maximum, int | float) for maximum in content.values()):
        raise InvalidRequest(f"{file} must be a JSON object that maps names of weights to numbers", field="int8")
    return {name: float(maximum) for name, maximum in content.items()}


def _weight_of(node: NodeProto, weights: Mapping[str, object], transposed: Mapping[str, str]) -> str | None:
    if node.op_type not in {"MatMul", "Gemm", "Conv"} or len(node.input) < 2:
        return None
    name = transposed.get(node.input[1], node.input[1])
    return name if name in weights else None


def _between(
    node: NodeProto,
    place: int,
    scale: NDArray[np.float32] | np.float32,
    axis: int | None,
    dtype: np.dtype[Any],
    nodes: list[NodeProto],
    added: list[TensorProto],
) -> str:
    """Insert Q and DQ before one input; returns the name of their output."""
    name = f"{node.output[0]}_q{place}"
    added.append(numpy_helper.from_array(np.asarray(scale).astype(dtype), f"{name}_scale"))
    added.append(numpy_helper.from_array(np.zeros(np.shape(scale), np.int8), f"{name}_zero"))
    constants = [f"{name}_scale", f"{name}_zero"]
    nodes.append(_node("QuantizeLinear", [node.input[place], *constants], f"{name}_int8", axis))
    nodes.append(_node("DequantizeLinear", [f"{name}_int8", *constants], f"{name}_back", axis))
    return f"{name}_back"


def _node(kind: str, inputs: list[str], output: str, axis: int | None) -> NodeProto:
    if axis is None:
        return helper.make_node(kind, inputs, [output], output)
    return helper.make_node(kind, inputs, [output], output, axis=axis)
