"""Canonical names of a base's modules, and their shapes.

A *target* is a weighted module of the base by its canonical name, e.g. `unet.mid_block.attentions.0.proj_in`
or `text_encoder.text_model.encoder.layers.0.self_attn.q_proj`, with its weight's shape `(out, in)` or `(out,
in, k, k)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from scumble.errors import Incompatible
from scumble_registry.compatibility.base import BaseCompatibility
from scumble_registry.compatibility.original_names import original_names
from scumble_registry.compatibility.shapes import Shape, matrix_shape, show_shape

LLLITE = "lllite_unet_"
"""The prefix of module names in an LLLite."""

_NORMS = (
    (".conv1", ".norm1"),
    (".conv2", ".norm2"),
    (".proj_in", ".norm"),
    (".attn1.to_q", ".norm1"),
    (".attn2.to_q", ".norm2"),
    (".ff.net.0.proj", ".norm3"),
    ("unet.conv_out", "unet.conv_norm_out"),
    (".self_attn.q_proj", ".layer_norm1"),
    (".mlp.fc1", ".layer_norm2"),
)
"""End of a layer's name, and of the name of the norm before it."""


def canonical_name(module: str) -> str:
    """Name a module as transformers < 5.6 does, which saves some folders without `text_model`.

    >>> canonical_name("text_encoder.encoder.layers.0.mlp.fc1")
    'text_encoder.text_model.encoder.layers.0.mlp.fc1'
    """
    component, _, rest = module.partition(".")
    if component.startswith("text_encoder") and not rest.startswith(("text_model.", "text_projection")):
        return f"{component}.text_model.{rest}"
    return module


def lllite_names(targets: Iterable[str]) -> dict[str, str]:
    """Map an LLLite's names of a UNet's modules (made from original or diffusers' names) to canonical names."""
    own = [name.removeprefix("unet.") for name in targets if name.startswith("unet.")]
    names = dict(zip(own, own, strict=True)) | {original: ours for ours, original in original_names(own).items()}
    return {LLLITE + name.replace(".", "_"): f"unet.{ours}" for name, ours in names.items()}


def check_targets(requires: Mapping[str, Shape], base: BaseCompatibility) -> None:
    """Check that the base has all targets. Raises Incompatible with the first that does not match and both shapes."""
    norms = norm_shapes(base) if any(len(shape) == 1 for shape in requires.values()) else {}
    for target, shape in sorted(requires.items()):
        has = base.targets.get(target) or norms.get(target)
        if has is None:
            raise Incompatible(
                f"the adapter changes {target} {show_shape(shape)}, which this {base.family} base does not have; "
                "use the base that it was trained on",
                target=target,
                adapter_shape=shape,
                base_shape=None,
            )
        if matrix_shape(has) != matrix_shape(shape) and not is_padded(target, requires, base):
            raise Incompatible(
                f"the adapter changes {target} as {show_shape(shape)}, but in this {base.family} base "
                f"it is {show_shape(has)}; use the base that it was trained on",
                target=target,
                adapter_shape=shape,
                base_shape=has,
            )


def is_padded(target: str, requires: Mapping[str, Shape], base: BaseCompatibility) -> bool:
    """Return whether a change of `unet.conv_in` for a base without mask channels also fits this inpainting base.

    An inpainting base reads a mask and a masked image after the latents; the change leaves those channels as they are.
    """
    has, shape = base.targets.get(target, ()), requires[target]
    return (
        target == "unet.conv_in"
        and len(shape) == 4
        and shape[1] == base.latent_channels < base.in_channels
        and has == (shape[0], base.in_channels, *shape[2:])
    )


def norm_shapes(base: BaseCompatibility) -> dict[str, Shape]:
    """Return every norm of the UNet and the text encoders → (channels,), taken from the layer after the norm."""
    norms: dict[str, Shape] = {}
    for target, shape in base.targets.items():
        for layer, norm in _NORMS:
            if target.endswith(layer):
                norms[target.removesuffix(layer) + norm] = (shape[1],)
        if target.endswith(".mlp.fc1"):
            norms[f"{target.partition('.encoder.')[0]}.final_layer_norm"] = (shape[1],)
    return dict(sorted(norms.items()))


def has_bias(target: str) -> bool:
    """Return whether a layer has a bias: all do but the UNet's attention projections and `text_projection`."""
    return not target.endswith((".to_q", ".to_k", ".to_v", ".text_projection"))
