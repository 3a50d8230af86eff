"""What rows carry of IP-Adapters, and how it is stacked into a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from scumble_build.graphs.includes import Include
from scumble_build.graphs.inputs import ImageInputs, StepInputs
from scumble_server.methods.context import Context
from scumble_server.methods.ip_adapter.keys_values import groups_of
from scumble_server.methods.part import BatchRows, Part, spread
from scumble_server.request.adapter import ResolvedAdapter


@dataclass(frozen=True, slots=True, eq=False)
class ImagesPart(Part):
    """IP-Adapters of one request: G groups with a softmax each, T tokens; `rows` are the model rows of one image.

    kv `(rows, G, T, K)` in the flat layout of the text's, layer scales folded into V; tokens `(G, T)` bool, True where
    a token is, at least one in each group; scale `(rows, G)`, the adapters' weights; areas `(G, P)`, flat over the
    UNet's levels, or None.
    """

    kv: Tensor
    tokens: Tensor
    scale: Tensor
    areas: Tensor | None = None

    @classmethod
    def of(cls, context: Context, weights: Mapping[ResolvedAdapter, float]) -> ImagesPart | None:
        """None where no adapter acts."""
        if not any(weights.values()):
            return None
        adapters = tuple(weights)
        groups = context.once(("ip_adapter", adapters), lambda: groups_of(context, adapters))
        scale = torch.tensor([weights[adapter] for adapter in groups.adapters])
        return cls(spread(groups.kv, context.rows), groups.tokens, scale.expand(context.rows, -1), groups.areas)

    @property
    def includes(self) -> frozenset[Include]:
        return frozenset({"images"})

    @property
    def sizes(self) -> Mapping[str, int]:
        return {"groups": self.kv.shape[1], "image_tokens": self.kv.shape[2]}

    @classmethod
    def stack(cls, parts: Sequence[ImagesPart | None], rows: BatchRows, inputs: StepInputs) -> StepInputs:
        """A group that is missing has one token of zeros; a token that is missing is masked."""
        present = [(start, part) for start, part in zip(rows.starts, parts, strict=True) if part is not None]
        groups = max(part.kv.shape[1] for _, part in present)
        length = max(part.kv.shape[2] for _, part in present)
        padded = [part._padded(groups, length) for _, part in present]  # noqa: SLF001 - its own class
        tokens = torch.cat([part.tokens.expand(len(part.kv), -1, -1) for part in padded])
        images = ImageInputs(
            torch.cat([torch.arange(start, start + len(part.kv)) for start, part in present]).to(rows.device),
            torch.cat([part.kv for part in padded]).to(rows.device),
            None if tokens.all() else tokens.to(rows.device),
            torch.cat([part.scale for part in padded]).to(rows.device),
            _stack_areas([part for _, part in present], groups, rows.device),
        )
        return replace(inputs, images=images)

    def _padded(self, groups: int, length: int) -> ImagesPart:
        _, present, tokens, _ = self.kv.shape
        more = groups - present
        mask = pad(self.tokens, (0, length - tokens, 0, more))
        mask[present:, 0] = True  # a softmax over nothing would be NaN
        return ImagesPart(
            pad(self.kv, (0, 0, 0, length - tokens, 0, more)), mask, pad(self.scale, (0, more)), self.areas
        )


def _stack_areas(parts: Sequence[ImagesPart], groups: int, device: str) -> Tensor | None:
    """Stack areas as `(m, G, P)`; groups without reach everywhere. None if no image has areas."""
    positions = next((part.areas.shape[1] for part in parts if part.areas is not None), None)
    if positions is None:
        return None
    stacked = []
    for part in parts:
        areas = torch.ones(part.kv.shape[1], positions) if part.areas is None else part.areas
        stacked.append(pad(areas, (0, 0, 0, groups - len(areas))).expand(len(part.kv), -1, -1))
    return torch.cat(stacked).to(device)
