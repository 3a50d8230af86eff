"""Known nets related to ControlNet that cannot be served, refused by name: the graphs have no inputs for them."""

from __future__ import annotations

from collections.abc import Iterable

_CLASSES = {
    "SparseControlNetModel": "SparseCtrl, a ControlNet for videos",
    "ControlNetXSAdapter": "ControlNet-XS, which runs inside the UNet",
    "MultiAdapter": "several T2I-Adapters in one (publish each alone)",
}
_NETS = ("controlnet_cond_embedding.", "input_hint_block.", "zero_convs.", "control_model.")
_MARKS = {
    "temporal_res_block": "a ControlNet for Stable Video Diffusion",
    "motion_modules": "SparseCtrl, a ControlNet for videos",
    "lora_layer": "CtrlLoRA, whose LoRA needs a base ControlNet",
    "base_to_ctrl": "ControlNet-XS, which runs inside the UNet",
}


def refused_model(names: Iterable[str], class_name: str) -> str | None:
    """Return the name of a refused model from its tensors and its class in config.json (or ""), or None."""
    names = list(names)
    if class_name in _CLASSES:
        return _CLASSES[class_name]
    if any(name.startswith(_NETS) for name in names):
        return next((what for mark, what in _MARKS.items() if any(mark in name for name in names)), None)
    return None
