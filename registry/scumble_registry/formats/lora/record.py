"""The record of a LoRA: every layout and algorithm, module by module, in the form that the server reads.

A canonical safetensors file. For each target (named as in `compatibility/targets.py`) it holds the tensors of one of
these changes of the base's weight W (out, in[, k, k]), here at weight 1:

    factors    .down (r, in[, k, k])  .up (out, r[, 1, 1])  .alpha ()       W + alpha / r · up @ down
               and for GLoRA .inner.down (r, in)  .inner.up (in, r)         … + alpha / r · W (inner.up @ inner.down)
    product    .first.up (out, r) .first.down (r, in·k·k) .second.up …      W + alpha / r · (u₁ d₁) ∘ (u₂ d₂)
               .product.alpha () .shape
    kronecker  .left (l, m)  .right (p, q[, k, k])                          W + left ⊗ right
    dense      .delta, like W; for a norm (channels,)                       W + delta
    gain       .gain.out (out,) or .gain.in (in,); .gain.bias (out,)        W, rows or columns times 1 + gain
    rotation   .rotation.out or .rotation.in (m, n, b, b); .rescale (out,)  W, rotated block by block (`rotation.py`)

A DoRA (Liu et al., 2402.09353) adds the norm to which each row or column of the changed weight is scaled, to any change
but a gain and a rotation; any change may have a change of the layer's bias:

    .magnitude.out (out,)  or  .magnitude.in (in,)         .bias (out,)

Factors are applied row by row of a batch, and so are gains and magnitudes, which scale the weight (`Module.columns`).
All other changes are merged into copies of the weights. Published tensors keep their dtype; computed ones and scalars
are F32.

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
from scumble_registry.formats.floats import largest
from scumble_registry.formats.safetensors_header import Array, Unwritten, read_header, read_tensors

_METADATA = {"format": "scumble.lora.1"}
_MAX_SCALE = 1e3
_MAX_CHANGE = 65504.0  # the largest half
_AXES = ("out", "in")


@dataclass(frozen=True, slots=True, eq=False)
class Magnitude:
    """A DoRA's norms of rows (axis 0; lengths (out,)) or columns (axis 1; lengths (in,))."""

    lengths: Array
    axis: int


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A product up (rows, r) @ down (r, columns)."""

    up: Array
    down: Array


@dataclass(frozen=True, slots=True, eq=False)
class LoraModule:
    """ΔW = alpha / rank · up @ down, at weight 1. `down` (r, in[, k, k]), `up` (out, r[, 1, 1]).

    With a magnitude the rows (axis 0) or columns (axis 1) of W + ΔW are scaled to its norms. `inner`, for GLoRA, adds
    alpha / rank · W (inner.up @ inner.down).
    """

    down: Array
    up: Array
    alpha: float
    """Exactly representable in float32, so that storing it loses nothing."""
    magnitude: Magnitude | None = None
    inner: Pair | None = None
    bias: Array | None = None

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> Shape:
        """Shape of the weight that it changes: (out, in) or (out, in, k, k)."""
        return (int(self.up.shape[0]), *(int(size) for size in self.down.shape[1:]))

    @property
    def columns(self) -> int | None:
        """Rank columns in a row; None with a bias, and for `inner` with a magnitude or k×k kernel: no factors fit."""
        if self.bias is not None or (self.inner is not None and (self.shape[2:] not in {(), (1, 1)} or self.magnitude)):
            return None
        return self.rank if self.inner is None else 2 * self.rank

    @property
    def reads_weights(self) -> bool:
        return self.magnitude is not None or self.inner is not None


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """ΔW = alpha / r · (first.up @ first.down) ∘ (second.up @ second.down), downs (r, in·k·k), r the first's."""

    first: Pair
    second: Pair
    alpha: float
    shape: Shape
    magnitude: Magnitude | None = None
    bias: Array | None = None
    columns: int | None = None
    reads_weights: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / self.first.up.shape[1]


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker:
    """ΔW = left (l, m) ⊗ right (p, q[, k, k]), in each tap."""

    left: Array
    right: Array
    magnitude: Magnitude | None = None
    bias: Array | None = None
    columns: int | None = None
    reads_weights: bool = False

    @property
    def shape(self) -> Shape:
        (left_out, left_in), (out, into, *kernel) = self.left.shape, self.right.shape
        return (left_out * out, left_in * into, *kernel)


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """ΔW itself, of a layer or a norm; `delta` is None where only the bias changes."""

    delta: Array | None
    magnitude: Magnitude | None = None
    bias: Array | None = None
    columns: int | None = None
    reads_weights: bool = False

    @property
    def shape(self) -> Shape | None:
        return None if self.delta is None else tuple(int(size) for size in self.delta.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Gain:
    """W times 1 + values, by row (axis 0) or column (axis 1); the layer's bias times 1 + `of_bias` (out,)."""

    values: Array
    axis: int
    of_bias: Array | None = None
    bias: Array | None = None
    shape: Shape | None = None
    magnitude: None = None
    reads_weights: bool = False

    @property
    def columns(self) -> int | None:
        return 0 if self.of_bias is None and self.bias is None else None


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """Rows (axis 0) or columns (axis 1) of W rotated by m stages of n blocks (m, n, b, b); then rows rescaled."""

    blocks: Array
    axis: int
    rescale: Array | None = None
    bias: Array | None = None
    shape: Shape | None = None
    magnitude: None = None
    columns: int | None = None
    reads_weights: bool = False


Module: TypeAlias = LoraModule | Product | Kronecker | Dense | Gain | Rotation
"""One target's change. `shape` is W's, None where the file does not determine it. `columns` are the rank columns in a
row, 0 for a gain alone; None: the change is merged into copies of the weights."""
LoraRecord: TypeAlias = dict[str, Module]
"""Canonical target name → module, sorted."""


def row_columns(target: str, module: Module) -> int | None:
    """Return `columns`, or None for a layer that takes no factors in any graph: the projection of pooled text."""
    return None if target.endswith(".text_projection") else module.columns


def make_module(
    target: str,
    down: Array,
    up: Array,
    alpha: float | None,
    magnitude: Magnitude | None = None,
    inner: Pair | None = None,
    bias: Array | None = None,
) -> LoraModule:
    """Check the factors and return a module; no alpha means alpha = rank. Raises Refused, naming the target."""
    if not (down.ndim == up.ndim and down.ndim in {2, 4} and down.shape[0] == up.shape[1]):
        raise Refused(f"{target}: down {down.shape} and up {up.shape} are no factors of one matrix", target=target)
    if 0 in down.shape or 0 in up.shape:
        raise Refused(f"{target}: an empty factor, down {down.shape}, up {up.shape}", target=target)
    if up.ndim == 4 and up.shape[2:] != (1, 1):
        raise Refused(f"{target}: up {up.shape} of a convolution must end in 1x1", target=target)
    rank = int(down.shape[0])
    alpha = float(np.float32(rank if alpha is None else alpha))
    check_scale(target, alpha / rank, f"alpha {alpha} at rank {rank}; alpha/rank")
    if inner is not None and (inner.up.shape, inner.down.shape) != ((down.shape[1], rank), (rank, down.shape[1])):
        raise Refused(
            f"{target}: {inner.up.shape} and {inner.down.shape} do not fit an input of {down.shape[1]} channels "
            f"at rank {rank}",
            target=target,
        )
    module = LoraModule(down, up, alpha, magnitude, inner, bias)
    check_module(target, module)
    _check_size(target, down, up, abs(module.scale))
    return module


def check_scale(target: str, scale: float, what: str = "its scale") -> None:
    """Raises Refused, naming the target, for a scale that is 0, not finite or too large."""
    if not math.isfinite(scale) or not 0 < abs(scale) <= _MAX_SCALE:
        raise Refused(f"{target}: {what} must be within ±{_MAX_SCALE:g}, not 0", target=target)


def check_module(target: str, module: Module, shape: Shape | None = None) -> None:
    """Check the lengths of magnitudes and bias; `shape` is the base's, for a module without shape.

    Raises Refused, naming the target.
    """
    shape = module.shape or shape
    if module.magnitude is not None and shape is not None:
        lengths = module.magnitude.lengths
        if len(shape) < 2 or lengths.shape != (shape[module.magnitude.axis],):
            raise Refused(
                f"{target}: magnitudes of shape {lengths.shape} fit neither rows nor columns of its weight",
                target=target,
            )
    for vector in (module.bias, module.of_bias if isinstance(module, Gain) else None):
        if vector is not None and (vector.ndim != 1 or (shape is not None and len(vector) != shape[0])):
            raise Refused(f"{target}: a bias of shape {vector.shape} beside a weight of {shape}", target=target)


def _check_size(target: str, down: Array, up: Array, scale: float) -> None:
    """Check that half precision can hold ΔW, by an upper bound, without computing ΔW. Raises Refused."""
    with np.errstate(over="ignore"):
        columns = largest(up.reshape(len(up), -1), 0)
        rows = largest(down.reshape(len(down), -1), 1)
    if not columns @ rows * scale <= _MAX_CHANGE:
        raise Refused(
            f"{target}: its change of the weight may be as large as {columns @ rows * scale:g}, beyond half "
            "precision; the training went wrong",
            target=target,
        )


def write_record(record: LoraRecord) -> bytes:
    return b"".join(unwritten(record).chunks())


def unwritten(record: LoraRecord) -> Unwritten:
    """Return the record's content, to be written tensor by tensor."""
    tensors: dict[str, Array] = {}
    for target, module in record.items():
        tensors |= {f"{target}.{part}": values for part, values in _parts(module).items()}
    return Unwritten(tensors, _METADATA)


def _parts(module: Module) -> dict[str, Array]:
    parts: dict[str, Array | None] = {"bias": module.bias}
    if module.magnitude is not None:
        parts[f"magnitude.{_AXES[module.magnitude.axis]}"] = module.magnitude.lengths
    match module:
        case LoraModule():
            parts |= {"down": module.down, "up": module.up, "alpha": _scalar(module.alpha)}
            if module.inner is not None:
                parts |= {"inner.down": module.inner.down, "inner.up": module.inner.up}
        case Product():
            parts |= {"first.up": module.first.up, "first.down": module.first.down}
            parts |= {"second.up": module.second.up, "second.down": module.second.down}
            parts |= {"product.alpha": _scalar(module.alpha), "shape": np.array(module.shape, dtype="<i4")}
        case Kronecker():
            parts |= {"left": module.left, "right": module.right}
        case Dense():
            parts["delta"] = module.delta
        case Gain():
            parts |= {f"gain.{_AXES[module.axis]}": module.values, "gain.bias": module.of_bias}
        case Rotation():
            parts |= {f"rotation.{_AXES[module.axis]}": module.blocks, "rescale": module.rescale}
    return {part: values for part, values in parts.items() if values is not None}


_PARTS = (
    *("second.down", "second.up", "first.down", "first.up", "inner.down", "inner.up", "down", "up"),
    *("product.alpha", "alpha", "shape", "left", "right", "delta", "gain.bias", "bias", "gain.out", "gain.in"),
    *("rotation.out", "rotation.in", "rescale", "magnitude.out", "magnitude.in"),
)
"""Names of parts; a name comes before its own ends: `inner.down` before `down`."""


def read_record(path: Path) -> LoraRecord:
    """Read a record as read-only views of the mapped file. Raises IntegrityError if this is no record."""
    try:
        header = read_header(path)
        if header.metadata != _METADATA:
            raise Refused(f"its metadata is {header.metadata}, not {_METADATA}")
        by_target: dict[str, dict[str, Array]] = {}
        for name, values in read_tensors(path, header).items():
            part = next((part for part in _PARTS if name.endswith(f".{part}")), None)
            if part is None:
                raise Refused("it has unknown tensors")
            by_target.setdefault(name.removesuffix(f".{part}"), {})[part] = values
        return {target: _module(target, by_target[target]) for target in sorted(by_target)}
    except (Refused, KeyError, StopIteration, ValueError) as error:
        raise IntegrityError(f"{path} is not a LoRA record: {error}; clear the cache and try again") from error


def _module(target: str, parts: dict[str, Array]) -> Module:
    bias, magnitude = parts.get("bias"), None
    for axis, word in enumerate(_AXES):
        if f"magnitude.{word}" in parts:
            magnitude = Magnitude(parts[f"magnitude.{word}"], axis)
    if "down" in parts:
        inner = Pair(parts["inner.up"], parts["inner.down"]) if "inner.up" in parts else None
        return make_module(target, parts["down"], parts["up"], float(parts["alpha"]), magnitude, inner, bias)
    if "first.up" in parts:
        first, second = (Pair(parts[f"{half}.up"], parts[f"{half}.down"]) for half in ("first", "second"))
        return Product(first, second, float(parts["product.alpha"]), tuple(map(int, parts["shape"])), magnitude, bias)
    if "left" in parts:
        return Kronecker(parts["left"], parts["right"], magnitude, bias)
    for axis, word in enumerate(_AXES):
        if f"gain.{word}" in parts:
            return Gain(parts[f"gain.{word}"], axis, parts.get("gain.bias"), bias)
        if f"rotation.{word}" in parts:
            return Rotation(parts[f"rotation.{word}"], axis, parts.get("rescale"), bias)
    if "delta" not in parts and bias is None:
        raise Refused(f"{target} has no part that changes it")
    return Dense(parts.get("delta"), magnitude, bias)


def _scalar(value: float) -> Array:
    return np.array(value, dtype="<f4")
