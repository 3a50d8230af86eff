"""The webui's hypernetworks: for each width of a context a network for keys and one for values.

The safetensors layout to which a `.pt` is converted and which trainers write:

    <width>.k.linear.<i>.weight|bias      <width>.v.linear.<i>.weight|bias

`i` counts as in the .pt: linear layers (out, in), activations, layer norms (out,) and dropouts each take the next
number, though only the first and third have tensors. The header says the rest, as strings, under the .pt's own names:

| field             | default     | meaning                                                                  |
|-------------------|-------------|--------------------------------------------------------------------------|
| `layer_structure` | `[1, 2, 1]` | widths as multiples of the context's; the first and the last must be 1   |
| `activation_func` | `linear`    | behind each linear layer                                                 |
| `activate_output` | `True`      | behind the last one too                                                  |
| `is_layer_norm`   | `False`     | a layer norm behind each activation, the last one's too                  |

| `use_dropout`     | `False`     | or a `dropout_structure` that is not all 0: dropouts may take numbers    |

Everything else there (`step`, `name`, `sd_checkpoint` …) changes no picture. The defaults are those of the webui; what
the numbers tell of activations, norms and dropouts must agree with the header.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from scumble.errors import Refused
from scumble_registry.compatibility import ContextNetworks, Family
from scumble_registry.formats.hypernetwork.context_record import (
    ACTIVATIONS,
    FORMAT,
    SIDES,
    ContextRecord,
    Layer,
    Sides,
    read,
    write,
)
from scumble_registry.formats.safetensors_header import Array, Header

_KEY = re.compile(r"([1-9]\d{0,4})\.([kv])\.linear\.(0|[1-9]\d{0,2})\.(weight|bias)")
_MAX_LAYERS, _MAX_MULTIPLE = 32, 64
_FAMILIES: dict[int, Family] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}

_Numbered: TypeAlias = dict[int, dict[str, Array]]
"""Number in the file → `weight` and `bias`, rising."""


@dataclass(frozen=True, slots=True)
class _Said:
    """What the header says."""

    structure: tuple[float, ...]
    activation: str
    activate_output: bool
    layer_norm: bool
    dropout: bool

    def activation_of(self, layer: int) -> str:
        is_last = layer == len(self.structure) - 2
        return "linear" if is_last and not self.activate_output else self.activation


def recognises(header: Header) -> bool:
    return any(_KEY.fullmatch(name) for name in header.tensors)


def unknown_keys(header: Header) -> set[str]:
    """Keys that are none of such a network's."""
    return {name for name in header.tensors if not _KEY.fullmatch(name)}


def parse(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> tuple[bytes, ContextNetworks, Family | None]:
    """The record and what is derived. Raises Refused, naming the tensor or the field that is wrong."""
    networks: dict[int, dict[str, _Numbered]] = {}
    for name in sorted(tensors):
        if match := _KEY.fullmatch(name):
            of_side = networks.setdefault(int(match[1]), {}).setdefault(match[2], {})
            of_side.setdefault(int(match[3]), {})[match[4]] = tensors[name]
    said = _read_metadata(metadata)
    record: ContextRecord = {}
    for width, sides in sorted(networks.items()):
        if missing := [side for side in SIDES if side not in sides]:
            raise Refused(f"the hypernetwork has {width}.{next(iter(sides))}, but no {width}.{missing[0]}")
        record[width] = Sides(*(_layers(f"{width}.{side}", width, sides[side], said) for side in SIDES))
    compatibility = ContextNetworks(
        widths=tuple(record),
        structure=said.structure,
        activation=said.activation,
        activate_output=said.activate_output,
        layer_norm=said.layer_norm,
    )
    families = {_FAMILIES[width] for width in record if width in _FAMILIES}
    return write(record), compatibility, families.pop() if len(families) == 1 else None


def _layers(name: str, width: int, numbered: _Numbered, said: _Said) -> tuple[Layer, ...]:
    """The layers of one side. Raises Refused where the tensors and the header do not agree."""
    places = sorted(numbered)
    for place in places:
        _check_pair(f"{name}.linear.{place}", numbered[place])
    step = 2 if said.layer_norm else 1
    count = len(said.structure) - 1
    if len(places) != step * count:
        raise Refused(
            f"{name} has {len(places)} layers with weights, but layer_structure {list(said.structure)} with "
            f"is_layer_norm {said.layer_norm} says {step * count}; correct the header"
        )
    layers: list[Layer] = []
    expected: tuple[int, ...] = (0,)
    for i in range(count):
        place, *norms = places[step * i : step * (i + 1)]
        shape = int(width * said.structure[i + 1]), int(width * said.structure[i])  # cut off, as the webui does
        linear = numbered[place]
        _check_place(name, place, expected)
        _check_shape(f"{name}.linear.{place}", linear, shape)
        word = said.activation_of(i)
        behind = place + (1 if word == "linear" else 2)
        norm: tuple[Array, Array] | None = None
        for place_of_norm in norms:
            _check_place(name, place_of_norm, (behind,))
            _check_shape(f"{name}.linear.{place_of_norm}", numbered[place_of_norm], shape[:1])
            norm = numbered[place_of_norm]["weight"], numbered[place_of_norm]["bias"]
            behind = place_of_norm + 1
        layers.append(Layer(linear["weight"], linear["bias"], norm, word))
        expected = (behind, behind + 1) if said.dropout else (behind,)
    return tuple(layers)


def _check_pair(name: str, pair: Mapping[str, Array]) -> None:
    if missing := {"weight", "bias"} - pair.keys():
        raise Refused(f"{name}.{missing.pop()} is missing", tensor=name)


def _check_place(name: str, place: int, expected: tuple[int, ...]) -> None:
    if place not in expected:
        raise Refused(
            f"{name}.linear.{place} stands where {' or '.join(map(str, expected))} is expected: before it stand other "
            "layers than activation_func, activate_output, is_layer_norm and use_dropout say; correct the header"
        )


def _check_shape(name: str, pair: Mapping[str, Array], shape: tuple[int, ...]) -> None:
    actual = pair["weight"].shape
    if actual != shape or pair["bias"].shape != shape[:1]:
        raise Refused(
            f"{name} has shape {actual} with a bias of {pair['bias'].shape}; layer_structure and is_layer_norm say "
            f"{shape} and {shape[:1]}",
            tensor=name,
        )


def _read_metadata(metadata: Mapping[str, str]) -> _Said:
    activation = metadata.get("activation_func", "linear").strip().lower()
    activation = "linear" if activation in {"", "none", "null"} else activation
    if activation not in ACTIVATIONS:
        raise Refused(f"activation_func is {activation!r}; known are {', '.join(sorted(ACTIVATIONS))}")
    return _Said(
        _structure(metadata.get("layer_structure", "[1, 2, 1]")),
        activation,
        _truth(metadata, "activate_output", default=True),
        _truth(metadata, "is_layer_norm", default=False),
        _truth(metadata, "use_dropout", default=False)
        or bool(re.search("[1-9]", metadata.get("dropout_structure", ""))),
    )


def _structure(text: str) -> tuple[float, ...]:
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, list) or not all(type(value) in {int, float} for value in values):
        raise Refused(f"layer_structure is {text!r}; a list of numbers is needed, as [1, 2, 1]")
    if not 2 <= len(values) <= _MAX_LAYERS or not all(0 < value <= _MAX_MULTIPLE for value in values):
        raise Refused(
            f"layer_structure is {text}; 2 to {_MAX_LAYERS} numbers, each more than 0 and at most {_MAX_MULTIPLE}, "
            "are needed"
        )
    if values[0] != 1 or values[-1] != 1:
        raise Refused(f"layer_structure is {text}; its first and last number must be 1: a context keeps its width")
    return tuple(map(float, values))


def _truth(metadata: Mapping[str, str], name: str, *, default: bool) -> bool:
    text = metadata.get(name, str(default)).strip().lower()
    if text not in {"true", "false", "1", "0"}:
        raise Refused(f"{name} is {text!r}; True or False is needed")
    return text in {"true", "1"}


__all__ = ["FORMAT", "parse", "read", "recognises"]
