"""What the IP-Adapters of one request become: keys and values in groups with a softmax each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from scumble_build.graphs.ip_adapter import IpAdapter, layer_scales
from scumble_registry.formats.ip_adapter import read_record
from scumble_server.denoise.phase import RowImages, spread
from scumble_server.methods import image_encoders
from scumble_server.methods.context import Context
from scumble_server.methods.ip_adapter.inputs import compatibility_of, faces_of, picture_count, scales_of
from scumble_server.methods.ip_adapter.masks import area
from scumble_server.request.adapter import Bound


@dataclass(frozen=True, slots=True)
class Groups:
    """What the IP-Adapters of one request become: G groups with a softmax each, as `RowImages` has them, but kv
    `(1|2, G, T, K)` for each side of the request.

    `adapters[g]` is the place of group g's adapter among the request's IP-Adapters.
    """

    kv: Tensor
    tokens: Tensor
    areas: Tensor | None
    adapters: tuple[int, ...]


def groups(context: Context, adapters: Sequence[Bound]) -> Groups | None:
    """Made once for all requests that ask for the same; None without adapters. Raises what `place_of` raises."""
    if not adapters:
        return None
    looks = [_Look.of(context, bound) for bound in adapters]
    places = tuple(index for index, look in enumerate(looks) for _ in range(look.groups))
    lengths = torch.tensor([looks[index].length for index in places])
    longest = int(lengths.max())
    width = sum(2 * place.width for place in context.executor.kv_slices)
    nbytes = context.sides * len(places) * longest * width * context.executor.dtype.itemsize
    kv = context.device.get(
        ("ip_adapter.kv", context.sides, *(look.key for look in looks)),
        nbytes,
        lambda: torch.cat([_padded(_keys_and_values(context, look), longest) for look in looks], dim=1),
    )
    return Groups(kv, torch.arange(longest) < lengths[:, None], _areas(context, looks), places)


def row_images(made: Groups | None, weights: Sequence[float], rows: int) -> RowImages | None:
    """`weights[i]` is IP-Adapter i's in this phase; None where none acts."""
    if made is None or not any(weights):
        return None
    scale = torch.tensor([weights[index] for index in made.adapters])
    return RowImages(spread(made.kv, rows), made.tokens, scale.expand(rows, -1), made.areas)


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
            hashlib.sha256(faces_of(self.bound).tobytes()).digest(),
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
    kv: Tensor = adapter(tokens).unflatten(0, (context.sides, -1))
    scales = torch.stack([layer_scales(slices, of_picture) for of_picture in scales_of(bound)])
    kv = kv * scales[:, None].to(kv)
    return kv if bound.masks else kv.flatten(1, 2)[:, None]


def _read(context: Context, look: _Look) -> tuple[Tensor | None, Tensor | None]:
    """Embeddings (1|2, n, E) and states (1|2, n, N, C) of n pictures, as far as this kind reads them.

    For the negative prompt an embedding is zeros, and the states are those of a picture of zeros.
    """
    bound, guided = look.bound, context.sides == 2
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
        embedding = torch.from_numpy(faces_of(bound)).to(context.executor.device, context.executor.dtype)
    if embedding is not None:
        embedding = torch.stack([torch.zeros_like(embedding), embedding] if guided else [embedding])
    return embedding, states


def _weights(context: Context, bound: Bound) -> IpAdapter:
    record, dtype = context.record(bound, read_record), context.executor.dtype

    def load() -> IpAdapter:
        adapter = IpAdapter(record, compatibility_of(bound), context.executor.kv_slices)
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
