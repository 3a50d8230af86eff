"""From files to what the registry stores, and back: one module per kind, each with its FORMAT (`format.py`).

A new kind is a module here and one line in FORMATS.
"""

from __future__ import annotations

from scumble.errors import Refused
from scumble_registry.compatibility import BaseCompatibility
from scumble_registry.formats import (
    base,
    controlnet,
    dreambooth,
    hypernetwork,
    image_encoder,
    ip_adapter,
    lora,
    textual_inversion,
    vae,
)
from scumble_registry.formats.format import Format
from scumble_registry.formats.incoming import with_safetensors
from scumble_registry.formats.refused_models import refuse_known_models
from scumble_registry.formats.safetensors_header import read_header
from scumble_registry.formats.source import Draft, Source

FORMATS: tuple[Format, ...] = (
    dreambooth.FORMAT,
    base.FORMAT,
    image_encoder.FORMAT,
    vae.FORMAT,
    ip_adapter.FORMAT,
    hypernetwork.FORMAT,
    textual_inversion.FORMAT,
    controlnet.FORMAT,
    lora.FORMAT,
)
"""In the order of being asked: a base's folder that comes with a base is a checkpoint of it; an embedding of one tensor
may bear any name, also one that speaks of LoRA, a FaceID IP-Adapter brings a LoRA of its own, and a control-LoRA speaks
of it too."""


def format_of(kind: str) -> Format:
    """Return the format of a manifest's kind, which is one of FORMATS."""
    return next(form for form in FORMATS if form.kind == kind)


def read(source: Source, base: BaseCompatibility | None) -> Draft:
    """The draft of the one format that recognises `source`, whose pickles become safetensors first (`incoming.py`)."""
    source = with_safetensors(source)
    for form in FORMATS:
        if form.recognises(source):
            return form.read(source, base)
    for name, file in source.weights().items():
        refuse_known_models(read_header(file).tensors, name)
    known = "; ".join(f"{form.kind}: {form.hint}" for form in FORMATS)
    raise Refused(f"{source.path} is none of the kinds that can be published. {known}")


__all__ = ["FORMATS", "Draft", "Format", "Source", "format_of", "read"]
