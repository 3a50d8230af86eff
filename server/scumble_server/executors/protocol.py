"""What the server asks of an executor: the protocol that torch, ONNX Runtime and TensorRT implement."""

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
    """A picture's latents as the VAE gives them: mean and deviation `(4, H/8, W/8)` float32, in the UNet's scale."""

    mean: Tensor
    deviation: Tensor


class Vae(Protocol):
    """Pixels and latents. The decoding thread calls `decode`, the conditioning thread `encode`."""

    def decode(self, latents: Tensor, *, tiled: bool = False) -> Tensor:
        """latents `(n, 4, H/8, W/8)` → pixels `(n, H, W, 3)` uint8 on the CPU; `tiled` decodes piece by piece."""

    def encode(self, pixels: Tensor) -> LatentDistribution:
        """pixels `(1, 3, H, W)` in -1…1."""


class Net(Protocol):
    """A ControlNet. The loop's thread calls `residuals`, the conditioning thread everything else."""

    @property
    def kv_width(self) -> int:
        """K of the keys and values that `project` gives."""

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raises Refused for sizes (by the names of axes) that its graph does not take."""

    def project(self, states: Tensor) -> Tensor:
        """Text states `(rows, T, C)` → the net's own keys and values `(rows, T, K)`."""

    def embed(self, controls: Tensor, weights: Sequence[float]) -> Tensor:
        """Control pictures `(n, 3, H, W)` in 0…1 → what the net adds to its first layer, `(1, C, H/8, W/8)`.

        `weights` weighs the n pictures of a union net; other nets take one picture and ignore it.
        """

    def condition(self, pooled: Tensor, sizes: Tensor) -> Tensor | None:
        """Pooled text `(rows, P)` and sizes `(rows, 6)` → what is added to the embedded time `(rows, E)`.

        None for a net that reads neither.
        """

    def residuals(self, sample: Tensor, timestep: Tensor, inputs: NetInputs) -> tuple[Tensor, ...]:
        """sample `(rows, 4, H/8, W/8)`, timestep `(rows,)` → a residual `(rows, C, h, w)` for each skip connection, and
        at last the middle block's.
        """


class Nets(Protocol):
    """A ControlNet in memory. Called by the conditioning thread."""

    def of(self, kinds: tuple[int, ...]) -> Net:
        """The net for these kinds of control, () unless it is a union net.

        The same kinds give the same object, so that rows share its run.
        """

    def close(self) -> None:
        """As `Executor.close`."""


class Executor(Protocol):
    """The graphs of one base: its text encoders, the projection of text, the denoiser, and its VAE.

    Each graph is called from one thread at a time; different graphs may run at once. Tensors come and go on
    `device`; samples and latents are float32 whatever precision the graphs compute in.
    """

    step_layout: Layout
    kv_layout: Layout
    text_layouts: tuple[Layout, ...]
    """One for each text encoder."""
    kv_slices: list[KVSlice]
    """Where each cross-attention reads its part of keys and values."""

    @property
    def vae(self) -> Vae: ...

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype:
        """What the graphs compute in."""

    @property
    def changes_graphs(self) -> bool:
        """Whether it serves adapters that change the graph: hypernetworks on self-attention, and LLLite."""

    @property
    def max_rows(self) -> int:
        """How many rows `denoise` takes at once."""

    @property
    def most_pages(self) -> tuple[int | None, int | None]:
        """How many rank pages of the small layout, and of the rest, `denoise` takes at most; None: any number."""

    @property
    def limits(self) -> tuple[GraphLimits, ...]:
        """The sizes that the denoiser's graphs take; empty if they take any."""

    @property
    def copies(self) -> int:
        """How often the weights that it loads are held in memory."""

    def encode(self, encoder: int, inputs: TextInputs) -> EncodedText:
        """Run the text encoder of this index."""

    def project(self, states: Tensor, factors: Factors | None, of_values: Tensor | None = None) -> Tensor:
        """Text states `(rows, T, C)` → keys and values of all cross-attentions, `(rows, T, K)`.

        Values are computed from `of_values` `(rows, T, C)`, if it is given.
        """

    def denoise(self, sample: Tensor, timestep: Tensor, inputs: StepInputs) -> Tensor:
        """sample `(rows, 4, H/8, W/8)`, timestep `(rows,)` → prediction like sample."""

    def prepare(self, includes: frozenset[Include], sizes: Mapping[str, int]) -> None:
        """Open the graph that takes `includes`, so that no step waits for it. Called by the conditioning thread.

        Raises Refused for sizes (by the names of axes) that the graph does not take.
        """

    def weight(self, target: str) -> Tensor:
        """The weight of a layer `(out, in[, k, k])` or norm `(channels,)` by its canonical name. Only to be read."""

    def parameter(self, name: str) -> Tensor:
        """Any tensor of the UNet and the text encoders: a target's name and `.weight` or `.bias`. Only to be read.

        Raises Refused if there is none of this name.
        """

    def variant(self, changed: Changed, configs: Path | None = None, of: Version | None = None) -> Executor:
        """An executor with the weights in `changed`; every other tensor is shared with this one, not copied.

        `of` is the checkpoint that the weights come from, or None for merged LoRAs. `configs` is a folder with configs
        of the components, in the diffusers layout; None: this executor's own.
        Raises Refused for a tensor that the base does not have.
        """

    def load_vae(self, folder: Path) -> Vae:
        """Another VAE, in the diffusers layout, on the same device and in the same precision."""

    def load_net(self, version: Version, load: Callable[[], NetModel]) -> Nets:
        """The ControlNet of this version. `load` reads its weights, if they are needed, and hands them over."""

    def weights_digest(self) -> str:
        """sha256 over every weight as it is now: proof that nothing was patched."""

    def describe(self) -> dict[str, str]:
        """Executor, device and precision, for the receipt."""

    def close(self) -> None:
        """Write down what the next start can use (TensorRT's runtime cache).

        Called once by the owner, when no thread steps with it any more: at eviction, and when the server stops.
        """
