"""Textual inversion: vectors that replace a token of their own in a prompt (Gal et al., 2208.01618).

`layouts.py` recognises the layouts. The publisher's first trigger word replaces the file's token; a tensor alone has no
token. Embeddings inside an image file are refused by name.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from pydantic import JsonValue

from scumble.errors import Refused
from scumble_registry.compatibility import BaseCompatibility, Family, TextualInversionCompatibility
from scumble_registry.formats.floats import read_floats
from scumble_registry.formats.format import Format
from scumble_registry.formats.pickled import Plain
from scumble_registry.formats.safetensors_header import Header, read_header, write_file
from scumble_registry.formats.source import Draft, Source, check_plain
from scumble_registry.formats.textual_inversion.export import LAYOUTS, export_version
from scumble_registry.formats.textual_inversion.layouts import Embedding, find, is_negative
from scumble_registry.formats.textual_inversion.record import (
    TextualInversionRecord,
    make_record,
    read_record,
    write_record,
)
from scumble_registry.formats.unknown_keys import leave_out

KIND = "textual_inversion"
FILE_NAME = "learned_embeds.safetensors"
"""The name of a single file inside the registry (diffusers' default) if its token cannot be a file's name."""

_MAX_BYTES = 4 << 20
_FAMILIES: dict[tuple[int, ...], Family] = {(768,): "sd1", (1024,): "sd2", (768, 1280): "sdxl"}
_IMAGES = (b"\x89PNG", b"RIFF")


def recognises(source: Source) -> bool:
    """Return whether it is one file of weights with the keys of a layout, or an image file (which `read` refuses)."""
    weights = source.weights()
    if len(weights) != 1:
        return _is_image(source)
    ((name, file),) = weights.items()
    return _find(read_header(file), source.plain.get(name)) is not None


def read(source: Source, base: BaseCompatibility | None) -> Draft:
    if _is_image(source):
        raise Refused(
            "embeddings inside an image file cannot be read; save the embedding as a file with the webui, and publish "
            "that"
        )
    ((name, file),) = source.weights().items()
    if source.path.is_dir():
        check_plain(source)
    header = read_header(file)
    layout = _find(header, source.plain.get(name))
    assert layout is not None  # `recognises` checked it
    leftover = leave_out(source, layout.leftover, "beside an embedding")
    vectors = replace(header, tensors={key: header.tensors[key] for key in layout.encoders})
    tensors = read_floats(file, vectors, what="an embedding", max_bytes=source.limit(_MAX_BYTES))
    record = make_record({layout.encoders[key]: values for key, values in tensors.items()})
    token = _token(source, layout, file)
    file_name = f"{token}.safetensors" if layout.token is None and _can_name_a_file(token) else FILE_NAME
    if layout.must_be_named:
        file = _as_nameless(source, record)
    compatibility = _derive(record, token, base)
    details: dict[str, JsonValue] = {
        "serving": "vectors in the prompt",
        "vectors": compatibility.vectors,
        "widths": list(compatibility.widths),
        "negative": is_negative(header.metadata),
        "family_told_by": "the base" if base is not None else "the widths of its vectors",
    }
    return Draft(
        files=source.files if source.path.is_dir() else {file_name: file},
        compatibility=compatibility,
        record=write_record(record),
        trigger_words=(token,),
        dialect=layout.dialect,
        details=details,
        leftover=leftover,
    )


def _find(header: Header, plain: Plain) -> Embedding | None:
    return find({name: info.shape for name, info in header.tensors.items()}, plain)


def _is_image(source: Source) -> bool:
    if source.path.is_dir() or source.weights():
        return False
    with source.path.open("rb") as file:
        return file.read(4).startswith(_IMAGES)


def _as_nameless(source: Source, record: TextualInversionRecord) -> Path:
    """Write a tensor alone in kohya's layout, so that a pulled file can be published again."""
    assert source.work is not None
    file = source.work / "emb_params.safetensors"
    write_file(file, {"emb_params": record["text_encoder"]}, {})
    return file


def _token(source: Source, layout: Embedding, file: Path) -> str:
    if layout.must_be_named and not source.words:
        raise Refused("the file holds a tensor without a token; name the token that prompts use: --trigger WORD")
    token = (source.words[0] if source.words else layout.token or file.stem).strip()
    if not token:
        raise Refused("the embedding's token is empty; name the token that prompts use: --trigger WORD")
    return token


def _derive(
    record: TextualInversionRecord, token: str, base: BaseCompatibility | None
) -> TextualInversionCompatibility:
    widths = tuple(vectors.shape[1] for vectors in record.values())
    family = _FAMILIES.get(widths)
    if base is not None:
        family = base.family
    count = len(next(iter(record.values())))
    return TextualInversionCompatibility(family=family, widths=widths, vectors=count, token=token)


def _can_name_a_file(token: str) -> bool:
    """Return whether the token can be a file's name, from which other tools read it."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_. -]{0,99}", token) is not None


FORMAT = Format(
    KIND,
    "a file with a single tensor, named by its token or emb_params",
    recognises,
    read,
    LAYOUTS,
    export_version,
)

__all__ = [
    "FORMAT",
    "KIND",
    "TextualInversionRecord",
    "make_record",
    "read",
    "read_record",
    "recognises",
    "write_record",
]
