"""What runs the graphs. One protocol; the torch executor runs everywhere, engines follow it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from diffusers import ControlNetModel, ControlNetUnionModel
from torch import Tensor

from scumble_build.export.manifest import Include
from scumble_build.graphs.adapted import Factors
from scumble_build.graphs.denoiser import KVSlice
from scumble_build.graphs.inputs import StepInputs
from scumble_build.graphs.layout import Layout
from scumble_build.graphs.text import Encoded, Overrides
from scumble_registry import Version
from scumble_server.executors.limits import GraphLimits

NetModel: TypeAlias = ControlNetModel | ControlNetUnionModel
Changed: TypeAlias = Mapping[str, Mapping[str, Tensor]]
"""By component (`unet`, `vae`, the text encoders) and by the name in its file, with or without `text_model.`."""


@dataclass(frozen=True, slots=True, eq=False)
class LatentDistribution:
    """A picture's latents as the VAE gives them: mean and deviation `(4, H/8, W/8)` float32, in the UNet's scale."""

    mean: Tensor
    deviation: Tensor


class Vae(Protocol):
    """Pixels and latents. `decode` is called by the thread that decodes, `encode` by the one that conditions."""

    def decode(self, latents: Tensor, *, tiled: bool = False) -> Tensor:
        """latents `(n, 4, H/8, W/8)` → pixels `(n, H, W, 3)` uint8 on the CPU; `tiled`: piece by piece."""

    def encode(self, pixels: Tensor) -> LatentDistribution:
        """pixels `(1, 3, H, W)` in -1…1."""


class Net(Protocol):
    """A ControlNet. `residuals` is called by the loop's thread, the others by the one that conditions."""

    @property
    def kv_width(self) -> int:
        """K of the keys and values that `project` gives."""

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raises Refused for sizes that its graph does not take, by its axes' names."""

    def project(self, states: Tensor) -> Tensor:
        """Text states `(rows, T, C)` → the net's own keys and values `(rows, T, K)`."""

    def embed(self, controls: Tensor, strengths: Sequence[float]) -> Tensor:
        """Control pictures `(n, 3, H, W)` in 0…1 → what the net adds to its first layer, `(1, C, H/8, W/8)`.

        Of a union net's pictures each counts as strongly as `strengths` say; other nets have one, and read none.
        """

    def condition(self, pooled: Tensor, sizes: Tensor) -> Tensor | None:
        """Pooled text `(rows, E)` and sizes `(rows, 6)` → what they add to the embedded time; None if it reads none."""

    def residuals(
        self,
        sample: Tensor,
        timestep: Tensor,
        kv: Tensor,
        hint: Tensor,
        added: Tensor | None = None,
        kv_mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """sample `(rows, 4, H/8, W/8)` → one for each skip connection, the middle block's last, `(rows, C, h, w)`.

        kv_mask `(rows, T)` is True where a key is; None: there are no others.
        """


class Nets(Protocol):
    """A ControlNet in memory. Called by the thread that conditions."""

    def of(self, kinds: tuple[int, ...]) -> Net:
        """As a union net that looks at pictures of these kinds; () for other nets. The same object for the same kinds,
        so that rows share its run.
        """


class Executor(Protocol):
    """The graphs of one base: its text encoders, the projection of text, the denoiser, and its VAE.

    Each graph is called from one thread at a time; different graphs may run at once. Tensors come and go on
    `device`; samples and latents are float32 whatever precision the graphs compute in.
    """

    step_layout: Layout
    kv_layout: Layout
    text_layouts: tuple[Layout, ...]
    """Of each text encoder."""
    kv_slices: list[KVSlice]
    """Where each cross-attention stands in keys and values."""

    @property
    def vae(self) -> Vae: ...

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype:
        """What the graphs compute in."""

    @property
    def max_rows(self) -> int:
        """How many rows `denoise` takes at once."""

    @property
    def most_pages(self) -> tuple[int | None, int | None]:
        """How many rank pages of the small layout, and of the rest, `denoise` takes at most; None: any number."""

    def encode(
        self,
        encoder: int,
        tokens: Tensor,
        factors: Factors | None,
        overrides: Overrides | None = None,
        skip: int = 0,
        mask: Tensor | None = None,
    ) -> Encoded:
        """tokens `(rows, 77)` of one of the text encoders; overrides stand for some of them.

        The last `skip` layers that the base would use are left out. mask `(rows, 77)` is 0 where a token is not seen.
        """

    def project(self, states: Tensor, factors: Factors | None, of_values: Tensor | None = None) -> Tensor:
        """Text states `(rows, T, C)` → keys and values of all cross-attentions, `(rows, T, K)`.

        Values are read from `of_values` `(rows, T, C)`, if it is given.
        """

    def denoise(self, sample: Tensor, timestep: Tensor, inputs: StepInputs) -> Tensor:
        """sample `(rows, 4, H/8, W/8)`, timestep `(rows,)` → prediction like sample."""

    @property
    def limits(self) -> tuple[GraphLimits, ...]:
        """Of the denoiser's graphs, if they were built for some sizes only."""

    def prepare(self, includes: frozenset[Include], sizes: Mapping[str, int]) -> None:
        """Make ready for steps whose rows carry these, so that no step waits. Called by the conditioning thread.

        Raises Refused for sizes that the graph does not take, by its axes' names.
        """

    def weight(self, target: str) -> Tensor:
        """The weight of a layer `(out, in[, k, k])` or norm `(channels,)`, by its canonical name, to be read only."""

    def parameter(self, name: str) -> Tensor:
        """Any tensor of the UNet and the text encoders: a target's name and `.weight` or `.bias`. To be read only.

        Raises Refused for one that is not there.
        """

    def variant(self, changed: Changed, configs: Path | None = None, of: Version | None = None) -> Executor:
        """An executor with some other weights; all that is not in `changed` is shared with this one, not copied.

        `of` is the checkpoint whose they are, if they are one's. `configs` is a folder with configs of its components,
        in the diffusers layout; None: this one's own.
        Raises Refused for a tensor that has no place here.
        """

    def load_vae(self, folder: Path) -> Vae:
        """Another one, in the diffusers layout, on the same device and in the same precision."""

    @property
    def copies(self) -> int:
        """How often it holds the weights that it loads."""

    def load_net(self, version: Version, load: Callable[[], NetModel]) -> Nets:
        """The ControlNet that `load` reads, if its weights are needed here; it is then nobody else's."""

    def weights_digest(self) -> str:
        """sha256 over every weight as it is now: proof that nothing was patched."""

    def describe(self) -> dict[str, str]:
        """Executor, device and precision, for the receipt."""
