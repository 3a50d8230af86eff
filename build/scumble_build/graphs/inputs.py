"""What the rows of a batch carry into one step of the denoiser, beside sample and timestep.

`rows` in these classes counts model rows: a guided image is two, negative prompt first. Every part but the text's
keys and values may be absent, and then costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scumble_build.graphs.adapted import Factors
from scumble_build.graphs.hypernetwork import Hypernetwork
from scumble_build.graphs.lllite import LLLite


@dataclass(frozen=True, slots=True)
class ImageInputs:
    """Keys and values of pictures (IP-Adapter, Ye et al., 2308.06721) for m of the rows, one softmax per group.

    rows (m,) int64, rising; kv (m, G, T, K) in the flat layout of the text's; tokens (m, G, T) bool, True where a token
    is, at least one in each group, or None where all are; scale (m, G); areas (m, G, P) or None: how much of each group
    reaches each position, flat over the UNet's levels (`level_sizes`).
    """

    rows: Tensor
    kv: Tensor
    tokens: Tensor | None
    scale: Tensor
    areas: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ContextInputs:
    """Hypernetworks that change what self-attention reads, one behind the other, for m of the rows.

    rows (m,) int64; strength (m, n) of n networks.
    """

    rows: Tensor
    nets: tuple[Hypernetwork, ...]
    strength: Tensor


@dataclass(frozen=True, slots=True)
class LiteInputs:
    """A ControlNet-LLLite for m of the rows.

    rows (m,) int64; embeddings (m, N, e) of each target; strength (m,).
    """

    rows: Tensor
    net: LLLite
    embeddings: Mapping[str, Tensor]
    strength: Tensor

    def change(self, target: str, x: Tensor) -> Tensor:
        """x `(rows, N, in)`: what the matrix of this name reads."""
        if target not in self.embeddings:
            return x
        added = self.net.change(target, x.index_select(0, self.rows), self.embeddings[target])
        return x.index_add(0, self.rows, added * self.strength[:, None, None])


@dataclass(frozen=True, slots=True)
class StepInputs:
    """kv (rows, T, K), kv_mask (rows, T) bool or None, True where a key is.

    residuals: ControlNet's, for each skip connection and at last the middle block, (rows, C, h, w) each;
    features: T2I-Adapter's, for each down block, (rows, C, h, w) each; contexts: one for each chain of hypernetworks
    that some of the rows have, a row in one at most; lites: one for each LLLite.

    pooled (rows, E) and sizes (rows, 6) are read by SDXL only: the pooled text; height and width of the original, top
    and left of the crop, height and width aimed at, in pixels.
    """

    kv: Tensor
    kv_mask: Tensor | None = None
    factors: Factors | None = None
    images: ImageInputs | None = None
    residuals: tuple[Tensor, ...] | None = None
    features: tuple[Tensor, ...] | None = None
    contexts: tuple[ContextInputs, ...] = ()
    lites: tuple[LiteInputs, ...] = ()
    pooled: Tensor | None = None
    sizes: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> StepInputs:
        """The same with every floating point tensor in `dtype`; nothing is copied that is there already."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

        images = self.images
        if images is not None:
            areas = move(images.areas) if images.areas is not None else None
            tokens = move(images.tokens) if images.tokens is not None else None
            images = ImageInputs(move(images.rows), move(images.kv), tokens, move(images.scale), areas)
        return replace(
            self,
            kv=move(self.kv),
            kv_mask=move(self.kv_mask) if self.kv_mask is not None else None,
            factors=self.factors.to(device, dtype) if self.factors is not None else None,
            images=images,
            residuals=tuple(map(move, self.residuals)) if self.residuals is not None else None,
            features=tuple(map(move, self.features)) if self.features is not None else None,
            contexts=tuple(ContextInputs(move(c.rows), c.nets, move(c.strength)) for c in self.contexts),
            lites=tuple(
                LiteInputs(
                    move(lite.rows),
                    lite.net,
                    {name: move(values) for name, values in lite.embeddings.items()},
                    move(lite.strength),
                )
                for lite in self.lites
            ),
            pooled=move(self.pooled) if self.pooled is not None else None,
            sizes=self.sizes.to(device) if self.sizes is not None else None,  # half precision has no 1537
        )


def level_sizes(height: int, width: int, levels: int) -> list[tuple[int, int]]:
    """Height and width of the hidden states at each level of a UNet for latents of this size.

    A downsampler (3x3, stride 2, padding 1) rounds up.
    """
    steps = [2**level for level in range(levels)]
    # Not -(-height // step): a traced graph rounds negative quotients towards zero.
    return [((height + step - 1) // step, (width + step - 1) // step) for step in steps]
