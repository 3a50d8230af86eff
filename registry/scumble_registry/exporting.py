"""A version's files as other tools read them: the way back from a record to a layout.

Each kind has its layouts; their writers lie beside its readers (`formats/<kind>/export.py`). Law, for every kind and
layout: what is exported and published again, for the same base and with the same trigger words, has the same record.
Whole models are stored as they were published, which is diffusers' layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scumble.errors import InvalidRequest
from scumble_registry.catalogue import Version
from scumble_registry.compatibility import BaseCompatibility
from scumble_registry.formats import lora
from scumble_registry.formats.lora import export as lora_export
from scumble_registry.formats.safetensors_header import read_header
from scumble_registry.registry import Registry, new_folder


@dataclass(frozen=True, slots=True)
class Entry:
    """What a writer reads."""

    registry: Registry
    version: Version
    base: BaseCompatibility | None
    """The base that it is written for, where one is named or was published for."""


Writer = Callable[[Entry, str, Path], None]


def export(registry: Registry, ref: str, layout: str, out: Path, *, base: str | None = None) -> Version:
    """Write `ref` in `layout` into the folder `out` (new or empty), all or nothing.

    `base` names the base whose modules names are made for, if not the one that it was published for. Raises
    InvalidRequest naming the layouts that the kind has, NotFound, Refused (quarantined; not to be said in this layout;
    something is in the folder), IntegrityError, Unavailable.
    """
    version = registry.resolve(ref)
    kind = version.manifest.kind
    layouts, write = WRITERS[kind]
    if layout not in layouts:
        raise InvalidRequest(
            f"a {kind} cannot be exported as {layout!r}; it can be as {' or '.join(layouts)}", field="layout"
        )
    entry = Entry(registry, version, _base(registry, version, base))
    with new_folder(out) as work:
        write(entry, layout, work)
    return version


def _base(registry: Registry, version: Version, base: str | None) -> BaseCompatibility | None:
    if base is not None:
        found = registry.published_for(base).manifest.compatibility
    elif version.manifest.base is not None:
        found = registry.base_of(version).manifest.compatibility
    else:
        return None
    assert isinstance(found, BaseCompatibility)
    return found


def _lora(entry: Entry, layout: str, folder: Path) -> None:
    lora_export.export(
        lora.read_record(entry.registry.record_path(entry.version)),
        next(each for each in lora_export.LAYOUTS if each == layout),
        folder,
        base=entry.base,
        metadata=_header_metadata(entry),
    )


def _header_metadata(entry: Entry) -> dict[str, str]:
    """What the published file said of itself, but for what speaks of its old layout."""
    folder = entry.registry.stored(entry.version)
    weights = [folder / name for name in entry.version.manifest.files if name.endswith(".safetensors")]
    metadata = read_header(weights[0]).metadata if len(weights) == 1 else {}
    said = {name: text for name, text in metadata.items() if name not in {"format", "lora_adapter_metadata"}}
    words = entry.version.manifest.trigger_words
    return said | ({"trigger_words": json.dumps(words)} if words else {})


def _as_published(entry: Entry, _layout: str, folder: Path) -> None:
    entry.registry.copy(entry.version, folder)


_WHOLE: tuple[tuple[str, ...], Writer] = (("diffusers",), _as_published)
WRITERS: dict[str, tuple[tuple[str, ...], Writer]] = {
    "base": _WHOLE,
    "dreambooth": _WHOLE,
    "image_encoder": _WHOLE,
    "lora": (lora_export.LAYOUTS, _lora),
    "vae": _WHOLE,
}
"""Kind → its layouts, and what writes them."""
