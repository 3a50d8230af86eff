"""Convert names of the original (ldm) ControlNet's weights to names of diffusers' ControlNetModel.

The encoder has the names of a UNet (`compatibility/original_names.py`). The residual after each of the `input_blocks`
passes through one of the `zero_convs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from scumble_registry.compatibility import original_names

PREFIX = "control_model."
MARKS = ("lora_controlnet", "difference")
"""Tensors that mark a control-LoRA, or differences to the base's weights."""
_FIXED = {
    "middle_block_out.0": "controlnet_mid_block",
    # the control image's embedding has convolutions at even indices, with activations between them
    "input_hint_block.0": "controlnet_cond_embedding.conv_in",
    **{f"input_hint_block.{2 * i + 2}": f"controlnet_cond_embedding.blocks.{i}" for i in range(6)},
    "input_hint_block.14": "controlnet_cond_embedding.conv_out",
}
_OF_DECODER = ("up_blocks.", "conv_norm_out", "conv_out")


def strip(name: str) -> str:
    return name.removeprefix("state_dict.").removeprefix(PREFIX)


def is_ldm(names: Iterable[str]) -> bool:
    """Return whether there are `zero_convs`, which only these nets have."""
    return any(strip(name).startswith("zero_convs.") for name in names)


def converter(names: Iterable[str]) -> Callable[[str], str | None]:
    """Return a function that renames a tensor, e.g. `input_blocks.1.0.in_layers.2.weight`; None for an unknown name.

    The last part of a name does not change: `weight`, `bias`, or a factor's `up` or `down`.
    """
    of_encoder = original_names.converter(strip(name) for name in names)

    def convert(name: str) -> str | None:
        module, _, role = strip(name).rpartition(".")
        renamed = _FIXED.get(module) or _residual(module) or of_encoder(module)
        if renamed is None or renamed.startswith(_OF_DECODER):
            return None
        return f"{renamed}.{role}"

    return convert


def _residual(module: str) -> str | None:
    block, index, inner = (*module.split(".", 2), "", "")[:3]
    return f"controlnet_down_blocks.{index}" if block == "zero_convs" and inner == "0" else None
