"""Export a version in a layout that other tools read: from a record back to files.

Each format has its layouts; the writers are beside the readers (`formats/<kind>/export.py`). Law, for every kind and
layout: an export that is published again for the same base with the same trigger words has the same record. Whole
models are stored as published, which is diffusers' layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scumble.errors import InvalidRequest
from scumble.files import new_folder
from scumble_registry.compatibility import BaseCompatibility
from scumble_registry.formats import format_of
from scumble_registry.manifest import Manifest
from scumble_registry.registry import Registry
from scumble_registry.store.catalogue import Version


@dataclass(frozen=True, slots=True)
class _Exported:
    """A StoredVersion (`formats/stored.py`) of this registry."""

    registry: Registry
    version: Version
    base_version: Version | None

    @property
    def manifest(self) -> Manifest:
        return self.version.manifest

    @property
    def base(self) -> BaseCompatibility | None:
        return self.base_version.manifest.as_base(self.base_version.ref) if self.base_version is not None else None

    def folder(self) -> Path:
        return self.registry.stored(self.version)

    def record(self) -> Path:
        return self.registry.record_path(self.version)

    def base_folder(self) -> Path | None:
        return self.registry.stored(self.base_version) if self.base_version is not None else None

    def copy(self, target: Path) -> None:
        self.registry.copy(self.version, target)


def export(registry: Registry, ref: str, layout: str, out: Path, *, base: str | None = None) -> Version:
    """Write `ref` in `layout` into the folder `out` (new or empty), all or nothing.

    `base` is the base whose module names are written; by default the one that the version was published for. Raises
    InvalidRequest naming the kind's layouts, NotFound, Refused (quarantined; the layout cannot hold it; the folder is
    not empty), IntegrityError, Unavailable.
    """
    version = registry.resolve(ref)
    form = format_of(version.manifest.kind)
    if layout not in form.layouts:
        raise InvalidRequest(
            f"a {form.kind} cannot be exported as {layout!r}; it can be as {' or '.join(form.layouts)}", field="layout"
        )
    exported = _Exported(registry, version, _base(registry, version, base))
    with new_folder(out) as work:
        form.export(exported, layout, work)
    return version


def _base(registry: Registry, version: Version, base: str | None) -> Version | None:
    if base is not None:
        return registry.base(base)
    return registry.base_of(version) if version.manifest.base is not None else None
