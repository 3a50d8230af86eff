"""From files to what the registry stores: one module per method, each with the same three names.

    KIND                       the word in the manifest
    recognises(source)         do these files look like mine? Content decides, not endings.
    read(source, base)         check everything, derive compatibility, write the normalised record

A new method is a module here and its name in FORMATS.
"""

from __future__ import annotations

from typing import Protocol

from scumble.errors import Refused
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
from scumble_registry.formats.incoming import with_safetensors
from scumble_registry.formats.safetensors_header import read_header
from scumble_registry.formats.source import Draft, Source
from scumble_registry.formats.strangers import refuse_strangers
from scumble_registry.manifest import Manifest


class Format(Protocol):
    KIND: str

    def recognises(self, source: Source) -> bool: ...

    def read(self, source: Source, base: Manifest | None) -> Draft:
        """Raises Refused for what may not be in a registry, Incompatible for what does not fit `base`."""
        ...


FORMATS: tuple[Format, ...] = (
    dreambooth,
    base,
    image_encoder,
    vae,
    ip_adapter,
    hypernetwork,
    textual_inversion,
    controlnet,
    lora,
)
"""In the order of being asked: a base's folder that comes with a base is a checkpoint of it; an embedding of one tensor
may bear any name, also one that speaks of LoRA, a FaceID IP-Adapter brings a LoRA of its own, and a control-LoRA speaks
of it too."""


def read(source: Source, base: Manifest | None) -> Draft:
    """The draft of the one format that recognises `source`, whose pickles become safetensors first (`incoming.py`)."""
    source = with_safetensors(source)
    for form in FORMATS:
        if form.recognises(source):
            return form.read(source, base)
    for name, file in source.weights().items():
        refuse_strangers(read_header(file).tensors, name)
    known = ", ".join(form.KIND for form in FORMATS)
    raise Refused(
        f"{source.path} is none of the kinds that can be published ({known}): a base (or, with --base, a checkpoint of "
        "it) is a folder with model_index.json or a single file with model.diffusion_model, "
        "a LoRA is a file (or a folder with one) of lora_A/lora_B "
        "or lora_down/lora_up, an embedding is one with a single tensor, named by its token or emb_params, "
        "an IP-Adapter is one with image_proj and ip_adapter, an image encoder is a folder with CLIP's vision tower, "
        "a VAE a folder with an AutoencoderKL, "
        "a ControlNet or T2I-Adapter its weights, with config.json or without, a hypernetwork "
        "is the webui's .pt, one of <width>.k.linear.<i> and <width>.v.linear.<i>, or one whose header holds "
        "scumble.predictor"
    )


__all__ = ["FORMATS", "Draft", "Format", "Source", "read"]
