"""What a method's module has at hand while it turns the adapters of one request into tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor
from transformers import CLIPTokenizer

from scumble_registry import Registry, Version
from scumble_server.base import Base
from scumble_server.executors.protocol import Executor, Vae
from scumble_server.memory.pages import Pools
from scumble_server.memory.residency import Lease
from scumble_server.request.adapter import Bound
from scumble_server.request.settings import Settings

Record = TypeVar("Record")


@dataclass(frozen=True, slots=True)
class Text:
    """Encoded prompts: states `(rows, T, C)`, pooled `(rows, E)` where the base reads one, and all that they were made
    of.
    """

    key: Hashable
    states: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Context:
    """One request, in the conditioning thread. `executor` holds the weights that it is drawn with, and `weights`
    says which: every key of something made by them begins with it. `drawn_with` is the base, or the checkpoint.

    `of_base` holds the base's own. `records` pins host memory until the request is conditioned; `device` and
    `held_weights` pin device memory until it is drawn.
    """

    base: Base
    registry: Registry
    settings: Settings
    of_base: Executor
    executor: Executor
    weights: Hashable
    drawn_with: Version
    vae: Vae
    vae_key: Hashable
    """All that says which one it is."""
    tokenizers: tuple[CLIPTokenizer, ...]
    records: Lease
    device: Lease
    held_weights: Lease
    weights_key: Hashable
    """Of `executor`, among the weights that are loaded."""
    rows: int
    """Model rows of one image: the prompt alone, or the negative prompt first and then prompts."""
    pools: Pools
    """Where batches read factors."""

    def record(self, bound: Bound, read: Callable[[Path], Record]) -> Record:
        """An adapter's normalised record, read once for all requests that ask while it is resident."""
        return read_record(self.registry, self.records, bound, read)

    @property
    def latents(self) -> dict[str, int]:
        """Their size, by the names that graphs' axes have."""
        scale = self.base.compatibility.vae_scale
        return {"height": self.settings.height // scale, "width": self.settings.width // scale}

    @property
    def sides(self) -> int:
        """1 where there is no negative prompt, else 2: what does not read the prompts is made once for each side."""
        return min(self.rows, 2)


def read_record(registry: Registry, records: Lease, bound: Bound, read: Callable[[Path], Record]) -> Record:
    """The record of `bound`, pinned by `records`."""
    version = bound.version
    blob = version.manifest.record
    nbytes = blob.size if blob is not None else 0
    return records.get(("record", version.digest), nbytes, lambda: read(registry.record_path(version)))
