"""What is stored of a version, as an exporter reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

from scumble_registry.compatibility import BaseCompatibility
from scumble_registry.formats.safetensors_header import read_header
from scumble_registry.manifest import Manifest


class StoredVersion(Protocol):
    """Folders and files are filled and hashed at every call. All raise IntegrityError, NotFound, Unavailable."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def base(self) -> BaseCompatibility | None:
        """The base that it is written for, where one is named or it was published for one."""
        ...

    def folder(self) -> Path:
        """Return the read-only folder with what is stored of it."""
        ...

    def record(self) -> Path:
        """Return the normalised record as a file. Raises Refused for a kind without."""
        ...

    def base_folder(self) -> Path | None:
        """Return the files of `base`, None without one."""
        ...

    def copy(self, target: Path) -> None:
        """Write the files as they were published into the empty folder `target`."""
        ...


def export_as_published(version: StoredVersion, _layout: str, target: Path) -> None:
    """Whole models are stored as they were published, which is diffusers' layout."""
    version.copy(target)


def header_metadata(version: StoredVersion) -> dict[str, str]:
    """Return what the published file said of itself, but for what speaks of its old layout."""
    folder = version.folder()
    weights = [folder / name for name in version.manifest.files if name.endswith(".safetensors")]
    metadata = read_header(weights[0]).metadata if len(weights) == 1 else {}
    said = {name: text for name, text in metadata.items() if name not in {"format", "lora_adapter_metadata"}}
    words = version.manifest.trigger_words
    return said | ({"trigger_words": json.dumps(words)} if words else {})
