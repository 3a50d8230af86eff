"""The UNet with everything that an adapter changes as an input (`inputs.py`).

One unchanged graph serves all requests. Cross-attention keys and values do not depend on the time step,
so `KVProjection` computes them once per request and `Denoiser` takes them as an input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from scumble_build.graphs.adapted import Carried, Layer, adapt, find_layers
from scumble_build.graphs.inputs import ImageInputs, StepInputs, level_sizes

PREFIX = "unet."


@dataclass(frozen=True, slots=True)
class KVSlice:
    """One cross-attention layer's part of a row's flat K/V: keys at `offset`, values right after them."""

    name: str
    offset: int
    width: int


@dataclass(slots=True)
class StepInput:
    """The inputs of the running call, which the attentions read. Owned by one thread at a time.

    `places[level]` is that level's slice of the flat areas of pictures.
    """

    inputs: StepInputs | None = None
    places: list[slice] = field(default_factory=list)


class CrossAttention:
    """A diffusers attention processor that reads K and V from the input instead of projecting them."""

    def __init__(self, kv_slice: KVSlice, level: int, source: StepInput) -> None:
        self.kv_slice = kv_slice
        self.level = level
        self.source = source

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        **_unused: Tensor | None,
    ) -> Tensor:
        """Run attention on hidden_states `(rows, N, C)`; returns the same shape."""
        inputs = self.source.inputs
        assert inputs is not None
        heads = attn.heads
        query = attn.to_q(hidden_states).unflatten(-1, (heads, -1)).transpose(1, 2)
        key, value = self._keys_and_values(inputs.kv, heads)
        mask = inputs.kv_mask[:, None, None] if inputs.kv_mask is not None else None
        mixed = _attend(attn, query, key, value, mask)
        if inputs.images is not None:
            added = self._of_images(attn, query, inputs.images)
            all_rows = added.shape[0] == mixed.shape[0]
            mixed = mixed + added if all_rows else mixed.index_add(0, inputs.images.rows, added)
        mixed = mixed.transpose(1, 2).flatten(2)
        return attn.to_out[0](mixed) / attn.rescale_output_factor  # type: ignore[no-any-return]

    def _keys_and_values(self, kv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Take this layer's keys and values out of `(b, T, K)`: twice `(b, heads, T, width/heads)`."""
        start, width = self.kv_slice.offset, self.kv_slice.width
        parts = kv[..., start : start + width], kv[..., start + width : start + 2 * width]
        key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
        return key, value

    def _of_images(self, attn: Attention, query: Tensor, images: ImageInputs) -> Tensor:
        """Attend query `(rows, heads, N, d)` to the pictures of m rows; returns what they add, `(m, heads, N, d)`."""
        m, groups = images.kv.shape[:2]
        # Copy only where needed: often every row has pictures, in one group.
        queries = query if m == query.shape[0] else query.index_select(0, images.rows)
        queries = queries[:, None].expand(-1, groups, -1, -1, -1).flatten(0, 1)
        key, value = self._keys_and_values(images.kv.flatten(0, 1), query.shape[1])
        mask = images.tokens.flatten(0, 1)[:, None, None] if images.tokens is not None else None
        mixed = _attend(attn, queries, key, value, mask)
        weight = images.scale[..., None]
        if images.areas is not None:
            weight = weight * images.areas[..., self.source.places[self.level]]
        weighted: Tensor = mixed.unflatten(0, (m, groups)) * weight[:, :, None, :, None]
        return weighted[:, 0] if groups == 1 else weighted.sum(1)


class SelfAttention:
    """A diffusers attention processor whose keys and values read the hidden states as hypernetworks changed them."""

    def __init__(self, source: StepInput) -> None:
        self.source = source

    def __call__(self, attn: Attention, hidden_states: Tensor, **_unused: Tensor | None) -> Tensor:
        """Run attention on hidden_states `(rows, N, C)`; returns the same shape."""
        of_keys, of_values = self._contexts(hidden_states)
        query, key, value = (
            layer(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, states in ((attn.to_q, hidden_states), (attn.to_k, of_keys), (attn.to_v, of_values))
        )
        mixed = _attend(attn, query, key, value).transpose(1, 2).flatten(2)
        return attn.to_out[0](mixed) / attn.rescale_output_factor  # type: ignore[no-any-return]

    def _contexts(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return what keys and what values are projected from; rows without hypernetworks stay as they are."""
        inputs = self.source.inputs
        assert inputs is not None
        keys = values = hidden_states
        for chain in inputs.contexts:
            if not any(hidden_states.shape[-1] in net.widths for net in chain.nets):
                continue
            of_keys = of_values = hidden_states.index_select(0, chain.rows)
            for net, weight in zip(chain.nets, chain.weight.unbind(1), strict=True):
                of_keys, of_values = net(of_keys, of_values, weight[:, None, None])
            keys, values = keys.index_copy(0, chain.rows, of_keys), values.index_copy(0, chain.rows, of_values)
        return keys, values


def _attend(attn: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Run attention, in float32 where the model's config says so: SD 2.1's scores overflow half precision."""
    if mask is not None and torch.onnx.is_in_onnx_export():
        mask = added_mask(mask, torch.float32 if attn.upcast_attention else query.dtype)
    if not attn.upcast_attention:
        return scaled_dot_product_attention(query, key, value, mask)
    mixed = scaled_dot_product_attention(query.float(), key.float(), value.float(), mask)
    return mixed.to(query.dtype)


def added_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a mask (True: visible) into what is added to scores. The exporter would make it, and all
    after it, float32.
    """
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def cross_attentions(unet: nn.Module) -> Iterator[tuple[str, Attention]]:
    return _attentions(unet, "attn2")


def _attentions(unet: nn.Module, which: str) -> Iterator[tuple[str, Attention]]:
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and name.endswith(which):
            yield name, module


class KVProjection(nn.Module):
    """Projects text states to flat K/V, with a request's factors on every `to_k` and `to_v` of cross-attention."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.slices: list[KVSlice] = []
        offset = 0
        for name, attention in cross_attentions(unet):
            width = int(attention.to_v.weight.shape[0])
            self.slices.append(KVSlice(name, offset, width))
            offset += 2 * width
        shared = nn.Module()  # the base's own layers under the base's own names
        for name, attention in cross_attentions(unet):
            _put(shared, f"{name}.to_k", attention.to_k)
            _put(shared, f"{name}.to_v", attention.to_v)
        self.shared = shared
        self.layout, self.source = adapt(shared, find_layers(shared, PREFIX), PREFIX)

    def forward(self, states: Tensor, factors: Carried | None = None, of_values: Tensor | None = None) -> Tensor:
        """Project states `(rows, T, C)` to `(rows, T, Σ 2·width)`. Values are projected from `of_values`, if given."""
        self.source.factors = factors
        reads = {"to_k": states, "to_v": states if of_values is None else of_values}
        parts = [
            self.shared.get_submodule(f"{kv_slice.name}.{which}")(reads[which])
            for kv_slice in self.slices
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
        self.input = StepInput()
        self.levels = sum(1 for _ in unet.get_submodule("down_blocks").children())
        by_name = {kv_slice.name: kv_slice for kv_slice in slices}
        for name, attention in cross_attentions(unet):
            attention.set_processor(CrossAttention(by_name[name], _level(name, self.levels), self.input))
        for _, attention in _attentions(unet, "attn1"):
            attention.set_processor(SelfAttention(self.input))
        self.layout, self.source = adapt(unet, _step_layers(unet), PREFIX)

    def forward(self, sample: Tensor, timestep: Tensor, inputs: StepInputs) -> Tensor:
        """Predict noise (or velocity) for sample `(rows, 4, H/8, W/8)` at timestep `(rows,)`; same shape as sample."""
        self.input.inputs = inputs
        self.source.factors = inputs.factors
        self.source.changes = inputs.lites
        self.input.places = _places(level_sizes(sample.shape[-2], sample.shape[-1], self.levels))
        *down, middle = inputs.residuals or (None,)
        prediction: Tensor = self.unet(
            sample,
            timestep,
            encoder_hidden_states=None,
            added_cond_kwargs={"text_embeds": inputs.pooled, "time_ids": inputs.sizes},
            down_block_additional_residuals=tuple(down) or None,
            mid_block_additional_residual=middle,
            down_intrablock_additional_residuals=list(inputs.features)
            if inputs.features
            else None,  # a copy: diffusers pops from it
            return_dict=False,
        )[0]
        return prediction


def _places(sizes: list[tuple[int, int]]) -> list[slice]:
    ends = list(accumulate(height * width for height, width in sizes))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _level(attention: str, levels: int) -> int:
    """Return how many times the hidden states were halved before this attention."""
    side, _, rest = attention.partition("_block")
    if side == "mid":
        return levels - 1
    index = int(rest.split(".")[1])
    return index if side == "down" else levels - 1 - index


def _step_layers(unet: nn.Module) -> dict[str, Layer]:
    """Return every layer that a step runs: all but the text's keys and values."""
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
