"""The UNet with everything that an adapter changes as an input: factors, and the text's keys and values.

One unchanged graph serves all requests. Cross-attention keys and values do not depend on the time step,
so `KVProjection` computes them once per request and `Denoiser` takes them as an input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from scumble_build.adapted import Factors, Layer, adapt, find_layers

PREFIX = "unet."


@dataclass(frozen=True, slots=True)
class KVSlice:
    """Where one cross-attention layer's keys and values stand in the flat K/V of a row."""

    name: str
    offset: int
    width: int


@dataclass(slots=True)
class KVInput:
    """The flat keys and values of the running call, `(rows, T, Σ 2·width)`."""

    kv: Tensor | None = None


class TextAttention:
    """A diffusers attention processor that reads K and V from the input instead of projecting them."""

    def __init__(self, place: KVSlice, source: KVInput) -> None:
        self.place = place
        self.source = source

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        **_unused: Tensor | None,
    ) -> Tensor:
        """hidden_states `(rows, N, C)` → `(rows, N, C)`."""
        kv = self.source.kv
        assert kv is not None
        start, width = self.place.offset, self.place.width
        rows, positions, _ = hidden_states.shape
        heads = attn.heads
        query = attn.to_q(hidden_states).view(rows, positions, heads, -1).transpose(1, 2)
        key = kv[..., start : start + width].unflatten(-1, (heads, -1)).transpose(1, 2)
        value = kv[..., start + width : start + 2 * width].unflatten(-1, (heads, -1)).transpose(1, 2)
        mixed = scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(1, 2).reshape(rows, positions, width)
        return attn.to_out[0](mixed) / attn.rescale_output_factor  # type: ignore[no-any-return]


def _cross_attentions(unet: nn.Module) -> Iterator[tuple[str, Attention]]:
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and name.endswith("attn2"):
            yield name, module


class KVProjection(nn.Module):
    """Text states → flat K/V, with this request's factors on every `to_k` and `to_v` of cross-attention."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.slices: list[KVSlice] = []
        offset = 0
        for name, attention in _cross_attentions(unet):
            width = int(attention.to_v.weight.shape[0])
            self.slices.append(KVSlice(name, offset, width))
            offset += 2 * width
        shared = nn.Module()  # the base's own layers under the base's own names
        for name, attention in _cross_attentions(unet):
            _put(shared, f"{name}.to_k", attention.to_k)
            _put(shared, f"{name}.to_v", attention.to_v)
        self.shared = shared
        self.layout, self.source = adapt(shared, find_layers(shared, PREFIX), PREFIX)

    def forward(self, states: Tensor, factors: Factors | None = None) -> Tensor:
        """states `(rows, T, C)` → `(rows, T, Σ 2·width)`."""
        self.source.factors = factors
        parts = [
            self.shared.get_submodule(f"{place.name}.{which}")(states)
            for place in self.slices
            for which in ("to_k", "to_v")
        ]
        return torch.cat(parts, dim=-1)


class Denoiser(nn.Module):
    """The step: noise prediction for a batch of rows, each with its own timestep, text and factors.

    `KVProjection` must be made of the same UNet first: it shares the layers that this class no longer calls.
    """

    def __init__(self, unet: nn.Module, slices: list[KVSlice]) -> None:
        super().__init__()
        self.unet = unet
        self.kv = KVInput()
        places = {place.name: place for place in slices}
        for name, attention in _cross_attentions(unet):
            attention.set_processor(TextAttention(places[name], self.kv))
        self.layout, self.source = adapt(unet, _step_layers(unet), PREFIX)

    def forward(self, sample: Tensor, timestep: Tensor, kv: Tensor, factors: Factors | None = None) -> Tensor:
        """sample `(rows, 4, H/8, W/8)`, timestep `(rows,)`, kv `(rows, T, Σ 2·width)` → `(rows, 4, H/8, W/8)`."""
        self.kv.kv = kv
        self.source.factors = factors
        prediction: Tensor = self.unet(sample, timestep, encoder_hidden_states=None, return_dict=False)[0]
        return prediction


def _step_layers(unet: nn.Module) -> dict[str, Layer]:
    """Every layer that a step runs through: all but the keys and values of the text."""
    return {
        name: layer
        for name, layer in find_layers(unet, PREFIX).items()
        if not name.endswith(("attn2.to_k", "attn2.to_v"))
    }


def _put(root: nn.Module, path: str, layer: nn.Module) -> None:
    *parents, leaf = path.split(".")
    for part in parents:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(leaf, layer)
