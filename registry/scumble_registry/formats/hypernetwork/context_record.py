"""The record of a hypernetwork of the webui's kind, which the server reads.

A canonical safetensors file. For each width of a context, side (`k`, `v`) and layer i from 0:

    <width>.<side>.<i>.weight         (out, in)   dtype as published
    <width>.<side>.<i>.bias           (out,)
    <width>.<side>.<i>.norm.weight    (out,)      of the layer norm after it, if there is one
    <width>.<side>.<i>.norm.bias      (out,)

and in the header `activations`, a JSON list with a name for each layer (`linear` is none). With n the layers of one
side, each `norm(activation(weight x + bias))`, a context c becomes c + w · n(c), where w is the adapter's weight.

Laws: `read(write(r)) == r` bit for bit, and equal records have equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from scumble.errors import Refused
from scumble_registry.formats.safetensors_header import Array
from scumble_registry.formats.safetensors_header import write as write_tensors

FORMAT = "scumble.hypernetwork.context.1"
SIDES = ("k", "v")

ACTIVATIONS = frozenset(
    (
        "linear",
        "relu",
        "leakyrelu",
        "elu",
        "swish",
        "tanh",
        "sigmoid",
        "celu",
        "gelu",
        "hardshrink",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "logsigmoid",
        "mish",
        "relu6",
        "rrelu",
        "selu",
        "silu",
        "softplus",
        "softshrink",
        "softsign",
        "tanhshrink",
    )
)
"""The webui's names: torch's activation classes in lower case, and `swish`, which is Hardswish in the webui. Those that
have parameters, change the width or mix rows of a batch are left out."""


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """norm(activation(weight x + bias)): weight (out, in), bias (out,), the norm's weight and bias (out,) or None."""

    weight: Array
    bias: Array
    norm: tuple[Array, Array] | None
    activation: str

    @property
    def arrays(self) -> tuple[Array, ...]:
        return (self.weight, self.bias, *(self.norm or ()))


@dataclass(frozen=True, slots=True, eq=False)
class Sides:
    """The layers on the context of the keys, and on that of the values."""

    k: tuple[Layer, ...]
    v: tuple[Layer, ...]


ContextRecord: TypeAlias = dict[int, Sides]
"""Width of the context → its layers, ascending."""


def write(record: ContextRecord) -> bytes:
    tensors: dict[str, Array] = {}
    activations: list[str] = []
    for width, sides in record.items():
        for side, layers in zip(SIDES, (sides.k, sides.v), strict=True):
            activations = [layer.activation for layer in layers]
            for i, layer in enumerate(layers):
                prefix = f"{width}.{side}.{i}."
                tensors |= {f"{prefix}weight": layer.weight, f"{prefix}bias": layer.bias}
                if layer.norm is not None:
                    tensors |= {f"{prefix}norm.weight": layer.norm[0], f"{prefix}norm.bias": layer.norm[1]}
    return write_tensors(tensors, {"format": FORMAT, "activations": json.dumps(activations)})


def read(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> ContextRecord:
    """Read a record. Raises KeyError, ValueError or Refused if this is no record."""
    activations = json.loads(metadata["activations"])
    if not ACTIVATIONS.issuperset(activations):
        raise Refused(f"its activations are {activations}")
    widths = sorted({int(name.partition(".")[0]) for name in tensors})
    record = {width: Sides(*(_layers(tensors, f"{width}.{side}.", activations) for side in SIDES)) for width in widths}
    if sum(len(layer.arrays) for sides in record.values() for layer in (*sides.k, *sides.v)) != len(tensors):
        raise Refused("it has tensors that belong to no layer")
    return record


def _layers(tensors: Mapping[str, Array], prefix: str, activations: Sequence[str]) -> tuple[Layer, ...]:
    return tuple(
        Layer(tensors[f"{prefix}{i}.weight"], tensors[f"{prefix}{i}.bias"], _norm(tensors, f"{prefix}{i}.norm."), word)
        for i, word in enumerate(activations)
    )


def _norm(tensors: Mapping[str, Array], prefix: str) -> tuple[Array, Array] | None:
    if f"{prefix}weight" not in tensors:
        return None
    return tensors[f"{prefix}weight"], tensors[f"{prefix}bias"]
