"""The interface to a stored version that exporters use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

from scumble_registry.compatibility import BaseCompatibility
from scumble_registry.formats.safetensors_header import read_header
from scumble_registry.manifest import Manifest


class StoredVersion(Protocol):
    """A version and its files, hashed at every call. All methods raise IntegrityError, NotFound, Unavailable."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def base(self) -> BaseCompatibility | None:
        """The base whose module names are written: the one named, else the one that it was published for, if any."""
        ...

    def folder(self) -> Path:
        """Return the read-only folder with the stored files."""
        ...

    def record(self) -> Path:
        """Return the path of the record. Raises Refused for a kind without record."""
        ...

    def base_folder(self) -> Path | None:
        """Return the files of `base`, None without one."""
        ...

    def copy(self, target: Path) -> None:
        """Write the files as they were published into the empty folder `target`."""
        ...


def export_as_published(version: StoredVersion, _layout: str, target: Path) -> None:
    """Copy the files of a whole model, which is stored as published, in diffusers' layout."""
    version.copy(target)


def header_metadata(version: StoredVersion) -> dict[str, str]:
    """Return the published file's metadata without the entries on its layout, with the version's trigger words."""
    folder = version.folder()
    weights = [folder / name for name in version.manifest.files if name.endswith(".safetensors")]
    metadata = read_header(weights[0]).metadata if len(weights) == 1 else {}
    retained = {name: text for name, text in metadata.items() if name not in {"format", "lora_adapter_metadata"}}
    words = version.manifest.trigger_words
    return retained | ({"trigger_words": json.dumps(words)} if words else {})
