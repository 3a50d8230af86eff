"""The inputs of one step of the denoiser or of a ControlNet, besides sample and timestep.

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
from scumble_build.graphs.includes import Include
from scumble_build.graphs.lllite import LLLite
from scumble_build.graphs.tensors import moved


@dataclass(frozen=True, slots=True)
class ImageInputs:
    """Keys and values of pictures (IP-Adapter, Ye et al., 2308.06721) for m of the rows, one softmax per group.

    rows (m,) int64, rising; kv (m, G, T, K) in the flat layout of the text's; tokens (m, G, T) bool, True where a token
    is, at least one in each group, or None if all are; scale (m, G); areas (m, G, P) or None: how strongly each group
    acts at each position, flat over the UNet's levels (`level_sizes`).
    """

    rows: Tensor
    kv: Tensor
    tokens: Tensor | None
    scale: Tensor
    areas: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ContextInputs:
    """A chain of hypernetworks that change what self-attention reads, for m of the rows.

    rows (m,) int64; weight (m, n), one for each of the n networks.
    """

    rows: Tensor
    nets: tuple[Hypernetwork, ...]
    weight: Tensor


@dataclass(frozen=True, slots=True)
class LiteInputs:
    """A ControlNet-LLLite for m of the rows.

    rows (m,) int64; embeddings (m, N, e) of each target; weight (m,).
    """

    rows: Tensor
    net: LLLite
    embeddings: Mapping[str, Tensor]
    weight: Tensor

    def change(self, target: str, x: Tensor) -> Tensor:
        """Return x `(rows, N, in)`, the input of the matrix `target`, with the net's change added to its rows."""
        if target not in self.embeddings:
            return x
        added = self.net.change(target, x.index_select(0, self.rows), self.embeddings[target])
        return x.index_add(0, self.rows, added * self.weight[:, None, None])


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The inputs of one step of the denoiser: kv (rows, T, K), kv_mask (rows, T) bool, True where a key is, or None.

    residuals: ControlNet's, for each skip connection and then the middle block, (rows, C, h, w) each;
    features: T2I-Adapter's, for each down block, (rows, C, h, w) each; contexts: one for each chain of hypernetworks,
    each row in one at most; lites: one for each LLLite.

    pooled (rows, E) and sizes (rows, 6) are read by SDXL only: the pooled text; original height and width, top and left
    of the crop, target height and width, in pixels.
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

    @property
    def includes(self) -> frozenset[Include]:
        """The inputs that a graph must have to compute this batch."""
        factors = self.factors
        present: dict[Include, bool] = {
            "factors": factors is not None,
            "full": factors is not None and factors.rest is not None,
            "stretch_out": factors is not None and factors.stretch_out is not None,
            "stretch_in": factors is not None and factors.stretch_in is not None,
            "images": self.images is not None,
            "residuals": self.residuals is not None,
            "features": self.features is not None,
        }
        return frozenset(name for name, is_present in present.items() if is_present)

    def to(self, device: torch.device, dtype: torch.dtype) -> StepInputs:
        """Return the same inputs on `device` in `dtype`. `sizes` keeps its dtype: half precision cannot
        represent 1537.
        """
        sizes = self.sizes.to(device) if self.sizes is not None else None
        return replace(moved(self, device, dtype), sizes=sizes)


@dataclass(frozen=True, slots=True)
class NetInputs:
    """The inputs of one step of a ControlNet, besides sample and timestep.

    kv (rows, T, K), the net's own keys and values of the text; hint (rows, C, H/8, W/8), the embedded control picture;
    added (rows, E), which SDXL's nets add to the embedded time, or None; kv_mask (rows, T) bool, True where a key is,
    or None if all are.
    """

    kv: Tensor
    hint: Tensor
    added: Tensor | None = None
    kv_mask: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> NetInputs:
        return moved(self, device, dtype)


def level_sizes(height: int, width: int, levels: int) -> list[tuple[int, int]]:
    """Return height and width of the hidden states at each level of a UNet, for latents of this size.

    A downsampler (3x3, stride 2, padding 1) rounds up.
    """
    steps = [2**level for level in range(levels)]
    # Not -(-height // step): a traced graph rounds negative quotients towards zero.
    return [((height + step - 1) // step, (width + step - 1) // step) for step in steps]
