"""A base that is served: its version, how its weights are loaded, its tokenizers, and what it gives a request by
default.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from scumble.errors import Refused
from scumble_build.graphs.blocks import UNetBlocks, blocks_of
from scumble_build.graphs.families import FAMILIES, Family
from scumble_build.graphs.layout import Layout
from scumble_registry import Registry, Version
from scumble_registry.compatibility import BaseCompatibility, ImageEncoderCompatibility
from scumble_registry.formats import image_encoder
from scumble_registry.formats.source import Source
from scumble_registry.manifest import Defaults
from scumble_server.config import ServerConfig
from scumble_server.executors.choice import executor_bytes, load_executor
from scumble_server.executors.limits import GraphLimits
from scumble_server.executors.preview import LatentColours, fit
from scumble_server.executors.protocol import Executor
from scumble_server.memory.residency import Lease, Residency


@dataclass(frozen=True, slots=True)
class Base:
    """Everything of a base but its weights, which are loaded and evicted as memory allows."""

    version: Version
    compatibility: BaseCompatibility
    defaults: Defaults
    nbytes: int
    """Size of its weights in device memory."""
    load: Callable[[], Executor]
    max_rows: int
    """The most model rows that its executor computes at once."""
    tokenizers: tuple[CLIPTokenizer, ...]
    """One for each text encoder."""
    scheduler_config: dict[str, Any]
    layouts: tuple[Layout, ...]
    """One for each graph that takes factors: text encoders, K/V projection, denoiser."""
    colours: LatentColours
    limits: tuple[GraphLimits, ...] = ()
    """The sizes that the denoiser's graphs take, if they were built for some sizes only."""
    changes_graphs: bool = True
    """Its executor runs what changes the graph: hypernetworks in self-attention, LLLite."""
    zero_negative: bool = False
    """An absent negative prompt is all zeros, not an empty text."""
    image_encoder: ImageEncoderCompatibility | None = None
    """In its own `image_encoder/`, for IP-Adapters that come without."""

    @property
    def ref(self) -> str:
        return self.version.ref

    @property
    def digest(self) -> str:
        return self.version.digest

    @property
    def family(self) -> Family:
        return FAMILIES[self.compatibility.family]

    @property
    def inpaints(self) -> bool:
        """The UNet also looks at a mask and at the picture that it masks."""
        return self.compatibility.in_channels == 2 * self.compatibility.latent_channels + 1

    @property
    def blocks(self) -> UNetBlocks:
        return blocks_of(self.compatibility.targets)

    @property
    def text_layers(self) -> int:
        """How many layers clip_skip may leave out, in the text encoder that has the fewest."""
        layouts = self.layouts[: len(self.family.texts)]
        layers = [{name.split(".layers.")[1].split(".")[0] for name in layout.targets} for layout in layouts]
        return min(map(len, layers)) - self.family.penultimate

    @property
    def key(self) -> Hashable:
        """The key of its weights among all that is loaded."""
        return "base", self.version.digest

    def executor(self, weights: Lease) -> Executor:
        """Its weights, held by this lease."""
        return weights.get(self.key, self.nbytes, self.load, drop=lambda executor: executor.close())


def load_base(registry: Registry, ref: str, config: ServerConfig, weights: Residency) -> Base:
    """Loads the weights once, to see that they can be; then they stay as long as there is room.

    Raises NotFound, Refused, IntegrityError or Unavailable.
    """
    version = registry.base(ref)
    compatibility, defaults = version.manifest.as_base(version.ref), version.manifest.defaults
    if defaults is None:
        raise Refused(f"{version.ref} has no defaults for requests; publish it again", ref=ref)
    channels, of_latents = compatibility.in_channels, compatibility.latent_channels
    if channels not in {of_latents, 2 * of_latents + 1}:
        raise Refused(
            f"{version.ref} reads {channels} channels; {of_latents} and (for inpainting) {2 * of_latents + 1} can be",
            ref=ref,
        )
    family = FAMILIES[compatibility.family]
    folder = registry.materialise(version)

    def load() -> Executor:
        return load_executor(registry, version, family, config)

    nbytes = executor_bytes(registry, version, folder, family, config)
    with weights.open() as lease:
        executor = lease.get(("base", version.digest), nbytes, load, drop=lambda executor: executor.close())
        return Base(
            version=version,
            compatibility=compatibility,
            defaults=defaults,
            nbytes=nbytes,
            load=load,
            max_rows=executor.max_rows,
            tokenizers=load_tokenizers(folder, family),
            # As the file says it: what it leaves out, each scheduler class fills with its own defaults.
            scheduler_config=_json(folder / "scheduler" / "scheduler_config.json"),
            layouts=(*executor.text_layouts, executor.kv_layout, executor.step_layout),
            colours=fit(executor.vae, compatibility.latent_channels),
            limits=executor.limits,
            changes_graphs=executor.changes_graphs,
            zero_negative=bool(_json(folder / "model_index.json").get("force_zeros_for_empty_prompt", family.sizes)),
            image_encoder=_image_encoder(folder / "image_encoder"),
        )


def load_tokenizers(folder: Path, family: Family) -> tuple[CLIPTokenizer, ...]:
    return tuple(CLIPTokenizer.from_pretrained(folder / part.tokenizer, local_files_only=True) for part in family.texts)


def _image_encoder(folder: Path) -> ImageEncoderCompatibility | None:
    """None if there is none that could serve: most requests ask for none."""
    if not (folder / "config.json").is_file():
        return None
    try:
        return image_encoder.inspect(Source.scan(folder), "")
    except Refused:
        return None


def _json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    return content
