"""Hashes that other tools show for a file, so that a hash seen elsewhere finds its version here.

    file       sha256 of a weights file as it was published, before any conversion. Its first ten digits are the
               webui's AutoV2, which Civitai and the metadata of images name
    tensors    sha256 of a safetensors file's data, without its header: kohya's `sshs_model_hash`, which does not
               change when the metadata is edited. Its first twelve digits are AutoV3, the webui's name of a LoRA
    record     sha256 of the normalised record: the same for all layouts of the same weights

A search takes eight or more of the first digits. These hashes are no part of a version's identity, which is its
manifest's digest; a version may have several.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath

from scumble.errors import InvalidRequest, Refused
from scumble_registry.blob import Blob
from scumble_registry.formats.safetensors_header import read_header

AUTO_V2, AUTO_V3 = 10, 12
"""Number of first digits of `file` and of `tensors` that the webui shows."""
_PREFIX = re.compile(r"[0-9a-f]{8,64}", re.ASCII)
_WEIGHTS = frozenset({".safetensors", ".bin", ".ckpt", ".pt", ".pth"})


class HashKind(StrEnum):
    FILE = "file"
    TENSORS = "tensors"
    RECORD = "record"


@dataclass(frozen=True, slots=True, order=True)
class FileHash:
    kind: HashKind
    hex: str


def parse_prefix(text: str) -> str:
    """Return 8 to 64 lower-case digits from either case, with or without `sha256:`. Raises InvalidRequest."""
    digits = text.strip().lower().removeprefix("sha256:")
    if not _PREFIX.fullmatch(digits):
        raise InvalidRequest(
            f"{text!r} is not a hash: give 8 to 64 hexadecimal digits of a sha256, an AutoV2 or an AutoV3", field="hash"
        )
    return digits


def weights_of(files: Mapping[str, Path]) -> dict[str, Path]:
    """Return the files of weights among published files; a single file counts as one, whatever its name."""
    return {name: file for name, file in files.items() if len(files) == 1 or file.suffix in _WEIGHTS}


def hashes_of(
    files: Mapping[str, Path], known: Mapping[Path, Blob], record: Blob | None, tensors: Iterable[FileHash]
) -> frozenset[FileHash]:
    """Return all hashes of a publication: of `files` as published (those in `known` are not hashed again), of the
    record, and `tensors`, which `tensor_hashes` returned.
    """
    hashes = {
        FileHash(HashKind.FILE, known[file].hex if file in known else file_sha256(file))
        for file in weights_of(files).values()
    }
    hashes |= set(tensors)
    if record is not None:
        hashes.add(FileHash(HashKind.RECORD, record.hex))
    return frozenset(hashes)


def tensor_hashes(weights: Iterable[Path]) -> list[FileHash]:
    """Return the data hash of a single file; none of several, as no tool shows a hash for one file of many."""
    alone = list(weights)
    hex_ = tensors_sha256(alone[0]) if len(alone) == 1 else None
    return [] if hex_ is None else [FileHash(HashKind.TENSORS, hex_)]


def file_sha256(file: Path) -> str:
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def tensors_sha256(file: Path) -> str | None:
    """Return the sha256 of a safetensors file's data; None for another format."""
    try:
        start = read_header(file).data_start
    except Refused:
        return None
    with file.open("rb") as source:
        source.seek(start)
        return hashlib.file_digest(source, "sha256").hexdigest()


def content_digest(files: Mapping[str, str]) -> str:
    """Return `sha256:…` of a folder's content, from name → sha256 in hex of its files, whatever its version or path."""
    listing = json.dumps([(name, files[name]) for name in sorted(files, key=PurePosixPath)], ensure_ascii=False)
    return f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}"
