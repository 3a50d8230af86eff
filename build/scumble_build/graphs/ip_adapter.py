"""IP-Adapter: pictures → tokens → keys and values of every cross-attention (Ye et al., 2308.06721).

They depend on the pictures alone, not on the time step: they are computed once per request, and the step takes them as
an input beside the text's (`denoiser.py`). The projections into tokens are diffusers' own modules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFaceIDImageProjection,
    IPAdapterFaceIDPlusImageProjection,
    IPAdapterFullImageProjection,
    IPAdapterPlusImageProjection,
)
from torch import Tensor, nn

from scumble_build.graphs.arrays import as_tensor
from scumble_build.graphs.denoiser import PREFIX, KVSlice
from scumble_registry.compatibility import IpAdapterCompatibility, IpAdapterKind
from scumble_registry.formats.ip_adapter import IpAdapterRecord
from scumble_registry.formats.safetensors_header import Array

_HEAD = 64
_RESAMPLER = "perceiver_resampler."
_LAYER = re.compile(r"(layers\.\d+\.)(.*)")
_IN_LAYER = {
    "0.norm1": "ln0",
    "0.norm2": "ln1",
    "0.to_q": "attn.to_q",
    "0.to_k": "attn.to_k",
    "0.to_v": "attn.to_v",
    "0.to_out": "attn.to_out.0",
    "1.0": "ff.0",
    "1.1": "ff.1.net.0.proj",
    "1.3": "ff.1.net.2",
}
_NAMES: dict[IpAdapterKind, dict[str, str]] = {
    "base": {"proj": "image_embeds"},
    "full": {"proj.0": "ff.net.0.proj", "proj.2": "ff.net.2", "proj.3": "norm"},
    "plus": {},
    "faceid": {"proj.0": "ff.net.0.proj", "proj.2": "ff.net.2"},
    "faceid_plus": {"proj.0": "proj.net.0.proj", "proj.2": "proj.net.2"},
    "face_resampler": {},
}
"""Published name of a layer → diffusers' name; layers that are not listed have the same name in both."""


class IpAdapter(nn.Module):
    """One adapter's weights, ordered for a graph's flat keys and values. Stateless: any thread may call it."""

    def __init__(
        self, record: IpAdapterRecord, compatibility: IpAdapterCompatibility, slices: Sequence[KVSlice]
    ) -> None:
        super().__init__()
        self.kind = compatibility.projection
        self.shortcut = compatibility.shortcut
        self.projection = _projection(record.projection, compatibility)
        # Keys, then values of every layer, in the order of `KVProjection`: one product for all.
        rows = [part[PREFIX + kv.name] for kv in slices for part in (record.keys, record.values)]
        self.weight = nn.Parameter(torch.cat([as_tensor(values) for values in rows]), requires_grad=False)

    def tokens(self, embedding: Tensor | None, states: Tensor | None) -> Tensor:
        """Project n pictures to tokens (n, T, X).

        embedding (n, E) is the encoder's (`base`) or a face's (`faceid`, `faceid_plus`, `face_resampler`, which reads
        it as one state); states (n, N, C) are the encoder's (`full`, `plus`, `faceid_plus`).
        """
        projection: Any = self.projection
        if self.kind == "faceid_plus":
            return _face_tokens(projection, embedding, states, shortcut=self.shortcut)
        if self.kind == "face_resampler" and embedding is not None:
            states = embedding[:, None]
        tokens: Tensor = projection(embedding if self.kind in {"base", "faceid"} else states)
        return tokens

    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens (n, T, X) to keys and values (n, T, Σ 2·width)."""
        return tokens @ self.weight.T


def layer_scales(slices: Sequence[KVSlice], scales: Mapping[str, float]) -> Tensor:
    """Return (Σ 2·width,), a factor for flat keys and values that gives layer `name` the scale `scales[name]`.

    Only values are scaled, since attention is linear in them; layers that are not in `scales` have 1.
    """
    parts = [torch.full((kv.width,), value) for kv in slices for value in (1.0, scales.get(PREFIX + kv.name, 1.0))]
    return torch.cat(parts)


def _face_tokens(
    projection: IPAdapterFaceIDPlusImageProjection, embedding: Tensor | None, states: Tensor | None, *, shortcut: bool
) -> Tensor:
    """Run the projection as diffusers does, but with states and shortcut as arguments.

    diffusers' own forward reads them from attributes of the module, so two concurrent requests would mix them up.
    """
    face: Tensor = projection.norm(projection.proj(embedding).unflatten(-1, (projection.num_tokens, -1)))
    latents, states = face, projection.proj_in(states)
    for block in projection.layers:
        latents = block(states, latents, latents)
    out: Tensor = projection.norm_out(projection.proj_out(latents))
    return face + out if shortcut else out


def _projection(published: Mapping[str, Array], compatibility: IpAdapterCompatibility) -> nn.Module:
    tensors = _rename({name: as_tensor(values) for name, values in published.items()}, compatibility.projection)
    with torch.device("meta"):  # no random initialisation that would be overwritten
        module = _empty(tensors, compatibility)
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.eval().requires_grad_(requires_grad=False)


def _empty(tensors: Mapping[str, Tensor], compatibility: IpAdapterCompatibility) -> nn.Module:
    kind, tokens, context = compatibility.projection, compatibility.tokens, compatibility.context
    picture, embedding = compatibility.picture_width, compatibility.embedding_width
    module: nn.Module
    if kind == "base":
        module = ImageProjection(picture, context, tokens)
    elif kind == "full":
        module = IPAdapterFullImageProjection(picture, context)
    elif kind == "faceid":
        mult = _ratio(tensors["ff.net.0.proj.weight"])
        module = IPAdapterFaceIDImageProjection(embedding, context, mult, tokens)
    elif kind in {"plus", "face_resampler"}:
        module = IPAdapterPlusImageProjection(
            embed_dims=picture or embedding,
            output_dims=context,
            hidden_dims=tensors["latents"].shape[2],
            num_queries=tokens,
            **_layers(tensors),
        )
    else:
        module = IPAdapterFaceIDPlusImageProjection(
            embed_dims=context,
            output_dims=context,
            hidden_dims=picture,
            id_embeddings_dim=embedding,
            num_tokens=tokens,
            ffproj_ratio=_ratio(tensors["proj.net.0.proj.weight"]),
            **_layers(tensors),
        )
    return module


def _layers(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a resampler's size as keyword arguments of diffusers' modules."""
    depth = sum(name.endswith(".attn.to_q.weight") for name in tensors)
    heads = tensors["layers.0.attn.to_q.weight"].shape[0] // _HEAD
    ratio = _ratio(tensors["layers.0.ff.1.net.0.proj.weight"])
    return {"depth": depth, "dim_head": _HEAD, "heads": heads, "ffn_ratio": ratio}


def _ratio(weight: Tensor) -> Fraction:
    """Return out / in exactly, because diffusers truncates ratio · width to an integer."""
    return Fraction(weight.shape[0], weight.shape[1])


def _rename(published: Mapping[str, Tensor], kind: IpAdapterKind) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, values in _split_pairs(published).items():
        module, _, role = name.removeprefix(_RESAMPLER).rpartition(".")
        if layer := _LAYER.fullmatch(module):
            module = layer[1] + _IN_LAYER[layer[2]]
        elif not name.startswith(_RESAMPLER):
            module = _NAMES[kind].get(module, module)
        renamed[f"{module}.{role}" if module else role] = values
    return renamed


def _split_pairs(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split each `to_kv` into `to_k` and `to_v`; keys are its first half."""
    split: dict[str, Tensor] = {}
    for name, values in published.items():
        if name.endswith(".to_kv.weight"):
            key, value = values.chunk(2)
            split[name.replace(".to_kv.", ".to_k.")] = key
            split[name.replace(".to_kv.", ".to_v.")] = value
        else:
            split[name] = values
    return split
