"""Exports a graph to ONNX by the TorchScript exporter."""

from __future__ import annotations

import io
import warnings
from typing import Any, cast

import onnx
import torch
from onnx import ModelProto, TensorProto

from scumble_build.export.graph import Graph
from scumble_build.export.tracing.traced import OPSET, Traced, elsewhere, norms_in_float32


def trace(graph: Graph) -> Traced:
    """Trace a graph. Not thread-safe."""
    buffer = io.BytesIO()
    inputs, outputs = graph.inputs, graph.outputs
    with torch.no_grad(), norms_in_float32(graph), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on branches that depend on shapes: `Graph.examples` takes the general ones
        torch.onnx.export(
            graph.module,
            graph.examples(),
            cast("Any", buffer),
            dynamo=False,
            opset_version=OPSET,
            export_params=False,
            do_constant_folding=False,
            keep_initializers_as_inputs=True,  # else equal initializers are merged, and a variant's may differ
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
            if attribute.i == TensorProto.COMPLEX128:  # the exporter's code for bfloat16 where it scales attention
                attribute.i = TensorProto.BFLOAT16
    return Traced(model, _weights_aside(model, graph))


def _weights_aside(model: ModelProto, graph: Graph) -> dict[str, str]:
    """Turn parameters, which the exporter left as inputs, into initializers with external data.

    Returns initializer → name of the parameter.
    """
    tensors = {**dict(graph.module.named_parameters()), **dict(graph.module.named_buffers())}
    names = {tensor.data_ptr(): name for name, tensor in graph.parameters.items()}
    used = {name for node in model.graph.node for name in node.input}
    ports = {port.name for port in graph.inputs}
    parameters: dict[str, str] = {}
    for value in [value for value in model.graph.input if value.name not in ports]:
        model.graph.input.remove(value)
        if value.name in used:
            tensor = tensors[value.name]
            parameters[value.name] = names[tensor.data_ptr()]
            model.graph.initializer.append(elsewhere(value.name, tensor))
    return parameters
