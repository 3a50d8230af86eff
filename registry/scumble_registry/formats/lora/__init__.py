"""LoRA: for some modules of the base, ΔW = alpha / rank · up @ down.

Dialects, one module each: `peft.py` (diffusers/PEFT) and `kohya.py`. Both end in the same record
(`record.py`).
"""

from __future__ import annotations

import json

from scumble.errors import Refused
from scumble_registry.compatibility import BaseCompatibility, Family, LoraCompatibility
from scumble_registry.formats.floats import read_floats
from scumble_registry.formats.lora import kohya, peft
from scumble_registry.formats.lora.record import LoraModule, LoraRecord, read_record, write_record
from scumble_registry.formats.safetensors_header import Array, Header, read_header
from scumble_registry.formats.source import Draft, Source, check_plain
from scumble_registry.manifest import Manifest

KIND = "lora"
FILE_NAME = "pytorch_lora_weights.safetensors"
"""What a single file is called inside the registry (diffusers' own default): its name on disk is no content.
"""

_MAX_BYTES = 2 << 30
_CONTEXT_FAMILY: dict[int, Family] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}


def recognises(source: Source) -> bool:
    """One safetensors file, alone or in a folder, with at least one key that speaks of LoRA."""
    weights = list(source.weights().values()) or ([source.path] if source.path.is_file() else [])
    return len(weights) == 1 and _looks_like_lora(read_header(weights[0]))


def read(source: Source, base: Manifest | None) -> Draft:
    (file,) = source.weights().values() or (source.path,)
    if source.path.is_dir():
        check_plain(source)
    header = read_header(file)
    tensors = read_floats(file, header, what="a LoRA", max_bytes=_MAX_BYTES)
    record = _parse(tensors, header.metadata, base)
    return Draft(
        files=source.files if source.path.is_dir() else {FILE_NAME: file},
        compatibility=_derive(record, base),
        record=write_record(record),
        trigger_words=trigger_words(header.metadata),
    )


def trigger_words(metadata: dict[str, str]) -> tuple[str, ...]:
    """From the header: `trigger_words` (JSON list or comma-separated) or `modelspec.trigger_phrase`."""
    text = metadata.get("trigger_words") or metadata.get("modelspec.trigger_phrase") or ""
    try:
        words = json.loads(text)
    except ValueError:
        words = text.split(",")
    return tuple(word.strip() for word in words if word.strip()) if _are_strings(words) else ()


def _parse(tensors: dict[str, Array], metadata: dict[str, str], base: Manifest | None) -> LoraRecord:
    if kohya.recognises(tensors):
        return kohya.parse(tensors, _base_of(base))
    return peft.parse(tensors, metadata)


def _derive(record: LoraRecord, base: Manifest | None) -> LoraCompatibility:
    return LoraCompatibility(
        family=_base_of(base).family if base else _guess_family(record),
        requires={target: module.shape for target, module in record.items()},
        ranks={target: module.rank for target, module in record.items()},
        magnitudes=any(module.magnitude is not None for module in record.values()),
    )


def _guess_family(record: LoraRecord) -> Family | None:
    """By the width of the text that cross-attention reads: 768, 1024 or 2048."""
    for target, module in record.items():
        if target.startswith("unet.") and target.endswith((".attn2.to_k", ".attn2.to_v")):
            return _CONTEXT_FAMILY.get(module.shape[1])
    return None


def _base_of(base: Manifest | None) -> BaseCompatibility:
    if base is None:
        raise Refused(
            "this LoRA is in kohya's layout, whose names can only be read with the base at hand: "
            "publish it with --base REF"
        )
    assert isinstance(base.compatibility, BaseCompatibility)
    return base.compatibility


def _looks_like_lora(header: Header) -> bool:
    return any("lora" in name for name in header.tensors)


def _are_strings(words: object) -> bool:
    return isinstance(words, list) and all(isinstance(word, str) for word in words)


__all__ = ["KIND", "LoraModule", "LoraRecord", "read", "read_record", "recognises", "write_record"]
