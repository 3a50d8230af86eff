"""The protocol of executors, which torch, ONNX Runtime and TensorRT implement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from diffusers import ControlNetModel, ControlNetUnionModel
from torch import Tensor

from scumble_build.graphs.adapted import Factors
from scumble_build.graphs.denoiser import KVSlice
from scumble_build.graphs.includes import Include
from scumble_build.graphs.inputs import NetInputs, StepInputs
from scumble_build.graphs.layout import Layout
from scumble_build.graphs.text import EncodedText, TextInputs
from scumble_registry import Version
from scumble_server.executors.limits import GraphLimits

NetModel: TypeAlias = ControlNetModel | ControlNetUnionModel
Changed: TypeAlias = Mapping[str, Mapping[str, Tensor]]
"""Component (`unet`, `vae`, a text encoder) → tensor's name in its file, with or without `text_model.` → values."""


@dataclass(frozen=True, slots=True, eq=False)
class LatentDistribution:
    """The VAE's distribution of a picture's latents: mean and deviation `(4, H/8, W/8)` float32, in the
    UNet's scale.
    """

    mean: Tensor
    deviation: Tensor


class Vae(Protocol):
    """Encodes pixels and decodes latents. The decoding thread calls `decode`, the conditioning thread `encode`."""

    @property
    def least(self) -> int:
        """The side of the smallest latents that it decodes."""

    def decode(self, latents: Tensor, *, tiled: bool = False) -> Tensor:
        """Decode latents `(n, 4, H/8, W/8)` to pixels `(n, H, W, 3)` uint8 on the CPU; `tiled` decodes tile by tile."""

    def encode(self, pixels: Tensor) -> LatentDistribution:
        """Encode pixels `(1, 3, H, W)` in -1…1."""


class Net(Protocol):
    """A ControlNet. The loop's thread calls `residuals`, the conditioning thread everything else."""

    @property
    def kv_width(self) -> int:
        """K of the keys and values that `project` returns."""

    def check(self, sizes: Mapping[str, int]) -> None:
        """Check sizes of axes, by name. Raises Refused for those that its graph does not accept."""

    def project(self, states: Tensor) -> Tensor:
        """Project text states `(rows, T, C)` to the net's own keys and values `(rows, T, K)`."""

    def embed(self, controls: Tensor, weights: Sequence[float]) -> Tensor:
        """Embed control pictures `(n, 3, H, W)` in 0…1 as the hint `(1, C, H/8, W/8)`, added after the net's first
        layer.

        `weights` are those of the n pictures of a union net; other nets take one picture and ignore them.
        """

    def condition(self, pooled: Tensor, sizes: Tensor) -> Tensor | None:
        """Embed pooled text `(rows, P)` and sizes `(rows, 6)` as `(rows, E)`, added to the embedded time.

        Returns None for a net that reads neither.
        """

    def residuals(self, sample: Tensor, timestep: Tensor, inputs: NetInputs) -> tuple[Tensor, ...]:
        """Return a residual `(rows, C, h, w)` for each skip connection, then the middle block's.

        sample `(rows, 4, H/8, W/8)`, timestep `(rows,)`.
        """


class Nets(Protocol):
    """A ControlNet in memory. Called by the conditioning thread."""

    def of(self, kinds: tuple[int, ...]) -> Net:
        """Return the net for these kinds of control; () unless it is a union net.

        The same kinds return the same object, so that rows share its run.
        """

    def close(self) -> None:
        """Close the net, as `Executor.close` does."""


class Executor(Protocol):
    """Runs the graphs of one base: text encoders, projection of text, denoiser and VAE.

    Each graph is called from one thread at a time; different graphs may run concurrently. Tensors are on `device`;
    samples and latents are float32 in every precision.
    """

    step_layout: Layout
    kv_layout: Layout
    text_layouts: tuple[Layout, ...]
    """One for each text encoder."""
    kv_slices: list[KVSlice]
    """Each cross-attention's part of keys and values."""

    @property
    def vae(self) -> Vae: ...

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype:
        """Floating point type of the graphs."""

    @property
    def changes_graphs(self) -> bool:
        """Whether it serves adapters that change the graph: hypernetworks on self-attention, and LLLite."""

    @property
    def max_rows(self) -> int:
        """Largest number of rows of one call of `denoise`."""

    @property
    def most_pages(self) -> tuple[int | None, int | None]:
        """Largest number of rank pages of the small layout, and of the rest, in `denoise`; None: no limit."""

    @property
    def limits(self) -> tuple[GraphLimits, ...]:
        """The sizes that the denoiser's graphs accept; empty if they accept any."""

    @property
    def copies(self) -> int:
        """How many copies of the weights it holds in memory."""

    def encode(self, encoder: int, inputs: TextInputs) -> EncodedText:
        """Run the text encoder with this index."""

    def project(self, states: Tensor, factors: Factors | None, of_values: Tensor | None = None) -> Tensor:
        """Project text states `(rows, T, C)` to keys and values of all cross-attentions, `(rows, T, K)`.

        Values are projected from `of_values` `(rows, T, C)`, if given.
        """

    def denoise(self, sample: Tensor, timestep: Tensor, inputs: StepInputs) -> Tensor:
        """Return the prediction for sample `(rows, 4, H/8, W/8)` at timestep `(rows,)`; same shape as sample."""

    def prepare(self, includes: frozenset[Include], sizes: Mapping[str, int]) -> None:
        """Open the graph with the inputs `includes`, so that no step waits for it. Called by the conditioning thread.

        Raises Refused for sizes (by name of axis) that the graph does not accept.
        """

    def weight(self, target: str) -> Tensor:
        """Return the weight of a layer `(out, in[, k, k])` or norm `(channels,)` by canonical name. It must not be
        changed.
        """

    def parameter(self, name: str) -> Tensor:
        """Return a tensor of the UNet or a text encoder: a target's name and `.weight` or `.bias`. It must not be
        changed.

        Raises Refused if there is no such tensor.
        """

    def variant(self, changed: Changed, configs: Path | None = None, of: Version | None = None) -> Executor:
        """Make an executor with the weights in `changed`; all other tensors are shared with this one, not copied.

        `of` is the checkpoint whose weights these are, or None for merged LoRAs. `configs` is a folder with configs of
        the components, in the diffusers layout; None: this executor's own. Raises Refused for a tensor that the base
        does not have.
        """

    def load_vae(self, folder: Path) -> Vae:
        """Load another VAE, in the diffusers layout, to the same device in the same precision."""

    def load_net(self, version: Version, load: Callable[[], NetModel]) -> Nets:
        """Load the ControlNet of this version. `load` reads its weights and is called only if they are needed."""

    def weights_digest(self) -> str:
        """Return the sha256 of all weights as they are now, to show that they are unchanged."""

    def describe(self) -> dict[str, str]:
        """Return executor, device and precision, for the receipt."""

    def close(self) -> None:
        """Save what the next start can use (TensorRT's runtime cache).

        Called once by the owner, at eviction or when the server stops, after the last step.
        """
