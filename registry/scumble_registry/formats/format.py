"""What every format answers. The rest of the registry asks it, and names no kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from scumble.errors import InvalidRequest
from scumble_registry.compatibility import BaseCompatibility, Compatibility
from scumble_registry.formats.safetensors_header import Array
from scumble_registry.formats.source import Draft, Source
from scumble_registry.formats.stored import StoredVersion, export_as_published

ChangedTensors: TypeAlias = dict[str, dict[str, Array]]
"""By component (`unet`, `text_encoder`, `vae` …), tensors by plain name."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How a kind is kept that is stored as its difference to its base, and whole only with it.

    `stored`, `base` and `target` are folders. All raise IntegrityError for a difference to another base.
    """

    materialise: Callable[[Path, Path, Path], None]
    """(stored, base, target): write the whole model's files, as they were published, into the empty `target`."""
    is_whole: Callable[[Path, Path], bool]
    """(stored, target): does `target` hold the whole model, to the byte?"""
    published_digests: Callable[[Path], Sequence[str]]
    """(stored): sha256, in hex, of the files that are kept as differences, as they were published."""
    read_changed: Callable[[Path, Path], ChangedTensors]
    """(stored, base): the tensors that differ from the base's."""


def refuse_image_encoder(adapter: Compatibility, _encoder: Compatibility) -> None:
    """Raises InvalidRequest: most kinds read no pictures."""
    raise InvalidRequest(f"a {adapter.kind} reads no pictures: leave --image-encoder out", field="image_encoder")


@dataclass(frozen=True, slots=True)
class Format:
    kind: str
    """The word in the manifest."""
    hint: str
    """What its files look like, in a few words, for the sentence that refuses unknown ones."""
    recognises: Callable[[Source], bool]
    """Do these files look like this kind? Content decides, not endings."""
    read: Callable[[Source, BaseCompatibility | None], Draft]
    """Check everything, derive the compatibility, write the record; with the base, if one is named.

    Raises Refused for what may not be in a registry, Incompatible for what does not fit the base.
    """
    layouts: tuple[str, ...] = ("diffusers",)
    """Whose layouts `export` writes: what it wrote, published again for the same base, has the same record."""
    export: Callable[[StoredVersion, str, Path], None] = export_as_published
    """(version, layout, target): write it into the empty folder `target`. Raises Refused for what no layout says."""
    difference: Difference | None = None
    """None: it is stored as it was published."""
    has_sampling: bool = True
    """May its publisher say how it is to be sampled?"""
    check_image_encoder: Callable[[Compatibility, Compatibility], None] = refuse_image_encoder
    """(adapter, encoder): raises InvalidRequest, Refused or Incompatible where it cannot be published with this one."""

    @property
    def needs_base(self) -> bool:
        """Is a version of it whole only with its base?"""
        return self.difference is not None
