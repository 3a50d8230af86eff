"""Kin of ControlNet that are known, and refused by name: what they need is not an input of our graphs."""

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
    "lora_layer": "CtrlLoRA, whose LoRA stands on a base ControlNet",
    "base_to_ctrl": "ControlNet-XS, which runs inside the UNet",
}
_ORIGINAL_T2I = ("body.0.block1.", "body.0.in_conv.", "adapter.body.0.block1.", "adapter.body.0.in_conv.")


def stranger(names: Iterable[str], class_name: str) -> str | None:
    """What files with these tensors, and this class in config.json (or ""), are, if they are of such a kind."""
    names = list(names)
    if class_name in _CLASSES:
        return _CLASSES[class_name]
    if any(name.startswith("lllite_unet_") for name in names):
        return "ControlNet-LLLite, which changes the UNet's attention from inside"
    if any(name.startswith(_NETS) for name in names):
        marks = (what for mark, what in _MARKS.items() if any(mark in name for name in names))
        return next(marks, None if class_name else _without_config(names))
    return None if class_name else _without_config(names)


def _without_config(names: list[str]) -> str | None:
    if any(name.startswith("controlnet_cond_embedding.") for name in names):
        return "a ControlNet without its config.json; publish the folder that holds both"
    if any(name.startswith(_ORIGINAL_T2I) for name in names):
        return "a T2I-Adapter without diffusers' config.json; convert it to diffusers' layout and publish the folder"
    return None
