"""The interface of a format. The rest of the registry uses it and names no kind."""

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
"""Component (`unet`, `text_encoder`, `vae` …) → plain name → tensor."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The functions of a kind that is stored as its differences to its base and needs the base to be materialised.

    `stored`, `base` and `target` are folders. All raise IntegrityError for a difference to another base.
    """

    materialise: Callable[[Path, Path, Path], None]
    """(stored, base, target): write the whole model's files, as published, into the empty `target`."""
    is_whole: Callable[[Path, Path], bool]
    """(stored, target): return whether `target` holds the whole model, to the byte."""
    published_digests: Callable[[Path], Sequence[str]]
    """(stored): return the sha256, in hex, that the files which are stored as differences had when published."""
    read_changed: Callable[[Path, Path], ChangedTensors]
    """(stored, base): return the tensors that differ from the base's."""


def refuse_image_encoder(adapter: Compatibility, _encoder: Compatibility) -> None:
    """Raises InvalidRequest: most kinds use no image encoder."""
    raise InvalidRequest(f"a {adapter.kind} uses no image encoder: leave --image-encoder out", field="image_encoder")


@dataclass(frozen=True, slots=True)
class Format:
    """How a kind is recognised, read, stored and exported."""

    kind: str
    """The kind's name in the manifest."""
    hint: str
    """A short description of its files, for `publish --help`."""
    recognises: Callable[[Source], bool]
    """Return whether the files look like this kind, by content, not by name."""
    read: Callable[[Source, BaseCompatibility | None], Draft]
    """Check the files, derive the compatibility and make the record; with the base, if one is named.

    Raises Refused for files that may not be in a registry, Incompatible where they do not fit the base.
    """
    layouts: tuple[str, ...] = ("diffusers",)
    """Names of the layouts that `export` writes: an export that is published again for the same base has the same
    record."""
    export: Callable[[StoredVersion, str, Path], None] = export_as_published
    """(version, layout, target): write it into the empty folder `target`. Raises Refused if the layout cannot."""
    difference: Difference | None = None
    """None: the kind is stored as published."""
    has_sampling: bool = True
    """Whether a publisher may set `sampling`."""
    check_image_encoder: Callable[[Compatibility, Compatibility], None] = refuse_image_encoder
    """(adapter, encoder): raises InvalidRequest, Refused or Incompatible if the adapter cannot use this encoder."""

    @property
    def needs_base(self) -> bool:
        """Whether a version can be materialised only with its base."""
        return self.difference is not None
