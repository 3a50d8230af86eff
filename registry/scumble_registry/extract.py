"""Extract a LoRA from a checkpoint: the nearest factors of a given rank, by singular values.

W' − W = U S Vᵀ is cut to its r largest singular values and split into U√S and √S Vᵀ (kohya's and LyCORIS' extraction
without their clamping). The energy kept is Σ s² of the r largest over Σ s² of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scumble.errors import InvalidRequest, Refused
from scumble_registry.compatibility import BaseCompatibility, canonical_name
from scumble_registry.formats import format_of
from scumble_registry.formats.checkpoint.text import plain
from scumble_registry.formats.lora import FILE_NAME
from scumble_registry.formats.safetensors_header import Array, read_header, read_tensors, write
from scumble_registry.registry import Registry
from scumble_registry.store.catalogue import Version


@dataclass(frozen=True, slots=True)
class _Layer:
    """The factors of a changed target: down (r, in[, k, k]), up (out, r[, 1, 1]); Σ s² that they keep, and of all."""

    target: str
    down: Array
    up: Array
    kept: float
    energy: float


def extract(registry: Registry, ref: str, rank: int, name: str, work: Path, *, alias: str | None = None) -> Version:
    """Publish factors of the checkpoint `ref` as LoRA `name`; its metrics hold the energy kept. `work` is scratch.

    Raises InvalidRequest, NotFound, Refused (no checkpoint, or it changes nothing that takes factors).
    """
    if rank < 1:
        raise InvalidRequest(f"rank is {rank}; 1 at least", field="rank")
    version = registry.resolve(ref)
    difference = format_of(version.manifest.kind).difference
    if difference is None:
        raise Refused(f"{version.ref} is a {version.manifest.kind}; factors are extracted from checkpoints", ref=ref)
    base = registry.base_of(version)
    folder = registry.stored(base)
    changed = difference.read_changed(registry.stored(version), folder)
    layers, left = _factorise(changed, folder, base.manifest.as_base(base.ref), rank)
    if not layers:
        raise Refused(f"{version.ref} changes no matrix or convolution that takes factors: {', '.join(left)}")
    tensors = {f"{layer.target}.lora_A.weight": layer.down for layer in layers}
    tensors |= {f"{layer.target}.lora_B.weight": layer.up for layer in layers}
    (work / FILE_NAME).write_bytes(write(tensors, {"format": "pt"}))
    return registry.publish(
        work / FILE_NAME,
        name,
        base=base.ref,
        alias=alias,
        license=version.manifest.license,
        trigger_words=version.manifest.trigger_words,
        provenance={"extracted_from": version.digest, "rank": rank},
        metrics=_metrics(layers, left),
    )


def _factorise(
    changed: dict[str, dict[str, Array]], base_folder: Path, base: BaseCompatibility, rank: int
) -> tuple[list[_Layer], list[str]]:
    """Return the factors of all changed matrices and convolutions, and the names of the other changed tensors."""
    layers: list[_Layer] = []
    left: list[str] = []
    for component, name, before, after in _pairs(changed, base_folder):
        target = canonical_name(f"{component}.{name.removesuffix('.weight')}")
        if before is None or not name.endswith(".weight") or target not in base.targets:
            left.append(f"{component}.{name}")
            continue
        layers.append(_factors(target, after.astype(np.float32) - before.astype(np.float32), rank))
    return layers, sorted(left)


def _pairs(changed: dict[str, dict[str, Array]], base_folder: Path) -> Iterator[tuple[str, str, Array | None, Array]]:
    """Yield component, tensor's name, the base's values (None if it has none of this shape) and the checkpoint's."""
    for component, tensors in changed.items():
        own: dict[str, Array] = {}
        for file in (base_folder / component).glob("*.safetensors"):
            own |= {plain(name): values for name, values in read_tensors(file, read_header(file)).items()}
        for name, after in sorted(tensors.items()):
            before = own.get(name)
            yield component, name, before if before is not None and before.shape == after.shape else None, after


def _factors(target: str, delta: Array, rank: int) -> _Layer:
    matrix = delta.reshape(len(delta), -1)
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    rank = min(rank, len(s))
    root = np.sqrt(s[:rank])
    down, up = np.ascontiguousarray(root[:, None] * v[:rank]), np.ascontiguousarray(u[:, :rank] * root)
    ones = (1,) * (delta.ndim - 2)
    squares = s.astype(np.float64) ** 2
    return _Layer(
        target,
        down.reshape(rank, *delta.shape[1:]),
        up.reshape(len(delta), rank, *ones),
        float(squares[:rank].sum()),
        float(squares.sum()),
    )


def _metrics(layers: list[_Layer], left: list[str]) -> dict[str, Any]:
    total = sum(layer.energy for layer in layers)
    return {
        "energy_kept": round(sum(layer.kept for layer in layers) / total, 6),
        "energy_kept_by_layer": {layer.target: round(layer.kept / layer.energy, 6) for layer in layers},
        "not_expressed": left,
    }
