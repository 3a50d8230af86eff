"""What runs the graphs. One protocol; the torch executor runs everywhere, engines follow it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from scumble_build.adapted import Factors
from scumble_build.denoiser import KVSlice
from scumble_build.inputs import StepInputs
from scumble_build.layout import Layout
from scumble_build.text import Overrides

Changed: TypeAlias = Mapping[str, Mapping[str, Tensor]]
"""By component (`unet`, `text_encoder`, `vae`) and by the name in its file, with or without `text_model.`."""


class Net(Protocol):
    """A ControlNet. `residuals` is called by the loop's thread, the others by the one that conditions."""

    def project(self, states: Tensor) -> Tensor:
        """Text states `(rows, T, C)` → the net's own keys and values `(rows, T, K)`."""

    def embed(self, control: Tensor) -> Tensor:
        """Control pictures `(n, 3, H, W)` in 0…1 → what the net adds to its first layer, `(n, C, H/8, W/8)`."""

    def residuals(
        self, sample: Tensor, timestep: Tensor, kv: Tensor, hint: Tensor, kv_mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """sample `(rows, 4, H/8, W/8)` → one for each skip connection, the middle block's last, `(rows, C, h, w)`.

        kv_mask `(rows, T)` is True where a key is.
        """


class Executor(Protocol):
    """The four graphs of one base.

    Each graph is called from one thread at a time; different graphs may run at once. Tensors come and go on
    `device`; samples and latents are float32 whatever precision the graphs compute in.
    """

    step_layout: Layout
    kv_layout: Layout
    text_layout: Layout
    text_layers: int
    """Layers of the text encoder: as many can be left out."""
    kv_slices: list[KVSlice]
    """Where each cross-attention stands in keys and values."""

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype:
        """What the graphs compute in."""

    @property
    def max_rows(self) -> int:
        """How many rows `denoise` takes at once."""

    def encode(
        self, tokens: Tensor, factors: Factors | None, overrides: Overrides | None = None, clip_skip: int = 0
    ) -> Tensor:
        """tokens `(rows, 77)` → text states `(rows, 77, C)`; overrides stand for some of the tokens.

        `clip_skip` layers are left out at the end.
        """

    def project(self, states: Tensor, factors: Factors | None, of_values: Tensor | None = None) -> Tensor:
        """Text states `(rows, T, C)` → keys and values of all cross-attentions, `(rows, T, K)`.

        Values are read from `of_values` `(rows, T, C)`, if it is given.
        """

    def denoise(self, sample: Tensor, timestep: Tensor, inputs: StepInputs) -> Tensor:
        """sample `(rows, 4, H/8, W/8)`, timestep `(rows,)` → prediction like sample."""

    def decode(self, latents: Tensor) -> Tensor:
        """latents `(n, 4, H/8, W/8)` → pixels `(n, H, W, 3)` uint8 on the CPU."""

    def weight(self, target: str) -> Tensor:
        """The weight of a layer that takes factors, `(out, in[, k, k])`, to be read only."""

    def variant(self, changed: Changed, configs: Path | None = None) -> Executor:
        """An executor with some other weights; all that is not in `changed` is shared with this one, not copied.

        `configs` is a folder with configs of its components, in the diffusers layout; None: this one's own.
        Raises Refused for a tensor that has no place here.
        """

    def weights_digest(self) -> str:
        """sha256 over every weight as it is now: proof that nothing was patched."""

    def describe(self) -> dict[str, str]:
        """Executor, device and precision, for the receipt."""
