"""The webui's hypernetworks: for each context width a network for keys and one for values.

The safetensors layout of converted `.pt` files and of the trainers:

    <width>.k.linear.<i>.weight|bias      <width>.v.linear.<i>.weight|bias

`i` counts as in the .pt: linear layers (out, in), activations, layer norms (out,) and dropouts each take the next
number, though only linear layers and norms have tensors. The header has the settings as strings, by the .pt's names:

| field             | default     | meaning                                                                  |
|-------------------|-------------|--------------------------------------------------------------------------|
| `layer_structure` | `[1, 2, 1]` | widths as multiples of the context's; the first and the last must be 1   |
| `activation_func` | `linear`    | activation after each linear layer                                       |
| `activate_output` | `True`      | an activation after the last layer too                                   |
| `is_layer_norm`   | `False`     | a layer norm after each activation, the last one's too                   |

| `use_dropout`     | `False`     | or a `dropout_structure` that is not all 0: dropouts may take numbers    |

All other fields (`step`, `name`, `sd_checkpoint` …) have no effect on images. The defaults are the webui's. The
activations, norms and dropouts that the layer numbers imply must agree with the header.
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
"""Layer number in the file → `weight` and `bias`, ascending."""


@dataclass(frozen=True, slots=True)
class _Settings:
    """The settings in the header."""

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
    """Return the keys that are not a network's."""
    return {name for name in header.tensors if not _KEY.fullmatch(name)}


def parse(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> tuple[bytes, ContextNetworks, Family | None]:
    """Return record, compatibility and family. Raises Refused, naming the tensor or the field that is wrong."""
    networks: dict[int, dict[str, _Numbered]] = {}
    for name in sorted(tensors):
        if match := _KEY.fullmatch(name):
            of_side = networks.setdefault(int(match[1]), {}).setdefault(match[2], {})
            of_side.setdefault(int(match[3]), {})[match[4]] = tensors[name]
    settings = _read_metadata(metadata)
    record: ContextRecord = {}
    for width, sides in sorted(networks.items()):
        if missing := [side for side in SIDES if side not in sides]:
            raise Refused(f"the hypernetwork has {width}.{next(iter(sides))}, but no {width}.{missing[0]}")
        record[width] = Sides(*(_layers(f"{width}.{side}", width, sides[side], settings) for side in SIDES))
    compatibility = ContextNetworks(
        widths=tuple(record),
        structure=settings.structure,
        activation=settings.activation,
        activate_output=settings.activate_output,
        layer_norm=settings.layer_norm,
    )
    families = {_FAMILIES[width] for width in record if width in _FAMILIES}
    return write(record), compatibility, families.pop() if len(families) == 1 else None


def _layers(name: str, width: int, numbered: _Numbered, settings: _Settings) -> tuple[Layer, ...]:
    """Return the layers of one side. Raises Refused where the tensors and the header do not agree."""
    numbers = sorted(numbered)
    for number in numbers:
        _check_pair(f"{name}.linear.{number}", numbered[number])
    step = 2 if settings.layer_norm else 1
    count = len(settings.structure) - 1
    if len(numbers) != step * count:
        raise Refused(
            f"{name} has {len(numbers)} layers with weights, but layer_structure {list(settings.structure)} with "
            f"is_layer_norm {settings.layer_norm} has {step * count}; correct the header"
        )
    layers: list[Layer] = []
    expected: tuple[int, ...] = (0,)
    for i in range(count):
        number, *norms = numbers[step * i : step * (i + 1)]
        shape = int(width * settings.structure[i + 1]), int(width * settings.structure[i])  # truncated, as in the webui
        linear = numbered[number]
        _check_number(name, number, expected)
        _check_shape(f"{name}.linear.{number}", linear, shape)
        activation = settings.activation_of(i)
        following = number + (1 if activation == "linear" else 2)
        norm: tuple[Array, Array] | None = None
        for norm_number in norms:
            _check_number(name, norm_number, (following,))
            _check_shape(f"{name}.linear.{norm_number}", numbered[norm_number], shape[:1])
            norm = numbered[norm_number]["weight"], numbered[norm_number]["bias"]
            following = norm_number + 1
        layers.append(Layer(linear["weight"], linear["bias"], norm, activation))
        expected = (following, following + 1) if settings.dropout else (following,)
    return tuple(layers)


def _check_pair(name: str, pair: Mapping[str, Array]) -> None:
    if missing := {"weight", "bias"} - pair.keys():
        raise Refused(f"{name}.{missing.pop()} is missing", tensor=name)


def _check_number(name: str, number: int, expected: tuple[int, ...]) -> None:
    if number not in expected:
        raise Refused(
            f"{name}.linear.{number} has another number than {' or '.join(map(str, expected))}, which follows from "
            "activation_func, activate_output, is_layer_norm and use_dropout; correct the header"
        )


def _check_shape(name: str, pair: Mapping[str, Array], shape: tuple[int, ...]) -> None:
    actual = pair["weight"].shape
    if actual != shape or pair["bias"].shape != shape[:1]:
        raise Refused(
            f"{name} has shape {actual} with a bias of {pair['bias'].shape}; by layer_structure and is_layer_norm it "
            f"should be {shape} and {shape[:1]}",
            tensor=name,
        )


def _read_metadata(metadata: Mapping[str, str]) -> _Settings:
    activation = metadata.get("activation_func", "linear").strip().lower()
    activation = "linear" if activation in {"", "none", "null"} else activation
    if activation not in ACTIVATIONS:
        raise Refused(f"activation_func is {activation!r}; known are {', '.join(sorted(ACTIVATIONS))}")
    return _Settings(
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
