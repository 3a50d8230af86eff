"""Read published files into records and export them: one module per kind, each with its FORMAT (`format.py`).

A new kind is a module here and one line in FORMATS.
"""

from __future__ import annotations

from collections.abc import Sequence

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
"""In the order of recognition. A base's folder that is published for a base is a checkpoint of it. LoRA is last,
as an embedding's only tensor may have any name, and keys of a FaceID IP-Adapter and a control-LoRA mention LoRA."""


_SHOWN = 4
"""Names in a message."""


def format_of(kind: str) -> Format:
    """Return the format of a manifest's kind, which is one of FORMATS."""
    return next(form for form in FORMATS if form.kind == kind)


def read(source: Source, base: BaseCompatibility | None) -> Draft:
    """Read `source` by the first format that recognises it, after converting pickles to safetensors (`incoming.py`).

    Raises Refused for files of no kind, and what the format raises.
    """
    source = with_safetensors(source)
    for form in FORMATS:
        if form.recognises(source):
            return form.read(source, base)
    for name, file in source.weights().items():
        refuse_known_models(read_header(file).tensors, name)
    raise Refused(
        f"{source.path} is none of the kinds that can be published (`scumble registry publish --help` lists them): "
        f"{_seen(source)}"
    )


def _seen(source: Source) -> str:
    """Say what a source looks like, of which no format knows anything, and what may help."""
    weights, files = source.weights(), _some(sorted(source.files))
    if "adapter_config.json" in source.files and not weights:
        return "it has PEFT's adapter_config.json, but no adapter_model.safetensors; put the weights beside it"
    if not weights:
        return f"it has no weights, only {files}" if files else "it is empty"
    if len(weights) > 1:
        return (
            f"it has {len(weights)} files of weights ({_some(sorted(weights))}); publish one, or a whole model's folder"
        )
    name, file = next(iter(weights.items()))
    tensors = read_header(file).tensors
    return f"{name} has {len(tensors)} tensors that no kind has ({_some(sorted(tensors))}); is it for another model?"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")


__all__ = ["FORMATS", "Draft", "Format", "Source", "format_of", "read"]
