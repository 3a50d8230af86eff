"""What an IP-Adapter of a request looks at: pictures, embeddings of faces, and how much of it in each layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scumble.errors import InvalidRequest
from scumble_registry.compatibility import IpAdapterCompatibility
from scumble_server.methods.ip_adapter.layer_scales import layer_scales
from scumble_server.request.adapter import ResolvedAdapter


def compatibility_of(adapter: ResolvedAdapter) -> IpAdapterCompatibility:
    compatibility = adapter.version.manifest.compatibility
    assert isinstance(compatibility, IpAdapterCompatibility)
    return compatibility


def picture_count(adapter: ResolvedAdapter) -> int:
    """How many pictures, or faces, it looks at."""
    return len(adapter.pictures) or len(faces_of(adapter))


def scales_of(adapter: ResolvedAdapter) -> list[dict[str, float]]:
    """For each picture: canonical name of a cross-attention → `scale` times `blocks`. Raises InvalidRequest."""
    attentions = list(compatibility_of(adapter).attentions)
    scale = 1.0 if adapter.spec.scale is None else adapter.spec.scale
    scales = layer_scales(scale, attentions, picture_count(adapter), masked=bool(adapter.masks))
    blocks = adapter.blocks
    if blocks is None:
        return scales
    return [{name: value * blocks.of(name) for name, value in of_picture.items()} for of_picture in scales]


def faces_of(adapter: ResolvedAdapter) -> NDArray[np.float32]:
    """(n, E): the embeddings that it names, in that order; each comes as (E,) or (n, E)."""
    named = [adapter.tensors[name] for name in adapter.spec.images if name in adapter.tensors]
    rows = [np.atleast_2d(values).astype(np.float32) for values in named]
    return np.ascontiguousarray(np.concatenate(rows)) if rows else np.zeros((0, 0), np.float32)


def check_inputs(adapter: ResolvedAdapter) -> None:
    """Raises InvalidRequest."""
    compatibility, ref = compatibility_of(adapter), adapter.spec.ref
    width = compatibility.embedding_width
    if width is None and adapter.tensors:
        raise _wrong(f"{ref} reads pictures, not embeddings; send {next(iter(adapter.tensors))!r} in images")
    if width is not None:
        _check_faces(adapter, width)
    if compatibility.picture_width is None and adapter.pictures:
        raise _wrong(
            f"{ref} reads embeddings of faces, not pictures: send what a face recogniser makes of "
            f"{adapter.pictures[0].name!r} (width {width}) in tensors"
        )
    if compatibility.picture_width is not None and not adapter.pictures:
        raise _wrong(f"{ref} is an IP-Adapter and needs a picture: send one in images and name it in the adapter's")
    if width is not None and adapter.pictures and len(faces_of(adapter)) != len(adapter.pictures):
        raise _wrong(
            f"{ref} reads a picture and an embedding of each face; {len(adapter.pictures)} pictures and "
            f"{len(faces_of(adapter))} embeddings were named"
        )


def _check_faces(adapter: ResolvedAdapter, width: int) -> None:
    if not adapter.tensors:
        raise _wrong(
            f"{adapter.spec.ref} is a FaceID IP-Adapter and needs the embedding of a face (width {width}, by the face "
            "recogniser that it was trained with): send it in tensors and name it in the adapter's images"
        )
    for name, values in adapter.tensors.items():
        if values.ndim not in {1, 2} or 0 in values.shape or values.shape[-1] != width:
            raise _wrong(
                f"tensor {name!r} has shape {values.shape}; {adapter.spec.ref} reads ({width},) or (n, {width})"
            )


def _wrong(problem: str) -> InvalidRequest:
    return InvalidRequest(problem, field="adapters.images")
