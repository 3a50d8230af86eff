"""A version's files as other tools read them: the way back from a record to a layout.

Each kind has its layouts; their writers lie beside its readers (`formats/<kind>/export.py`). Law, for every kind and
layout: what is exported and published again, for the same base and with the same trigger words, has the same record.
Whole models are stored as they were published, which is diffusers' layout.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scumble.errors import InvalidRequest, Refused
from scumble_registry.catalogue import Version
from scumble_registry.compatibility import BaseCompatibility, IpAdapterCompatibility, TextualInversionCompatibility
from scumble_registry.formats import ip_adapter, lora, textual_inversion
from scumble_registry.formats.controlnet import export as controlnet_export
from scumble_registry.formats.hypernetwork import export as hypernetwork_export
from scumble_registry.formats.ip_adapter import export as ip_adapter_export
from scumble_registry.formats.lora import export as lora_export
from scumble_registry.formats.safetensors_header import read_header
from scumble_registry.formats.textual_inversion import export as textual_inversion_export
from scumble_registry.registry import Registry, new_folder


@dataclass(frozen=True, slots=True)
class Entry:
    """What a writer reads."""

    registry: Registry
    version: Version
    base_version: Version | None
    """The base that it is written for, where one is named or it was published for one."""

    @property
    def base(self) -> BaseCompatibility | None:
        if self.base_version is None:
            return None
        found = self.base_version.manifest.compatibility
        assert isinstance(found, BaseCompatibility)
        return found


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


def _base(registry: Registry, version: Version, base: str | None) -> Version | None:
    if base is not None:
        found = registry.resolve(base)
        if found.manifest.kind != "base":
            raise Refused(f"{found.ref} is a {found.manifest.kind}, not a base; name a base")
        return found
    return registry.base_of(version) if version.manifest.base is not None else None


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


def _textual_inversion(entry: Entry, layout: str, folder: Path) -> None:
    adapter = entry.version.manifest.compatibility
    assert isinstance(adapter, TextualInversionCompatibility)
    record = textual_inversion.read_record(entry.registry.record_path(entry.version))
    textual_inversion_export.export(record, adapter.token, layout, folder, _header_metadata(entry))


def _ip_adapter(entry: Entry, _layout: str, folder: Path) -> None:
    adapter = entry.version.manifest.compatibility
    assert isinstance(adapter, IpAdapterCompatibility)
    if entry.base is None:
        raise InvalidRequest("the base tells how attentions are counted: name it with --base", field="base")
    record = ip_adapter.read_record(entry.registry.record_path(entry.version))
    ip_adapter_export.export(record, adapter, entry.base, folder)
    encoder = entry.registry.stored(entry.version) / ip_adapter.ENCODER
    if encoder.is_dir():
        shutil.copytree(encoder, folder / ip_adapter.ENCODER, copy_function=shutil.copyfile)


def _hypernetwork(entry: Entry, _layout: str, folder: Path) -> None:
    stored = entry.registry.stored(entry.version)
    (file,) = (stored / name for name in entry.version.manifest.files if name.endswith(".safetensors"))
    hypernetwork_export.export(file, folder)


def _controlnet(entry: Entry, layout: str, folder: Path) -> None:
    unet = None
    if entry.base_version is not None:
        unet = json.loads((entry.registry.stored(entry.base_version) / "unet/config.json").read_bytes())
    controlnet_export.export(entry.registry.stored(entry.version), unet, layout, folder)


_WHOLE: tuple[tuple[str, ...], Writer] = (("diffusers",), _as_published)
WRITERS: dict[str, tuple[tuple[str, ...], Writer]] = {
    "base": _WHOLE,
    "controlnet": (controlnet_export.LAYOUTS, _controlnet),
    "dreambooth": _WHOLE,
    "hypernetwork": (hypernetwork_export.LAYOUTS, _hypernetwork),
    "image_encoder": _WHOLE,
    "ip_adapter": (ip_adapter_export.LAYOUTS, _ip_adapter),
    "lora": (lora_export.LAYOUTS, _lora),
    "textual_inversion": (textual_inversion_export.LAYOUTS, _textual_inversion),
    "vae": _WHOLE,
}
"""Kind → its layouts, and what writes them."""
