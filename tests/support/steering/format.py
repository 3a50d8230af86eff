"""The registry's side: a file with one tensor, `steering` (C,)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from scumble.errors import Incompatible
from scumble_registry.compatibility import BaseCompatibility, Family
from scumble_registry.compatibility.base import Compatibility
from scumble_registry.formats.floats import read_floats
from scumble_registry.formats.format import Format
from scumble_registry.formats.safetensors_header import Array, read_header, read_tensors, write
from scumble_registry.formats.source import Draft, Source

KIND, TENSOR = "steering", "steering"


class SteeringCompatibility(Compatibility):
    kind: Literal["steering"] = "steering"
    family: Family | None
    width: int

    def fits(self, base: BaseCompatibility) -> None:
        if self.width != base.cross_attention_dim:
            raise Incompatible(f"the vector has width {self.width}, the base's texts {base.cross_attention_dim}")


def recognises(source: Source) -> bool:
    return any(set(read_header(file).tensors) == {TENSOR} for file in source.weights().values())


def read(source: Source, base: BaseCompatibility | None) -> Draft:
    ((name, file),) = source.weights().items()
    vector = read_floats(file, read_header(file), what="a steering vector", max_bytes=1 << 20)[TENSOR]
    fit = SteeringCompatibility(family=base.family if base is not None else None, width=len(vector))
    return Draft({name: file}, fit, write({TENSOR: vector}, {}))


def read_record(path: Path) -> Array:
    return read_tensors(path, read_header(path))[TENSOR]


FORMAT = Format(KIND, "a file with the tensor steering alone", recognises, read)
