"""What an IP-Adapter of a request looks at: pictures, embeddings of faces, and how much of it in each layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scumble.errors import InvalidRequest
from scumble_registry.compatibility import IpAdapterCompatibility
from scumble_server.methods.ip_adapter.layer_scales import layer_scales
from scumble_server.request.adapter import Bound


def compatibility_of(bound: Bound) -> IpAdapterCompatibility:
    compatibility = bound.version.manifest.compatibility
    assert isinstance(compatibility, IpAdapterCompatibility)
    return compatibility


def picture_count(bound: Bound) -> int:
    """How many pictures, or faces, it looks at."""
    return len(bound.pictures) or len(faces_of(bound))


def scales_of(bound: Bound) -> list[dict[str, float]]:
    """For each picture, by canonical name of the cross-attention: `scale` times `blocks`. Raises InvalidRequest."""
    attentions = list(compatibility_of(bound).attentions)
    scale = 1.0 if bound.spec.scale is None else bound.spec.scale
    found = layer_scales(scale, attentions, picture_count(bound), masked=bool(bound.masks))
    blocks = bound.blocks
    if blocks is None:
        return found
    return [{name: value * blocks.of(name) for name, value in of_picture.items()} for of_picture in found]


def faces_of(bound: Bound) -> NDArray[np.float32]:
    """(n, E): the embeddings that it names, in that order; each comes as (E,) or (n, E)."""
    named = [bound.tensors[name] for name in bound.spec.images if name in bound.tensors]
    rows = [np.atleast_2d(values).astype(np.float32) for values in named]
    return np.ascontiguousarray(np.concatenate(rows)) if rows else np.zeros((0, 0), np.float32)


def check_inputs(bound: Bound) -> None:
    """Raises InvalidRequest."""
    compatibility, ref = compatibility_of(bound), bound.spec.ref
    width = compatibility.embedding_width
    if width is None and bound.tensors:
        raise _wrong(f"{ref} reads pictures, not embeddings; send {next(iter(bound.tensors))!r} in images")
    if width is not None:
        _check_faces(bound, width)
    if compatibility.picture_width is None and bound.pictures:
        raise _wrong(
            f"{ref} reads embeddings of faces, not pictures: send what a face recogniser makes of "
            f"{bound.pictures[0].name!r} (width {width}) in tensors"
        )
    if compatibility.picture_width is not None and not bound.pictures:
        raise _wrong(f"{ref} is an IP-Adapter and needs a picture: send one in images and name it in the adapter's")
    if width is not None and bound.pictures and len(faces_of(bound)) != len(bound.pictures):
        raise _wrong(
            f"{ref} reads a picture and an embedding of each face; {len(bound.pictures)} pictures and "
            f"{len(faces_of(bound))} embeddings were named"
        )


def _check_faces(bound: Bound, width: int) -> None:
    if not bound.tensors:
        raise _wrong(
            f"{bound.spec.ref} is a FaceID IP-Adapter and needs the embedding of a face (width {width}, by the face "
            "recogniser that it was trained with): send it in tensors and name it in the adapter's images"
        )
    for name, values in bound.tensors.items():
        if values.ndim not in {1, 2} or 0 in values.shape or values.shape[-1] != width:
            raise _wrong(f"tensor {name!r} has shape {values.shape}; {bound.spec.ref} reads ({width},) or (n, {width})")


def _wrong(problem: str) -> InvalidRequest:
    return InvalidRequest(problem, field="adapters.images")
