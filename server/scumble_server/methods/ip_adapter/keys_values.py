"""The pictures of the IP-Adapters of one request → keys and values, in groups with a softmax each."""

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
from scumble_server.methods.context import Context
from scumble_server.methods.image_encoders import ImageEncoderLocation, encode, encoder_of
from scumble_server.methods.ip_adapter.inputs import compatibility_of, faces_of, picture_count, scales_of
from scumble_server.methods.ip_adapter.masks import area
from scumble_server.request.adapter import ResolvedAdapter


@dataclass(frozen=True, slots=True)
class Groups:
    """G groups with a softmax each, as `ImagesPart` has them, but kv `(1|2, G, T, K)` for each side of the request.

    `adapters[g]` is the adapter of group g.
    """

    kv: Tensor
    tokens: Tensor
    areas: Tensor | None
    adapters: tuple[ResolvedAdapter, ...]


def groups_of(context: Context, adapters: Sequence[ResolvedAdapter]) -> Groups:
    """Make the groups of at least one adapter, once for all requests that ask for the same.

    Raises what `encoder_of` raises.
    """
    looks = [_Look.of(context, adapter) for adapter in adapters]
    of_group = [look for look in looks for _ in range(look.groups)]
    lengths = torch.tensor([look.length for look in of_group])
    longest = int(lengths.max())
    width = sum(2 * attention.width for attention in context.executor.kv_slices)
    nbytes = context.sides * len(of_group) * longest * width * context.executor.dtype.itemsize
    kv = context.device.get(
        ("ip_adapter.kv", context.sides, *(look.key for look in looks)),
        nbytes,
        lambda: torch.cat([_padded(_keys_and_values(context, look), longest) for look in looks], dim=1),
    )
    adapters_of_groups = tuple(look.adapter for look in of_group)
    return Groups(kv, torch.arange(longest) < lengths[:, None], _areas(context, looks), adapters_of_groups)


@dataclass(frozen=True, slots=True)
class _Look:
    """One adapter of a request with what it looks at. `length` is the number of tokens in each of its groups."""

    adapter: ResolvedAdapter
    encoder: ImageEncoderLocation | None
    length: int

    @classmethod
    def of(cls, context: Context, adapter: ResolvedAdapter) -> _Look:
        reads_pictures = compatibility_of(adapter).picture_width is not None
        encoder = encoder_of(context, adapter) if reads_pictures else None
        tokens = compatibility_of(adapter).tokens
        if tokens is None:
            assert encoder is not None
            tokens = encoder.positions
        return cls(adapter, encoder, tokens * (1 if adapter.masks else picture_count(adapter)))

    @property
    def groups(self) -> int:
        return len(self.adapter.masks) or 1

    @property
    def key(self) -> Hashable:
        """All that its keys and values are made of."""
        return (
            self.adapter.version.digest,
            self.encoder.key if self.encoder is not None else None,
            tuple(picture.digest for picture in self.adapter.pictures),
            hashlib.sha256(faces_of(self.adapter).tobytes()).digest(),
            json.dumps(self.adapter.spec.scale, sort_keys=True),
            self.adapter.blocks,
            bool(self.adapter.masks),
        )


@torch.inference_mode()
def _keys_and_values(context: Context, look: _Look) -> Tensor:
    """(1|2, groups, tokens, K), layer scales folded into the values."""
    adapter, slices = look.adapter, context.executor.kv_slices
    network = _network(context, adapter)
    embedding, states = _read(context, look)
    tokens = network.tokens(
        embedding.flatten(0, 1) if embedding is not None else None, states.flatten(0, 1) if states is not None else None
    )
    kv: Tensor = network(tokens).unflatten(0, (context.sides, -1))
    scales = torch.stack([layer_scales(slices, of_picture) for of_picture in scales_of(adapter)])
    kv = kv * scales[:, None].to(kv)
    return kv if adapter.masks else kv.flatten(1, 2)[:, None]


def _read(context: Context, look: _Look) -> tuple[Tensor | None, Tensor | None]:
    """Embeddings (1|2, n, E) and states (1|2, n, N, C) of n pictures, as far as this kind reads them.

    For the negative prompt an embedding is zeros, and the states are those of a picture of zeros.
    """
    adapter, guided = look.adapter, context.sides == 2
    compatibility = compatibility_of(adapter)
    embedding: Tensor | None = None
    states: Tensor | None = None
    if look.encoder is not None:
        encoded = [encode(context, look.encoder, picture) for picture in adapter.pictures]
        if compatibility.projection == "base":
            embedding = torch.cat([picture.embedding for picture in encoded])
        else:
            states = torch.cat([picture.states for picture in encoded])
            nothing = encode(context, look.encoder, None).states.expand_as(states) if guided else None
            states = torch.stack([nothing, states] if nothing is not None else [states])
    if compatibility.embedding_width is not None:
        embedding = torch.from_numpy(faces_of(adapter)).to(context.executor.device, context.executor.dtype)
    if embedding is not None:
        embedding = torch.stack([torch.zeros_like(embedding), embedding] if guided else [embedding])
    return embedding, states


def _network(context: Context, adapter: ResolvedAdapter) -> IpAdapter:
    record, dtype = context.record(adapter, read_record), context.executor.dtype

    def load() -> IpAdapter:
        network = IpAdapter(record, compatibility_of(adapter), context.executor.kv_slices)
        return network.to(context.executor.device, dtype)

    return context.device.get(("ip_adapter", adapter.version.digest), record.size * dtype.itemsize, load)


def _areas(context: Context, looks: Sequence[_Look]) -> Tensor | None:
    """(G, P), ones for an adapter without masks; None if none has any."""
    masks = [mask for look in looks for mask in (look.adapter.masks or (None,))]
    if not any(masks):
        return None
    settings, base = context.settings, context.base
    size = settings.width, settings.height, base.compatibility.vae_scale, base.blocks.levels
    areas = [area(mask.on_black, *size) if mask is not None else None for mask in masks]
    positions = next(len(inside) for inside in areas if inside is not None)
    return torch.stack([torch.ones(positions) if inside is None else inside for inside in areas])


def _padded(kv: Tensor, tokens: int) -> Tensor:
    return pad(kv, (0, 0, 0, tokens - kv.shape[2]))
