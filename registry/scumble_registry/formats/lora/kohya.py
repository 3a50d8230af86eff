"""kohya's layout: `lora_unet_<M>.lora_down.weight`, `.lora_up.weight`, `.alpha`; `lora_te_<M>` for the text
encoder; `.dora_scale` where it is a DoRA.

M is the diffusers name with '.' as '_', which cannot be undone by rule: names are looked up in a dictionary
built from the base's own targets (no two of SD 1.5's 391 or SDXL's 1050 collide). A missing alpha, and alpha
0, mean rank.
"""

from __future__ import annotations

from collections.abc import Mapping

from scumble.errors import Refused
from scumble_registry.compatibility import BaseCompatibility
from scumble_registry.formats.lora.leftover import refuse_leftover
from scumble_registry.formats.lora.record import LoraRecord, make_module, read_magnitude
from scumble_registry.formats.safetensors_header import Array

_DOWN, _UP, _ALPHA, _MAGNITUDE = ".lora_down.weight", ".lora_up.weight", ".alpha", ".dora_scale"


def recognises(names: Mapping[str, object]) -> bool:
    return any(name.startswith(("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")) for name in names)


def parse(tensors: Mapping[str, Array], base: BaseCompatibility) -> LoraRecord:
    """Raises Refused listing every key that is not understood."""
    modules = flat_names(base)
    record: LoraRecord = {}
    used: set[str] = set()
    for name in sorted(tensors):
        module = name.removesuffix(_DOWN)
        target = modules.get(module)
        if module == name or target is None or module + _UP not in tensors:
            continue
        alpha = tensors.get(module + _ALPHA)
        if alpha is not None and alpha.size != 1:
            raise Refused(f"{module}.alpha has shape {alpha.shape}; one number is needed")
        value = None if alpha is None else float(alpha.reshape(())) or None
        down, up = tensors[name], tensors[module + _UP]
        lengths = tensors.get(module + _MAGNITUDE)
        magnitude = None if lengths is None else read_magnitude(target, lengths, up, down, convolution_axis=1)
        record[target] = make_module(target, down, up, value, magnitude)
        used |= {name, module + _UP, module + _ALPHA, module + _MAGNITUDE}
    refuse_leftover(tensors.keys() - used, hint=f"or they name no module of this {base.family} base")
    return dict(sorted(record.items()))


def flat_names(base: BaseCompatibility) -> dict[str, str]:
    """kohya's name → target, for every target of the base."""
    first = "lora_te1_" if base.family == "sdxl" else "lora_te_"
    prefixes = {"unet": "lora_unet_", "text_encoder": first, "text_encoder_2": "lora_te2_"}
    names: dict[str, str] = {}
    for target in base.targets:
        component, _, module = target.partition(".")
        names[prefixes[component] + module.replace(".", "_")] = target
    return names
