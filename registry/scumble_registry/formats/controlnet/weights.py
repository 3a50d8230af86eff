"""Read a ControlNet's weights by diffusers' names, whatever the file's layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from scumble.errors import Refused
from scumble_registry.compatibility import Shape
from scumble_registry.formats.controlnet import ldm
from scumble_registry.formats.safetensors_header import Array, Header, read_header, read_tensors

CONTROL_LORA = "lora_controlnet"
"""The key that marks a control-LoRA; its tensor is empty."""
DIFFERENCE = "difference"
"""The key that marks a file whose encoder weights are differences to the base's."""
_MARKS = frozenset({CONTROL_LORA, DIFFERENCE})
_OWN = ("controlnet_", "input_hint_block", "zero_convs", "middle_block_out")
"""Modules of a ControlNet that a UNet's encoder does not have."""


@dataclass(frozen=True, slots=True)
class NetWeights:
    """A net's weights by the names of diffusers' ControlNetModel.

    `full` are whole weights. `factors` (up, down) add up @ down to the base's weight, both flattened after the first
    axis; `differences` are added to it as they are. A weight in none of them is the base's.
    """

    full: dict[str, Array] = field(default_factory=dict)
    factors: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    differences: dict[str, Array] = field(default_factory=dict)

    @property
    def needs_base(self) -> bool:
        return bool(self.factors or self.differences)


def is_difference(header: Header) -> bool:
    """Return whether the file changes its base's weights, and so may lack those that it leaves as they are."""
    return any(name.removeprefix(ldm.PREFIX) in _MARKS for name in header.tensors)


def is_own(name: str) -> bool:
    """Return whether a UNet's encoder does not have this tensor of a ControlNetModel."""
    return name.startswith(_OWN)


def names_of(header: Header) -> dict[str, str]:
    """Map tensors, without the marks, to diffusers' names. Raises Refused for an unknown tensor."""
    names = [name for name in header.tensors if name.removeprefix(ldm.PREFIX) not in _MARKS]
    convert = ldm.converter(names) if ldm.is_ldm(names) else str
    renamed = {name: convert(name) for name in names}
    if unknown := [name for name, new in renamed.items() if new is None]:
        raise Refused(f"tensor {unknown[0]} is not a ControlNet's; is it another kind of file?")
    return {name: new for name, new in renamed.items() if new is not None}


def shapes_of(header: Header) -> dict[str, Shape]:
    """Return the shapes of the weights that the file holds whole or as factors. Raises Refused for unpaired factors."""
    tensors = {new: header.tensors[old].shape for old, new in names_of(header).items()}
    shapes = {name: shape for name, shape in tensors.items() if not name.endswith((".up", ".down"))}
    for name, shape in tensors.items():
        if name.endswith(".up"):
            down = tensors.get(name.removesuffix(".up") + ".down")
            if down is None or len(down) < 2 or len(shape) < 2 or down[0] != shape[1]:
                raise Refused(f"{name} {shape} has no down of its rank beside it; the file is damaged", tensor=name)
            shapes[name.removesuffix(".up") + ".weight"] = (shape[0], *down[1:])
        elif name.endswith(".down") and name.removesuffix(".down") + ".up" not in tensors:
            raise Refused(f"{name} has no up beside it; the file is damaged", tensor=name)
    return shapes


def read_weights(path: Path) -> NetWeights:
    """Read the weights as read-only views of the mapped file. Raises Refused."""
    header = read_header(path)
    tensors = read_tensors(path, header)
    differences = any(name.removeprefix(ldm.PREFIX) == DIFFERENCE for name in tensors)
    weights = NetWeights()
    renamed = {new: tensors[old] for old, new in names_of(header).items()}
    for name, values in renamed.items():
        stem, _, role = name.rpartition(".")
        if role == "up":
            weights.factors[f"{stem}.weight"] = (values, renamed[f"{stem}.down"])
        elif role != "down":
            of_encoder = differences and not is_own(name)
            (weights.differences if of_encoder else weights.full)[name] = values
    return weights
