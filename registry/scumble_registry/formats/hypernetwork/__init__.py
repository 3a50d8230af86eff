"""Hypernetworks, of two kinds that share the name:

* `context.py`: the webui's, small networks on the context from which attention computes keys and values (`webui.py`
  reads its .pt);
* `predictor.py`: a network that reads an image or a text and predicts a LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

from pydantic import JsonValue

from scumble.errors import IntegrityError, Refused
from scumble_registry.compatibility import BaseCompatibility, ContextNetworks, HypernetworkCompatibility
from scumble_registry.formats.floats import read_floats
from scumble_registry.formats.format import Format
from scumble_registry.formats.hypernetwork import context, predictor, webui
from scumble_registry.formats.hypernetwork.context_record import ContextRecord
from scumble_registry.formats.hypernetwork.export import LAYOUTS, export_version
from scumble_registry.formats.hypernetwork.predictor import PredictorRecord
from scumble_registry.formats.safetensors_header import Array, Header, read_header, read_tensors
from scumble_registry.formats.source import Draft, Source, check_plain
from scumble_registry.formats.unknown_keys import leave_out

KIND = "hypernetwork"
FILE_NAME = "hypernetwork.safetensors"
"""The name of a single file inside the registry, whatever its name on disk."""

HypernetworkRecord: TypeAlias = ContextRecord | PredictorRecord

_MAX_BYTES = 1 << 30


def recognises(source: Source) -> bool:
    """Return whether there is one file of weights, alone or in a folder, of one of the two kinds."""
    weights = list(source.weights().values())
    return len(weights) == 1 and (webui.recognises(header := read_header(weights[0])) or _form(header) is not None)


def read(source: Source, base: BaseCompatibility | None) -> Draft:
    ((name, file),) = source.weights().items()
    if source.path.is_dir():
        check_plain(source)
    header, dialect = read_header(file), ""
    if webui.recognises(header):
        file, dialect = webui.convert(source, name), "webui .pt"
        header = read_header(file)
    tensors = read_floats(file, header, what="a hypernetwork", max_bytes=source.limit(_MAX_BYTES))
    form = _form(header)
    assert form is not None  # `recognises` checked it
    leftover = leave_out(source, form.unknown_keys(header), "beside a hypernetwork's own")
    known = {key: values for key, values in tensors.items() if key not in leftover}
    record, network, family = form.parse(known, header.metadata)
    if base is not None:
        family = base.family
    compatibility = HypernetworkCompatibility(family=family, network=network)
    others = {key: path for key, path in source.files.items() if key != name} if source.path.is_dir() else {}
    return Draft(
        files={**others, name if source.path.is_dir() and not dialect else FILE_NAME: file},
        compatibility=compatibility,
        record=record,
        dialect=dialect or ("webui, safetensors" if form is context else "scumble predictor"),
        details=_details(compatibility, known, has_base=base is not None),
        leftover=leftover,
    )


def _details(
    compatibility: HypernetworkCompatibility, tensors: Mapping[str, Array], *, has_base: bool
) -> dict[str, JsonValue]:
    is_context = isinstance(compatibility.network, ContextNetworks)
    return {
        "serving": "networks on attention's context" if is_context else "predicts a LoRA's factors",
        "parameters": sum(values.size for values in tensors.values()),
        "family_told_by": "the base" if has_base else "the width of the text that it reads",
    }


def read_record(path: Path) -> HypernetworkRecord:
    """Read a record as read-only views of the mapped file. Raises IntegrityError if this is no record."""
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


FORMAT = Format(
    KIND,
    "the webui's .pt, a file of <width>.k.linear.<i> and <width>.v.linear.<i>, or one whose header holds "
    "scumble.predictor",
    recognises,
    read,
    LAYOUTS,
    export_version,
)

__all__ = ["FORMAT", "KIND", "HypernetworkRecord", "read", "read_record", "recognises"]
