"""Textual inversion: vectors that stand in a prompt where a token of their own is written (Gal et al., 2208.01618).

| layout            | keys                                      | token                            |
|-------------------|-------------------------------------------|----------------------------------|
| diffusers         | exactly one, (n, D) or (D,)               | the key                          |
| kohya, the webui  | `emb_params` (n, D); `clip_l` alone too   | the file's name without its end  |
| SDXL              | `clip_l` (n, D) and `clip_g` (n, D')      | the file's name without its end  |

The first trigger word that the publisher gives goes before all of these.
"""

from __future__ import annotations

import re

from scumble.errors import Refused
from scumble_registry.compatibility import BaseCompatibility, Family, TextualInversionCompatibility
from scumble_registry.formats.floats import read_floats
from scumble_registry.formats.safetensors_header import Header, read_header
from scumble_registry.formats.source import Draft, Source, check_plain
from scumble_registry.formats.textual_inversion.record import (
    TextualInversionRecord,
    make_record,
    read_record,
    write_record,
)
from scumble_registry.manifest import Manifest

KIND = "textual_inversion"
FILE_NAME = "learned_embeds.safetensors"
"""What a single file is called inside the registry (diffusers' own default) if its token is no file's name."""

_MAX_BYTES = 4 << 20
_ENCODERS = {"emb_params": "text_encoder", "clip_l": "text_encoder", "clip_g": "text_encoder_2"}
"""Keys that say which text encoder, and nothing of the token."""
_NAMELESS = ({"emb_params"}, {"clip_l"}, {"clip_l", "clip_g"})
_PARAMETERS = frozenset({"weight", "bias"})  # a layer's own tensors: no token ends so
_FAMILIES: dict[tuple[int, ...], Family] = {(768,): "sd1", (1024,): "sd2", (768, 1280): "sdxl"}


def recognises(source: Source) -> bool:
    """One safetensors file, alone or in a folder, whose keys are those of one layout."""
    weights = list(source.weights().values()) or ([source.path] if source.path.is_file() else [])
    return len(weights) == 1 and _looks_like_embedding(read_header(weights[0]))


def read(source: Source, base: Manifest | None) -> Draft:
    (file,) = source.weights().values() or (source.path,)
    if source.path.is_dir():
        check_plain(source)
    header = read_header(file)
    tensors = read_floats(file, header, what="an embedding", max_bytes=_MAX_BYTES)
    record = make_record({_ENCODERS.get(name, "text_encoder"): values for name, values in tensors.items()})
    nameless = set(tensors) in _NAMELESS
    token = _token(source, file.stem if nameless else next(iter(tensors)))
    inside = f"{token}.safetensors" if nameless and _can_name_a_file(token) else FILE_NAME
    return Draft(
        files=source.files if source.path.is_dir() else {inside: file},
        compatibility=_derive(record, token, base),
        record=write_record(record),
        trigger_words=(token,),
    )


def _token(source: Source, of_file: str) -> str:
    token = (source.words[0] if source.words else of_file).strip()
    if not token:
        raise Refused("the embedding's token is empty; say how prompts call it: --trigger WORD")
    return token


def _derive(record: TextualInversionRecord, token: str, base: Manifest | None) -> TextualInversionCompatibility:
    widths = tuple(vectors.shape[1] for vectors in record.values())
    family = _FAMILIES.get(widths)
    if base is not None and isinstance(base.compatibility, BaseCompatibility):
        family = base.compatibility.family
    count = len(next(iter(record.values())))
    return TextualInversionCompatibility(family=family, widths=widths, vectors=count, token=token)


def _looks_like_embedding(header: Header) -> bool:
    names = set(header.tensors)
    if names in _NAMELESS:
        return True
    if len(names) != 1:
        return False
    ((name, info),) = header.tensors.items()
    return len(info.shape) in {1, 2} and name.rpartition(".")[2] not in _PARAMETERS


def _can_name_a_file(token: str) -> bool:
    """Where the file's name is its token, it keeps it: other tools read it from there."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_. -]{0,99}", token) is not None


__all__ = ["KIND", "TextualInversionRecord", "make_record", "read", "read_record", "recognises", "write_record"]
