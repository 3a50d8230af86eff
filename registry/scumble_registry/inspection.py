"""Inspect a file without publishing it: everything that publishing derives, and the versions that match it.

Needs no registry, unless a base is named by its reference. Fails as publishing does, except for two problems that are
reported instead: keys that would be left out, and a base that does not fit.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from scumble.errors import Incompatible, Refused
from scumble_registry import formats
from scumble_registry.blob import Blob
from scumble_registry.compatibility import Compatibility
from scumble_registry.formats.source import Draft, Hints, Source
from scumble_registry.hashes import AUTO_V2, AUTO_V3, FileHash, HashKind, hashes_of, tensor_hashes, weights_of
from scumble_registry.manifest import Manifest, Sampling
from scumble_registry.publishing import PublishedFor, ReadOptions, examine
from scumble_registry.registry import Registry
from scumble_registry.store.blobs import copy_and_hash
from scumble_registry.store.catalogue import Match


@dataclass(frozen=True, slots=True)
class Inspection:
    path: Path
    dialect: str
    compatibility: Compatibility
    sampling: Sampling | None
    trigger_words: tuple[str, ...]
    details: dict[str, JsonValue]
    """What the format derives beyond the compatibility: ranks, alphas and serving class of each module."""
    training: dict[str, Any]
    leftover: tuple[str, ...]
    """Keys that no reader knows; publishing requires `--allow-leftover` for them."""
    files: dict[str, Blob]
    """The files as published, before any conversion."""
    record: str | None
    """Digest of the normalised record."""
    hashes: frozenset[FileHash]
    base: str | None
    misfit: str | None
    """Why the file does not fit `base`; None: it fits, or no base was named."""
    known: tuple[Match, ...]
    """Published versions with the same files, tensors or record."""

    @property
    def kind(self) -> str:
        return self.compatibility.kind

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "kind": self.kind,
            "dialect": self.dialect or None,
            "family": self.compatibility.family,
            "compatibility": self.compatibility.model_dump(mode="json"),
            "details": self.details,
            "sampling": self.sampling.model_dump(mode="json") if self.sampling else None,
            "trigger_words": list(self.trigger_words),
            "training": self.training,
            "leftover": list(self.leftover),
            "files": {name: {"sha256": blob.hex, "size": blob.size} for name, blob in self.files.items()},
            "record": self.record,
            **hashes_to_dict(self.hashes),
            "base": {"ref": self.base, "fits": self.misfit is None, "why_not": self.misfit} if self.base else None,
            "published": [match_to_dict(match) for match in self.known],
        }


def inspect(
    path: Path,
    registry: Registry | None = None,
    *,
    base: str | None = None,
    trigger_words: Iterable[str] = (),
    max_bytes: int | None = None,
    hints: Hints | None = None,
) -> Inspection:
    """Inspect a file or folder; `base` is a reference, or a folder (`./base`, `/models/base`) with an unpublished base.

    Raises what publishing raises, except for the problems in `Inspection.misfit` and `Inspection.leftover`.
    """
    published_for = _find_base(base, registry) if base is not None else None
    words = (trigger_words,) if isinstance(trigger_words, str) else tuple(trigger_words)
    read_options = ReadOptions(leftover=True, max_bytes=max_bytes, hints=hints or Hints())
    with (
        registry.scratch() if registry is not None else _temporary() as work,
        examine(Path(path), published_for, words, read_options, work) as examined,
    ):
        draft = examined.draft
        files = {name: _hash(file) for name, file in examined.source.files.items()}
        known = {file: files[name] for name, file in examined.source.files.items()}
        opened = draft.open_record()
        record = copy_and_hash(opened) if opened is not None else None
        tensors = tensor_hashes(weights_of(examined.source.files).values())
        hashes = hashes_of(examined.source.files, known, record, tensors)
        return Inspection(
            path=examined.source.path,
            dialect=draft.dialect,
            compatibility=draft.compatibility,
            sampling=draft.sampling,
            trigger_words=words or draft.trigger_words,
            details=json.loads(json.dumps(dict(draft.details))),
            training=examined.training,
            leftover=draft.leftover,
            files=files,
            record=record.digest if record is not None else None,
            hashes=hashes,
            base=base,
            misfit=_misfit(draft, published_for.manifest) if published_for is not None else None,
            known=registry.matches(hashes) if registry is not None else (),
        )


@contextmanager
def _temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def hashes_to_dict(hashes: Iterable[FileHash]) -> dict[str, Any]:
    """Return `sha256`, `autov2`, `sshs_model_hash` and `autov3` of a single file; None where there are several."""
    files = [hash_.hex for hash_ in hashes if hash_.kind is HashKind.FILE]
    tensors = [hash_.hex for hash_ in hashes if hash_.kind is HashKind.TENSORS]
    sha256 = files[0] if len(files) == 1 else None
    data = tensors[0] if len(tensors) == 1 else None
    return {
        "sha256": sha256,
        "autov2": sha256[:AUTO_V2] if sha256 else None,
        "sshs_model_hash": data,
        "autov3": data[:AUTO_V3] if data else None,
    }


def match_to_dict(match: Match) -> dict[str, Any]:
    return {
        "ref": match.version.ref,
        "status": match.version.status.value,
        "digest": match.version.digest,
        "matches": match.kind.value if match.kind is not None else "version",
        "hash": match.hex,
    }


def _find_base(base: str, registry: Registry | None) -> PublishedFor:
    if base.startswith((".", "/", "~")):  # a reference begins with none of these
        folder = Path(base).expanduser()
        draft = formats.read(Source.scan(folder), None)
        manifest = Manifest(
            files={name: _hash(file) for name, file in draft.files.items()}, compatibility=draft.compatibility
        )
        manifest.as_base(str(folder))
        return PublishedFor(manifest, lambda: folder)
    if registry is None:
        raise Refused(f"there is no registry to look up the base {base} in; name a folder (./base), or --home DIR")
    return registry.published_for(base)


def _misfit(draft: Draft, base: Manifest) -> str | None:
    try:
        draft.compatibility.fits(base.as_base())
    except Incompatible as error:
        return error.message
    return None


def _hash(file: Path) -> Blob:
    with file.open("rb") as source:
        return copy_and_hash(source)
