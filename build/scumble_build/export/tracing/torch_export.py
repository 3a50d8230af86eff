"""Exports a graph to ONNX by torch.export and the exporter that is built on it."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import onnx_ir as ir
import torch
from onnx import ModelProto, TensorProto
from onnxscript.optimizer import optimize
from torch.export import Dim

from scumble_build.export.graph import Graph
from scumble_build.export.tracing.traced import OPSET, Traced, elsewhere, norms_in_float32

_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}


def trace(graph: Graph) -> Traced:
    """Trace a graph. Not thread-safe."""
    with torch.no_grad(), norms_in_float32(graph), _in_silence():
        program = torch.export.export(
            graph.module, graph.examples(), dynamic_shapes=_dynamic_shapes(graph), strict=False
        )
        made: Any = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verify=False,
            external_data=False,
            input_names=[port.name for port in graph.inputs],
            output_names=[port.name for port in graph.outputs],
        )
        parameters = _weights_aside(made.model, program.state_dict, graph)
        optimize(made.model)
    _constants_within(made.model)
    _make_names_unique(made.model, graph)
    model: ModelProto = ir.to_proto(made.model)
    for value in [value for value in model.graph.input if value.name in parameters]:
        model.graph.input.remove(value)
        model.graph.initializer.append(elsewhere(value.name, program.state_dict[value.name]))
    _name_axes(model, graph)
    return Traced(model, parameters)


def _dynamic_shapes(graph: Graph) -> tuple[Any, ...]:
    """Return the dynamic axes of every input, in the form of the module's arguments; dependent axes are
    not marked so.
    """
    of_ports = [
        {place: Dim.DYNAMIC for place, dim in enumerate(port.dims) if isinstance(dim, str)} for port in graph.inputs
    ]
    arguments = inspect.signature(graph.module.forward).parameters.values()
    named = sum(argument.kind is not argument.VAR_POSITIONAL for argument in arguments)
    rest = tuple(of_ports[named:])
    return (*of_ports[:named], rest) if rest else tuple(of_ports)


def _weights_aside(model: Any, state: dict[str, Any], graph: Graph) -> dict[str, str]:
    """Turn the model's parameters into inputs, so that no values are folded: a graph is for all weights of its
    structure.

    Returns initializer → name of the parameter.
    """
    names = {tensor.data_ptr(): name for name, tensor in graph.parameters.items()}
    parameters: dict[str, str] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = state.get(name)
        if tensor is not None and tensor.data_ptr() in names:
            parameters[name] = names[tensor.data_ptr()]
            value.const_value = None
            del model.graph.initializers[name]
            model.graph.inputs.append(value)
    return parameters


def _constants_within(model: Any) -> None:
    """Turn the remaining initializers into constants: they belong to the graph and do not depend on the weights."""
    for name, value in list(model.graph.initializers.items()):
        constant = ir.node("Constant", [], {"value": value.const_value})
        model.graph.insert_before(model.graph[0], constant)
        value.replace_all_uses_with(constant.outputs[0])
        del model.graph.initializers[name]
        constant.outputs[0].name = name


def _make_names_unique(model: Any, graph: Graph) -> None:
    """Rename values that have the name of an input or output: the exporter does not check for that."""
    taken = {port.name for port in (*graph.inputs, *graph.outputs)}
    own = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph:
        for value in node.outputs:
            if value.name in taken and id(value) not in own:
                value.name = f"{value.name}_within"


def _name_axes(model: ModelProto, graph: Graph) -> None:
    """Replace the exporter's symbols for axes by the manifest's names, and drop the inner values' shapes.

    Raises AssertionError if the model does not match the graph's ports, which is a bug of ours or of the exporter's.
    """
    del model.graph.value_info[:]
    for values, ports in ((model.graph.input, graph.inputs), (model.graph.output, graph.outputs)):
        for value, port in zip(values, ports, strict=True):
            tensor = value.type.tensor_type
            if (value.name, tensor.elem_type) != (port.name, _TYPES[port.dtype]):
                raise AssertionError(f"the exporter made {value.name} of type {tensor.elem_type} of {port}")
            for place, dim in enumerate(port.dims):
                shape = tensor.shape.dim[place]
                if isinstance(dim, str):
                    if not shape.dim_param:
                        raise AssertionError(f"the exporter fixed {dim} of {port.name} at {shape.dim_value}")
                    shape.dim_param = dim
                else:
                    shape.dim_value = dim


@contextmanager
def _in_silence() -> Iterator[None]:
    """Silence the exporter, which reports progress on standard output, where commands print JSON."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
