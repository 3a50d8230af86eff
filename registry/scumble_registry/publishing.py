"""Turn files on disk into a manifest whose blobs are all stored. A version is visible once the catalogue has it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from scumble.errors import InvalidRequest, NotFound, Refused
from scumble.files import explain_os_errors
from scumble_registry import formats
from scumble_registry.blob import Blob
from scumble_registry.formats import format_of, training_metadata
from scumble_registry.formats.source import Draft, Hints, Source
from scumble_registry.hashes import FileHash, hashes_of, tensor_hashes, weights_of
from scumble_registry.manifest import Manifest, Sampling, canonical_json
from scumble_registry.store.blobs import BlobStore

_MAX_WORDS, _MAX_WORD, _MAX_TEXT = 100, 200, 20_000
_OWN = ("diffusers", "h94", "scumble")
"""Layouts of the kinds' own authors, which our trainers write too. A manifest names no dialect for them, so that files
published before manifests had dialects are the same version when they are published again."""
_PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")


@dataclass(frozen=True, slots=True)
class PublisherMetadata:
    """What a publisher states beside the files."""

    license: str | None = None
    description: str = ""
    trigger_words: Iterable[str] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    sample_grid: Path | None = None
    card: Path | None = None
    sampling: Sampling | None = None


@dataclass(frozen=True, slots=True)
class PublishedFor:
    """The base that an adapter is published for; `folder` materialises its files and returns their folder."""

    manifest: Manifest
    folder: Callable[[], Path]


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """Limits that a publisher lifts, and hints for what the files do not state."""

    leftover: bool = False
    """Unknown keys are left out and named in the manifest instead of refused."""
    max_bytes: int | None = None
    """The most bytes that the files may have; None: the limit of their kind."""
    hints: Hints = field(default_factory=Hints)


@dataclass(frozen=True, slots=True)
class Examined:
    """Files that are read and checked, but not stored."""

    source: Source
    draft: Draft
    training: dict[str, Any]
    """The files' own statements on their training, see `training_metadata.read`."""


@dataclass(frozen=True, slots=True)
class Stored:
    manifest: Manifest
    hashes: frozenset[FileHash]


@contextmanager
def examine(
    path: Path, published_for: PublishedFor | None, words: Iterable[str], read_options: ReadOptions, work: Path
) -> Iterator[Examined]:
    """Read and check the files as publishing does; `work` is an empty folder for converted files.

    Raises NotFound, Refused, Incompatible, InvalidRequest, Unavailable.
    """
    base = published_for.manifest.as_base() if published_for is not None else None
    with explain_os_errors(path, "read"):
        source = replace(
            Source.scan(path, tuple(words)),
            work=work,
            base_folder=published_for.folder if published_for is not None else None,
            allow_leftover=read_options.leftover,
            max_bytes=read_options.max_bytes,
            hints=read_options.hints,
        )
        _check_size(source)
        before = source.stamps()
        draft = formats.read(source, base)
        yield Examined(source, draft, training_metadata.read(weights_of(source.files)))
        if source.stamps() != before:
            raise Refused(f"{path} changed while it was being published; publish it again when it is finished")


def store(
    path: Path,
    published_for: PublishedFor | None,
    details: PublisherMetadata,
    blobs: BlobStore,
    work: Path,
    encoder: Manifest | None = None,
    read_options: ReadOptions = ReadOptions(),
) -> Stored:
    """Check the files, derive the manifest and put every blob. `work` is an empty folder.

    Raises NotFound, Refused, Incompatible, InvalidRequest before anything is stored, Unavailable at any time.
    """
    base = published_for.manifest if published_for is not None else None
    with examine(path, published_for, details.trigger_words, read_options, work) as examined:
        draft = examined.draft
        metadata = _metadata(details, draft)
        _check_sampling(details, draft)
        if base is not None:
            draft.compatibility.fits(base.as_base())
        if encoder is not None:
            format_of(draft.compatibility.kind).check_image_encoder(draft.compatibility, encoder.compatibility)
        grid = _put_picture(details.sample_grid, blobs) if details.sample_grid else None
        card = put_file(details.card, blobs) if details.card else None
        files, record, tensors = _put_all(examined, blobs)
        known = {file: files[name] for name, file in draft.files.items()}
        hashes = hashes_of(examined.source.files, known, record, tensors)
    extra = {
        "base": base.digest if base else None,
        "image_encoder": encoder.digest if encoder else None,
        "sample_grid": grid,
        "card": card,
        "sampling": details.sampling or draft.sampling,
        "dialect": None if draft.dialect.startswith(_OWN) else draft.dialect or None,
        "training": training_metadata.for_manifest(examined.training),
        "leftover": draft.leftover,
    }
    return Stored(_manifest(draft, files, record, metadata | extra), hashes)


def _put_all(examined: Examined, blobs: BlobStore) -> tuple[dict[str, Blob], Blob | None, list[FileHash]]:
    """Put files and record and hash the tensors, in parallel, as each is mostly hashing."""
    opened = examined.draft.open_record()
    with ThreadPoolExecutor() as pool:
        files = {name: pool.submit(put_file, file, blobs) for name, file in examined.draft.files.items()}
        record = pool.submit(blobs.put, opened) if opened is not None else None
        tensors = pool.submit(tensor_hashes, weights_of(examined.source.files).values())
        stored = {name: future.result() for name, future in files.items()}
        return stored, record.result() if record is not None else None, tensors.result()


def _manifest(draft: Draft, files: dict[str, Blob], record: Blob | None, metadata: dict[str, Any]) -> Manifest:
    try:
        return Manifest(
            files=files, record=record, compatibility=draft.compatibility, defaults=draft.defaults, **metadata
        )
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise InvalidRequest(f"the metadata is not usable: {problems}", field="metadata") from error


def _check_size(source: Source) -> None:
    size = sum(file.stat().st_size for file in source.files.values())
    if source.max_bytes is not None and size > source.max_bytes:
        raise Refused(
            f"{source.path} has {size:,} bytes, more than --max-size allows ({source.max_bytes:,})", bytes=size
        )


def _check_sampling(details: PublisherMetadata, draft: Draft) -> None:
    if details.sampling is not None and not format_of(draft.compatibility.kind).has_sampling:
        raise InvalidRequest(
            f"a {draft.compatibility.kind} has no sampling of its own: leave --sampling out; "
            "a base's defaults for requests are in its scumble.json",
            field="sampling",
        )


def _metadata(details: PublisherMetadata, draft: Draft) -> dict[str, Any]:
    words = tuple(dict.fromkeys(details.trigger_words)) or draft.trigger_words
    if len(words) > _MAX_WORDS or not all(0 < len(word) <= _MAX_WORD and word.isprintable() for word in words):
        raise InvalidRequest(
            f"at most {_MAX_WORDS} trigger words of 1 to {_MAX_WORD} printable characters",
            field="trigger_words",
        )
    if len(details.description) > _MAX_TEXT or len(details.license or "") > _MAX_WORD:
        raise InvalidRequest(f"a description has at most {_MAX_TEXT} characters, a license {_MAX_WORD}")
    return {
        "trigger_words": words,
        "license": details.license,
        "description": details.description,
        "provenance": json.loads(canonical_json(dict(details.provenance))),
        "metrics": json.loads(canonical_json(dict(details.metrics))),
    }


def put_file(file: Path, blobs: BlobStore) -> Blob:
    with file.open("rb") as source:
        return blobs.put(source)


def _put_picture(file: Path, blobs: BlobStore) -> Blob:
    if not file.is_file():
        raise NotFound(f"there is no sample grid {file}; check the path")
    with file.open("rb") as source:
        if not source.read(4).startswith(_PICTURES):
            raise InvalidRequest(f"{file} is not a PNG, JPEG or WebP picture", field="sample_grid")
        source.seek(0)
        return blobs.put(source)
