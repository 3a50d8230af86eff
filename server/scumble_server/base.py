"""A base that is loaded: its version, its graphs, its tokenizer and what it gives a request by default."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from scumble.errors import Refused
from scumble_build.blocks import UNetBlocks, blocks_of
from scumble_build.layout import Layout
from scumble_registry import Registry, Version
from scumble_registry.compatibility import BaseCompatibility, ImageEncoderCompatibility
from scumble_registry.formats import image_encoder
from scumble_registry.formats.source import Source
from scumble_registry.manifest import Defaults
from scumble_server.config import ServerConfig
from scumble_server.executors import Executor
from scumble_server.executors.torch import TorchExecutor
from scumble_server.preview import LatentColours, fit


@dataclass(frozen=True, slots=True)
class Base:
    version: Version
    compatibility: BaseCompatibility
    defaults: Defaults
    executor: Executor
    tokenizer: CLIPTokenizer
    scheduler_config: dict[str, Any]
    colours: LatentColours
    image_encoder: ImageEncoderCompatibility | None = None
    """In its own `image_encoder/`, for IP-Adapters that come without."""

    @property
    def blocks(self) -> UNetBlocks:
        return blocks_of(self.compatibility.targets)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The graphs that take factors: text encoder, K/V projection, denoiser."""
        return self.executor.text_layout, self.executor.kv_layout, self.executor.step_layout


def load_base(registry: Registry, config: ServerConfig) -> Base:
    """Raises NotFound, Refused, IntegrityError or Unavailable."""
    ref = config.base
    version = registry.resolve(ref)
    compatibility, defaults = version.manifest.compatibility, version.manifest.defaults
    if not isinstance(compatibility, BaseCompatibility) or defaults is None:
        raise Refused(f"{version.ref} is a {version.manifest.kind}, not a base; name a base", ref=ref)
    if compatibility.family != "sd1":
        raise Refused(
            f"{version.ref} is a base of family {compatibility.family}; this server serves SD 1.x",
            ref=ref,
        )
    folder = registry.materialise(version)
    executor = TorchExecutor.load(folder, config.device, config.precision, config.max_rows)
    return Base(
        version=version,
        compatibility=compatibility,
        defaults=defaults,
        executor=executor,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        scheduler_config=_scheduler_config(folder),
        colours=fit(executor.decode, compatibility.latent_channels),
        image_encoder=_image_encoder(folder / "image_encoder"),
    )


def _image_encoder(folder: Path) -> ImageEncoderCompatibility | None:
    """None if there is none that could serve: most requests ask for none."""
    if not (folder / "config.json").is_file():
        return None
    try:
        return image_encoder.inspect(Source.scan(folder), "")
    except Refused:
        return None


def _scheduler_config(folder: Path) -> dict[str, Any]:
    """As the file says it: what it leaves out, each scheduler class fills with its own defaults."""
    config: dict[str, Any] = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return config
