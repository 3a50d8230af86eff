"""Split a single file: each tensor's component of Stable Diffusion, by the original names.

| component    | SD 1.x                          | SD 2.x                    | SDXL                                   |
|--------------|---------------------------------|---------------------------|----------------------------------------|
| UNet         | `model.diffusion_model.`        | the same                  | the same                               |
| VAE          | `first_stage_model.`            | the same                  | the same                               |
| text encoder | `cond_stage_model.transformer.` | `cond_stage_model.model.` | `conditioner.embedders.0.transformer.` |
| second one   |                                 |                           | `conditioner.embedders.1.model.`       |

A `.ckpt` of Lightning has all of them in its `state_dict`, beside values that only training needs. `model_ema.` is the
UNet averaged over training (EMA), under names without dots.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from scumble.errors import Refused
from scumble_registry.compatibility import Family, original_names
from scumble_registry.formats.checkpoint import vae
from scumble_registry.formats.checkpoint.text import Convert, clip, open_clip, open_clip_penultimate
from scumble_registry.formats.safetensors_header import Array

UNET, VAE, EMA, LIGHTNING = "model.diffusion_model.", "first_stage_model.", "model_ema.", "state_dict."
_CONTROL = "control_model."
_TEXTS: tuple[tuple[str, str, Family, Convert], ...] = (
    ("cond_stage_model.transformer.", "text_encoder", "sd1", clip),
    ("cond_stage_model.model.", "text_encoder", "sd2", open_clip_penultimate),
    ("conditioner.embedders.0.transformer.", "text_encoder", "sdxl", clip),
    ("conditioner.embedders.1.model.", "text_encoder_2", "sdxl", open_clip),
)
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
"""Empty tensors that mark how an SDXL checkpoint was trained."""
_UNUSED = re.compile(
    r"(?:alphas_cumprod(?:_prev)?|betas|log_one_minus_alphas_cumprod|logvar|lvlb_weights|posterior_.+"
    r"|sqrt_.+|scale_factor|denoiser\.(?:sigmas|log_sigmas)|first_stage_model\.loss\..+|model_ema\.(?:decay|num_updates)"
    r"|v_pred|ztsnr)"
)
"""Tables of the schedule, which are computed from its parameters, and tensors that only training needs."""
_OF_LIGHTNING = re.compile(
    r"(?:optimizer_states|lr_schedulers|callbacks|loops|native_amp_scaling_state|hparams.*|hyper_parameters)(?:\.|$)"
)


@dataclass(slots=True)
class CheckpointParts:
    """The tensors of each component (`unet`, `vae`, the text encoders) by the names of the diffusers layout."""

    family: Family
    components: dict[str, dict[str, Array]] = field(default_factory=dict)
    marks: frozenset[str] = frozenset()
    unused: list[str] = field(default_factory=list)
    """Names of tensors that sampling does not need."""
    averaged: int = 0
    """Number of averaged tensors that were left out."""
    unknown: list[str] = field(default_factory=list)


def is_whole(names: Iterable[str]) -> bool:
    """Return whether it is a checkpoint in the original layout, and not a ControlNet with its base model."""
    plain = [name.removeprefix(LIGHTNING) for name in names]
    return any(name.startswith(UNET) for name in plain) and not any(name.startswith(_CONTROL) for name in plain)


def take_apart(tensors: Mapping[str, Array], like: Family | None = None, *, ema: bool) -> CheckpointParts:
    """Split the tensors; `like` is the family of the folder of `Hints.like`, `ema` selects the averaged UNet.

    Raises Refused if `ema` is set and there are no averages, or if the family is unknown.
    """
    inner = _inside(tensors)
    parts = CheckpointParts(_family(inner, like), marks=frozenset(inner.keys() & {V_PREDICTION, ZERO_SNR}))
    parts.unused += [name for name in tensors if _OF_LIGHTNING.match(name)]
    rest = {name for name in inner if not _OF_LIGHTNING.match(name)}
    rest -= _take_unet(parts, inner, ema=ema)
    rest -= _take(parts, inner, VAE, "vae", vae.convert)
    for prefix, component, family, convert in _TEXTS:
        if family == parts.family:
            rest -= _take_text(parts, inner, prefix, component, convert)
    parts.unused += sorted(name for name in rest if _UNUSED.fullmatch(name))
    parts.unknown += sorted(name for name in rest if not _UNUSED.fullmatch(name))
    return parts


def _inside(tensors: Mapping[str, Array]) -> dict[str, Array]:
    if any(name.startswith(LIGHTNING) for name in tensors):
        return {n.removeprefix(LIGHTNING): v for n, v in tensors.items() if not _OF_LIGHTNING.match(n)}
    return dict(tensors)


def _family(tensors: Mapping[str, Array], like: Family | None) -> Family:
    for prefix, _, family, _ in _TEXTS:
        if any(name.startswith(prefix) for name in tensors):
            return family
    if like is not None:
        return like
    context = next((v.shape[1] for name, v in tensors.items() if name.endswith("attn2.to_k.weight")), 0)
    families: dict[int, Family] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
    if context not in families:
        raise Refused(
            f"the checkpoint has no text encoder and reads text of width {context}, so its family is unknown; "
            "name a base: --like REF"
        )
    return families[context]


def _take_unet(parts: CheckpointParts, tensors: Mapping[str, Array], *, ema: bool) -> set[str]:
    own = {name: values for name, values in tensors.items() if name.startswith(UNET)}
    averages = {name: f"{EMA}{name.removeprefix('model.').replace('.', '')}" for name in own}
    present = {average for average in averages.values() if average in tensors}
    if ema:
        if missing := sorted(set(averages.values()) - present):
            raise Refused(f"--ema: the checkpoint holds no averaged weights ({missing[0]} is missing); leave it out")
        own = {name: tensors[average] for name, average in averages.items()}
    else:
        parts.averaged = len(present)
    _take(parts, own, UNET, "unet", _convert_unet)
    return own.keys() | present


def _convert_unet(tensors: Mapping[str, Array]) -> tuple[dict[str, Array], list[str]]:
    convert = original_names.converter(tensors)
    renamed: dict[str, Array] = {}
    unknown: list[str] = []
    for name, values in tensors.items():
        module, _, role = name.rpartition(".")
        if (ours := convert(module)) is None:
            unknown.append(name)
        else:
            renamed[f"{ours}.{role}"] = values
    return renamed, unknown


def _take(
    parts: CheckpointParts,
    tensors: Mapping[str, Array],
    prefix: str,
    component: str,
    convert: Callable[[Mapping[str, Array]], tuple[dict[str, Array], list[str]]],
) -> set[str]:
    own = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
    own = {name: values for name, values in own.items() if not _UNUSED.fullmatch(prefix + name)}
    if own:
        parts.components[component], unknown = convert(own)
        parts.unknown += [prefix + name for name in unknown]
    return {prefix + name for name in own}


def _take_text(
    parts: CheckpointParts, tensors: Mapping[str, Array], prefix: str, component: str, convert: Convert
) -> set[str]:
    def both(own: Mapping[str, Array]) -> tuple[dict[str, Array], list[str]]:
        text = convert(own)
        parts.unused += [prefix + name for name in text.unused]
        return text.tensors, text.unknown

    return _take(parts, tensors, prefix, component, both)
