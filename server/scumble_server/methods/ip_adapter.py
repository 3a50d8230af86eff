"""IP-Adapter: pictures become keys and values beside the text's, in every cross-attention (Ye et al., 2308.06721).

Several pictures in one adapter share a softmax, as in diffusers; where they have masks, each has its own, and so has
each adapter. FaceID kinds read embeddings that the caller brings; their LoRA joins the request's LoRAs at the
adapter's weight, so that weight 0 is the base (in diffusers it stays).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from scumble.errors import InvalidRequest
from scumble_build import ip_adapter as graph
from scumble_registry.compatibility import IpAdapterCompatibility
from scumble_registry.formats.ip_adapter import KIND, read_record
from scumble_server import image_encoders
from scumble_server.areas import area
from scumble_server.base import Base
from scumble_server.bound import Bound
from scumble_server.carried import RowImages
from scumble_server.context import Context
from scumble_server.layer_scales import layer_scales

FIELDS = frozenset({"images", "masks", "scale", "blocks", "start", "end"})


@dataclass(frozen=True, slots=True)
class Groups:
    """What the IP-Adapters of one request become: G groups with a softmax each, as `RowImages` has them.

    `adapters[g]` is the place of group g's adapter among the request's IP-Adapters.
    """

    kv: Tensor
    tokens: Tensor
    areas: Tensor | None
    adapters: tuple[int, ...]


def check(bound: Bound, base: Base) -> None:
    """Pictures, embeddings and masks must be there, fit, and be as many as each other.

    Raises InvalidRequest, or Refused where there is no image encoder.
    """
    _check_inputs(bound)
    count = picture_count(bound)
    if len(bound.masks) not in {0, count}:
        raise InvalidRequest(
            f"{bound.spec.ref}: {len(bound.masks)} masks for {count} pictures; name one for each, or none",
            field="adapters.masks",
        )
    _layer_scales(bound)
    image_encoders.check(bound, base)


def check_together(adapters: Sequence[Bound], base: Base) -> None:
    """Any number may act at once."""


def idle(bound: Bound, steps: int) -> str | None:
    spec = bound.spec
    if spec.weight == 0:
        return "weight 0"
    if not any(spec.is_active(step, steps) for step in range(steps)):
        return f"no step of {steps} lies between start {spec.start:g} and end {spec.end:g}"
    return None


def describe(bound: Bound) -> dict[str, Any]:
    compatibility = compatibility_of(bound)
    return {
        "projection": compatibility.projection,
        "pictures": [picture.digest for picture in bound.pictures],
        "masks": [mask.digest for mask in bound.masks],
        "image_encoder": image_encoders.source_of(bound),
        **({"rank": max(compatibility.lora.ranks.values())} if compatibility.lora is not None else {}),
    }


def compatibility_of(bound: Bound) -> IpAdapterCompatibility:
    compatibility = bound.version.manifest.compatibility
    assert isinstance(compatibility, IpAdapterCompatibility)
    return compatibility


def picture_count(bound: Bound) -> int:
    """How many pictures, or faces, it looks at."""
    return len(bound.pictures) or len(_faces(bound))


def groups(context: Context, adapters: Sequence[Bound]) -> Groups | None:
    """Made once for all requests that ask for the same; None without adapters. Raises what `place_of` raises."""
    if not adapters:
        return None
    looks = [_Look.of(context, bound) for bound in adapters]
    places = tuple(index for index, look in enumerate(looks) for _ in range(look.groups))
    lengths = torch.tensor([looks[index].length for index in places])
    longest = int(lengths.max())
    width = sum(2 * place.width for place in context.executor.kv_slices)
    nbytes = context.rows * len(places) * longest * width * context.executor.dtype.itemsize
    kv = context.device.get(
        ("ip_adapter.kv", context.rows, *(look.key for look in looks)),
        nbytes,
        lambda: torch.cat([_padded(_keys_and_values(context, look), longest) for look in looks], dim=1),
    )
    return Groups(kv, torch.arange(longest) < lengths[:, None], _areas(context, looks), places)


def row_images(made: Groups | None, weights: Sequence[float]) -> RowImages | None:
    """`weights[i]` is IP-Adapter i's in this phase; None where none acts."""
    if made is None or not any(weights):
        return None
    scale = torch.tensor([weights[index] for index in made.adapters])
    return RowImages(made.kv, made.tokens, scale.expand(made.kv.shape[0], -1), made.areas)


@dataclass(frozen=True, slots=True)
class _Look:
    """One adapter of a request with what it looks at. `length` is the number of tokens in each of its groups."""

    bound: Bound
    encoder: image_encoders.Place | None
    length: int

    @classmethod
    def of(cls, context: Context, bound: Bound) -> _Look:
        reads_pictures = compatibility_of(bound).picture_width is not None
        encoder = image_encoders.place_of(context, bound) if reads_pictures else None
        tokens = compatibility_of(bound).tokens
        if tokens is None:
            assert encoder is not None
            tokens = encoder.positions
        return cls(bound, encoder, tokens * (1 if bound.masks else picture_count(bound)))

    @property
    def groups(self) -> int:
        return len(self.bound.masks) or 1

    @property
    def key(self) -> Hashable:
        """All that its keys and values are made of."""
        return (
            self.bound.version.digest,
            self.encoder.key if self.encoder is not None else None,
            tuple(picture.digest for picture in self.bound.pictures),
            hashlib.sha256(_faces(self.bound).tobytes()).digest(),
            json.dumps(self.bound.spec.scale, sort_keys=True),
            self.bound.blocks,
            bool(self.bound.masks),
        )


@torch.inference_mode()
def _keys_and_values(context: Context, look: _Look) -> Tensor:
    """(1|2, groups, tokens, K), layer scales folded into the values."""
    bound, slices = look.bound, context.executor.kv_slices
    adapter = _weights(context, bound)
    embedding, states = _read(context, look)
    tokens = adapter.tokens(
        embedding.flatten(0, 1) if embedding is not None else None, states.flatten(0, 1) if states is not None else None
    )
    kv: Tensor = adapter(tokens).unflatten(0, (context.rows, -1))
    scales = torch.stack([graph.layer_scales(slices, of_picture) for of_picture in _layer_scales(bound)])
    kv = kv * scales[:, None].to(kv)
    return kv if bound.masks else kv.flatten(1, 2)[:, None]


def _read(context: Context, look: _Look) -> tuple[Tensor | None, Tensor | None]:
    """Embeddings (1|2, n, E) and states (1|2, n, N, C) of n pictures, as far as this kind reads them.

    For the negative prompt an embedding is zeros, and the states are those of a picture of zeros.
    """
    bound, guided = look.bound, context.settings.guided
    compatibility = compatibility_of(bound)
    embedding: Tensor | None = None
    states: Tensor | None = None
    if look.encoder is not None:
        encoded = [image_encoders.encode(context, look.encoder, picture) for picture in bound.pictures]
        if compatibility.projection == "base":
            embedding = torch.cat([each.embedding for each in encoded])
        else:
            states = torch.cat([each.states for each in encoded])
            nothing = image_encoders.encode(context, look.encoder, None).states.expand_as(states) if guided else None
            states = torch.stack([nothing, states] if nothing is not None else [states])
    if compatibility.embedding_width is not None:
        embedding = torch.from_numpy(_faces(bound)).to(context.executor.device, context.executor.dtype)
    if embedding is not None:
        embedding = torch.stack([torch.zeros_like(embedding), embedding] if guided else [embedding])
    return embedding, states


def _weights(context: Context, bound: Bound) -> graph.IpAdapter:
    record, dtype = context.record(bound, read_record), context.executor.dtype

    def load() -> graph.IpAdapter:
        adapter = graph.IpAdapter(record, compatibility_of(bound), context.executor.kv_slices)
        return adapter.to(context.executor.device, dtype)

    return context.device.get(("ip_adapter", bound.version.digest), record.size * dtype.itemsize, load)


def _areas(context: Context, looks: Sequence[_Look]) -> Tensor | None:
    """(G, P), ones for an adapter without masks; None if none has any."""
    masks = [mask for look in looks for mask in (look.bound.masks or (None,))]
    if not any(masks):
        return None
    settings, base = context.settings, context.base
    size = settings.width, settings.height, base.compatibility.vae_scale, base.blocks.levels
    found = [area(mask.pixels, *size) if mask is not None else None for mask in masks]
    positions = next(len(each) for each in found if each is not None)
    return torch.stack([torch.ones(positions) if each is None else each for each in found])


def _padded(kv: Tensor, tokens: int) -> Tensor:
    return pad(kv, (0, 0, 0, tokens - kv.shape[2]))


def _layer_scales(bound: Bound) -> list[dict[str, float]]:
    """For each picture, by canonical name of the cross-attention: `scale` times `blocks`. Raises InvalidRequest."""
    attentions = list(compatibility_of(bound).attentions)
    scale = 1.0 if bound.spec.scale is None else bound.spec.scale
    found = layer_scales(scale, attentions, picture_count(bound), masked=bool(bound.masks))
    blocks = bound.blocks
    if blocks is None:
        return found
    return [{name: value * blocks.of(name) for name, value in of_picture.items()} for of_picture in found]


def _faces(bound: Bound) -> NDArray[np.float32]:
    """(n, E): the embeddings that it names, in that order; each comes as (E,) or (n, E)."""
    named = [bound.tensors[name] for name in bound.spec.images if name in bound.tensors]
    rows = [np.atleast_2d(values).astype(np.float32) for values in named]
    return np.ascontiguousarray(np.concatenate(rows)) if rows else np.zeros((0, 0), np.float32)


def _check_inputs(bound: Bound) -> None:
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
    if width is not None and bound.pictures and len(_faces(bound)) != len(bound.pictures):
        raise _wrong(
            f"{ref} reads a picture and an embedding of each face; {len(bound.pictures)} pictures and "
            f"{len(_faces(bound))} embeddings were named"
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


__all__ = [
    "FIELDS",
    "KIND",
    "Groups",
    "check",
    "check_together",
    "describe",
    "groups",
    "idle",
    "read_record",
    "row_images",
]
