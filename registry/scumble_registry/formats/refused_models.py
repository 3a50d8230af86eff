"""Known models that cannot be served, refused by name: they are not Stable Diffusion 1.x, 2.x or XL."""

from __future__ import annotations

from collections.abc import Iterable

from scumble.errors import Refused

_MARKS: tuple[tuple[str, str], ...] = (
    ("motion_modules.", "a motion module (AnimateDiff), which makes videos"),
    (".time_stack.", "Stable Video Diffusion, which makes videos"),
    (".time_mixer.", "Stable Video Diffusion, which makes videos"),
    ("temporal_transformer_blocks.", "Stable Video Diffusion, which makes videos"),
    ("conditioner.embedders.0.model.", "SDXL's refiner, which is no base of its own"),
    ("joint_blocks.", "Stable Diffusion 3, a diffusion transformer"),
    ("distilled_guidance_layer.", "Chroma, a diffusion transformer"),
    ("double_stream_modulation", "FLUX.2, a diffusion transformer"),
    ("double_blocks.", "FLUX (or a relative of it), a diffusion transformer"),
    ("single_transformer_blocks.", "FLUX (or a relative of it), a diffusion transformer"),
    ("cap_embedder.", "Lumina, a diffusion transformer"),
    ("txt_in.text_norm.", "a diffusion transformer"),
    ("adaln_single.", "PixArt, a diffusion transformer"),
    ("clip_txt_mapper.", "Stable Cascade"),
    ("channelwise.0.", "Stable Cascade"),
    ("edm_mean", "Playground 2.5, which is sampled in another way (EDM)"),
    ("style_embedding", "a T2I-Adapter for style, which changes the text"),
    ("upscale.0.weight", "an upscaler of pixels"),
    ("conv_body.", "an upscaler of pixels"),
)
"""Part of a tensor's name that only such a model has → the model; the first match counts."""


def refused_model(names: Iterable[str]) -> str | None:
    names = list(names)
    return next((what for mark, what in _MARKS if any(mark in name for name in names)), None)


def refuse_known_models(names: Iterable[str], file: str) -> None:
    """Raises Refused, naming the model, if the tensors' names are those of a known model."""
    if (what := refused_model(names)) is not None:
        raise Refused(f"{file} is {what}; only Stable Diffusion 1.x, 2.x and XL are served here", file=file)
