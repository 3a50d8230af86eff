"""The normalised LoRA: what every dialect becomes and the server reads.

A canonical safetensors file with three tensors for each target (`compatibility.py` says what a target's name
is):

    <target>.down    (r, in)  or (r, in, k, k)      dtype as published
    <target>.up      (out, r) or (out, r, 1, 1)     dtype as published
    <target>.alpha   ()                             F32

and, of a DoRA (Liu et al., 2402.09353), the length of each row or of each column of the changed weight:

    <target>.magnitude.out   (out,)      or      <target>.magnitude.in   (in,)

Laws: `read_record(write_record(r)) == r` bit for bit, and equal records have equal bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from scumble.errors import IntegrityError, Refused
from scumble_registry.compatibility import Shape
from scumble_registry.formats.safetensors_header import Array, read_header, read_tensors, write

_METADATA = {"format": "scumble.lora.1"}
_MAX_SCALE = 1e3
_MAGNITUDES = (".magnitude.out", ".magnitude.in")


@dataclass(frozen=True, slots=True, eq=False)
class Magnitude:
    """lengths (out,) on axis 0, (in,) on axis 1."""

    lengths: Array
    axis: int


@dataclass(frozen=True, slots=True, eq=False)
class LoraModule:
    """ΔW = alpha / rank · up @ down, at weight 1. `down` (r, in[, k, k]), `up` (out, r[, 1, 1]).

    With a magnitude W + ΔW is also brought to that length, by row (axis 0) or by column (axis 1).
    """

    down: Array
    up: Array
    alpha: float
    """Representable in fp32, so that storing it changes nothing."""
    magnitude: Magnitude | None = None

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> Shape:
        """Of the weight that it changes: (out, in) or (out, in, k, k)."""
        return (int(self.up.shape[0]), *(int(size) for size in self.down.shape[1:]))


LoraRecord: TypeAlias = dict[str, LoraModule]
"""Canonical target name → module, sorted."""


def make_module(
    target: str, down: Array, up: Array, alpha: float | None, magnitude: Magnitude | None = None
) -> LoraModule:
    """A checked module; no alpha means alpha = rank. Raises Refused, naming the target."""
    if not (down.ndim == up.ndim and down.ndim in {2, 4} and down.shape[0] == up.shape[1]):
        raise Refused(f"{target}: down {down.shape} and up {up.shape} are no factors of one matrix", target=target)
    if 0 in down.shape or 0 in up.shape:
        raise Refused(f"{target}: an empty factor, down {down.shape}, up {up.shape}", target=target)
    if up.ndim == 4 and up.shape[2:] != (1, 1):
        raise Refused(f"{target}: up {up.shape} of a convolution must end in 1x1", target=target)
    rank = int(down.shape[0])
    alpha = float(np.float32(rank if alpha is None else alpha))
    if not math.isfinite(alpha) or not 0 < abs(alpha) / rank <= _MAX_SCALE:
        raise Refused(f"{target}: alpha {alpha} at rank {rank}; alpha/rank must be within ±{_MAX_SCALE:g}, not 0")
    if magnitude is not None and magnitude.lengths.shape != ((up.shape[0],), (down.shape[1],))[magnitude.axis]:
        raise Refused(
            f"{target}: magnitudes of shape {magnitude.lengths.shape} fit neither rows nor columns of its weight",
            target=target,
        )
    return LoraModule(down, up, alpha, magnitude)


def read_magnitude(target: str, values: Array, up: Array, down: Array, *, convolution_axis: int) -> Magnitude:
    """Of a file's tensor: (out,), (out, 1[, 1, 1]), (1, in[, 1, 1]).

    Four dimensions that begin with 1 are PEFT's (1, out, 1, 1), or kohya's (1, in, 1, 1): `convolution_axis` says.
    """
    lengths = values.reshape(-1)
    if values.ndim == 1 or values.shape == (up.shape[0], *(1,) * (values.ndim - 1)):
        return Magnitude(lengths, 0)
    if values.ndim in {2, 4} and values.shape[0] == 1 and values.size == values.shape[1]:
        return Magnitude(lengths, convolution_axis if values.ndim == 4 else 1)
    raise Refused(
        f"{target}: magnitudes of shape {values.shape} beside down {down.shape} and up {up.shape}", target=target
    )


def write_record(record: LoraRecord) -> bytes:
    tensors: dict[str, Array] = {}
    for target, module in record.items():
        tensors[f"{target}.down"] = module.down
        tensors[f"{target}.up"] = module.up
        tensors[f"{target}.alpha"] = np.array(module.alpha, dtype="<f4")
        if module.magnitude is not None:
            tensors[target + _MAGNITUDES[module.magnitude.axis]] = module.magnitude.lengths
    return write(tensors, _METADATA)


def read_record(path: Path) -> LoraRecord:
    """Arrays are read-only views of the mapped file. Raises IntegrityError if this is no record."""
    try:
        header = read_header(path)
        if header.metadata != _METADATA:
            raise Refused(f"its metadata is {header.metadata}, not {_METADATA}")
        tensors = read_tensors(path, header)
        targets = sorted(name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha"))
        magnitudes = sum(name.endswith(_MAGNITUDES) for name in tensors)
        if len(tensors) != 3 * len(targets) + magnitudes:
            raise Refused("it has tensors that belong to no target")
        return {name: _module(name, tensors) for name in targets}
    except (Refused, KeyError) as error:
        raise IntegrityError(f"{path} is not a LoRA record: {error}; clear the cache and try again") from error


def _module(target: str, tensors: dict[str, Array]) -> LoraModule:
    found = [(axis, tensors[target + end]) for axis, end in enumerate(_MAGNITUDES) if target + end in tensors]
    magnitude = Magnitude(found[0][1], found[0][0]) if found else None
    alpha = float(tensors[f"{target}.alpha"])
    return make_module(target, tensors[f"{target}.down"], tensors[f"{target}.up"], alpha, magnitude)
