"""Hypernetworks, of two kinds that share a name in the field:

* `context.py`: the webui's, small networks that change what attention reads its keys and values from;
* `predictor.py`: a network that reads a picture or a text and predicts a LoRA.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TypeAlias

from scumble.errors import IntegrityError, Refused
from scumble_registry.compatibility import HypernetworkCompatibility
from scumble_registry.formats.floats import read_floats
from scumble_registry.formats.hypernetwork import context, predictor
from scumble_registry.formats.hypernetwork.context_record import ContextRecord
from scumble_registry.formats.hypernetwork.predictor import PredictorRecord
from scumble_registry.formats.safetensors_header import Header, read_header, read_tensors
from scumble_registry.formats.source import Draft, Source, check_plain
from scumble_registry.manifest import Manifest

KIND = "hypernetwork"
FILE_NAME = "hypernetwork.safetensors"
"""What a single file is called inside the registry: its name on disk is no content."""

HypernetworkRecord: TypeAlias = ContextRecord | PredictorRecord

_MAX_BYTES = 1 << 30


def recognises(source: Source) -> bool:
    """One safetensors file, alone or in a folder, of one of the two kinds."""
    weights = list(source.weights().values()) or ([source.path] if source.path.is_file() else [])
    return len(weights) == 1 and _form(read_header(weights[0])) is not None


def read(source: Source, base: Manifest | None) -> Draft:
    (file,) = source.weights().values() or (source.path,)
    if source.path.is_dir():
        check_plain(source)
    header = read_header(file)
    tensors = read_floats(file, header, what="a hypernetwork", max_bytes=_MAX_BYTES)
    form = _form(header)
    assert form is not None  # `recognises` has seen to it
    record, network, family = form.parse(tensors, header.metadata)
    if base is not None:
        family = base.compatibility.family
    return Draft(
        files=source.files if source.path.is_dir() else {FILE_NAME: file},
        compatibility=HypernetworkCompatibility(family=family, network=network),
        record=record,
    )


def read_record(path: Path) -> HypernetworkRecord:
    """Arrays are read-only views of the mapped file. Raises IntegrityError if this is no record."""
    try:
        header = read_header(path)
        tensors = read_tensors(path, header)
        if header.metadata.get("format") == context.FORMAT:
            return context.read(tensors, header.metadata)
        return predictor.read(tensors, header.metadata)
    except (Refused, KeyError, ValueError) as error:
        raise IntegrityError(
            f"{path} is not a hypernetwork's record: {error}; clear the cache and try again"
        ) from error


def _form(header: Header) -> ModuleType | None:
    return next((form for form in (predictor, context) if form.recognises(header)), None)


__all__ = ["KIND", "HypernetworkRecord", "read", "read_record", "recognises"]
