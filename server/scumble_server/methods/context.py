"""What a method has at hand while it turns the adapters of one request into tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from transformers import CLIPTokenizer

from scumble_registry import Registry, Version
from scumble_server.base import Base
from scumble_server.executors.protocol import Executor, Vae
from scumble_server.memory.pages import Pools
from scumble_server.memory.residency import Lease
from scumble_server.request.adapter import ResolvedAdapter
from scumble_server.request.settings import Settings

Record = TypeVar("Record")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Text:
    """Encoded prompts: states `(rows, T, C)`; pooled `(rows, E)` for SDXL. `key` names all that they were made of."""

    key: Hashable
    states: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights that a request is drawn with: a base's or a checkpoint's, maybe with LoRAs merged in or another VAE.

    `key` names them among all that is loaded; the key of whatever they make begins with it.
    """

    version: Version
    """The base's or the checkpoint's."""
    key: Hashable
    executor: Executor
    tokenizers: tuple[CLIPTokenizer, ...]
    """For each text encoder."""
    vae: Vae
    vae_key: Hashable


@dataclass(frozen=True, slots=True)
class Context:
    """One request in the conditioning thread.

    `weights` draw it; `base_weights` are the base's own. `records` pins host memory until the request is conditioned;
    `device` and `loaded` pin device memory until it is drawn: `loaded` what is made of weights, `device` the rest.
    """

    base: Base
    registry: Registry
    settings: Settings
    weights: Weights
    base_weights: Weights
    records: Lease
    device: Lease
    loaded: Lease
    rows: int
    """Model rows of one image: the prompt alone, or the negative prompt first and then prompts."""
    pools: Pools
    """Where batches read factors."""
    _made: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Make what all phases of this request share, when the first asks for it."""
        if key not in self._made:
            self._made[key] = make()
        value: Value = self._made[key]
        return value

    @property
    def executor(self) -> Executor:
        return self.weights.executor

    def record(self, adapter: ResolvedAdapter, read: Callable[[Path], Record]) -> Record:
        """Read an adapter's normalised record, once for all requests that ask while it is resident."""
        return read_record(self.registry, self.records, adapter.version, read)

    @property
    def latents(self) -> dict[str, int]:
        """The size of the latents, by the names of the graphs' axes."""
        scale = self.base.compatibility.vae_scale
        return {"height": self.settings.height // scale, "width": self.settings.width // scale}

    @property
    def sides(self) -> int:
        """1 without a negative prompt, else 2: what does not read the prompts is made once for each side."""
        return min(self.rows, 2)


def read_record(registry: Registry, records: Lease, version: Version, read: Callable[[Path], Record]) -> Record:
    """Read the record of `version`, pinned by `records`. Raises NotFound, IntegrityError."""
    blob = version.manifest.record
    nbytes = blob.size if blob is not None else 0
    return records.get(("record", version.digest), nbytes, lambda: read(registry.record_path(version)))
