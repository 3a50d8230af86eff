"""Trains LoRA factors, which PEFT adds to a frozen pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from scumble_registry.compatibility import canonical_name
from scumble_registry.formats.base import examine
from scumble_registry.formats.source import Source
from scumble_trainers.base import Pipeline, TrainingBase
from scumble_trainers.data.dataset import Example
from scumble_trainers.method import TrainingMethod, in_fp32
from scumble_trainers.methods.lora.files import ADAPTER, COMPONENTS, FILE, save_factors
from scumble_trainers.methods.lora.layers import Size, choose_layers, endings, unused_layer
from scumble_trainers.methods.lora.settings import LoraSettings
from scumble_trainers.settings import StoredType


class LoraTraining(TrainingMethod[LoraSettings]):
    """A starts by Kaiming initialisation from the seed, B as zero, so nothing changes at first."""

    name = "lora"
    adapter = FILE

    def __init__(self, pipeline: Pipeline, settings: LoraSettings, base: TrainingBase) -> None:
        super().__init__(pipeline, settings, base)
        _add_factors(pipeline, settings)
        in_fp32([pipeline.unet, self.text])
        if settings.dora:
            _measure_lengths([pipeline.unet, self.text])

    @classmethod
    def check(cls, settings: LoraSettings, base: TrainingBase, examples: Sequence[Example]) -> None:  # noqa: ARG003
        if settings.rank_pattern or settings.alpha_pattern or settings.convolution_rank:
            compatibility, _ = examine(Source.scan(base.folder))
            choose_layers(settings, compatibility.targets)

    @property
    def trains_text(self) -> bool:
        return self.settings.text_encoder

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the factors: `unet.…` first, then `text.…`."""
        parts = {"unet": self.unet, "text": self.text}
        return {
            f"{part}.{name}": parameter
            for part, module in parts.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def learning_rate(self, name: str) -> float:
        """Return the learning rate; B's is a multiple of A's with LoRA+ (2402.12354)."""
        own = self.settings.text_learning_rate if name.startswith("text") else None
        return (own or self.settings.learning_rate) * (self.settings.plus_ratio if ".lora_B." in name else 1)

    def lay_out(self) -> None:
        super().lay_out()
        if self.settings.dora:  # PEFT multiplies a convolution's factors as matrices, without a copy
            for parameter in self.trained().values():
                parameter.data = parameter.data.contiguous()

    def save(self, folder: Path, dtype: StoredType) -> None:
        save_factors(self.pipeline, folder, dtype, self.settings.layout)


def _add_factors(pipeline: Pipeline, settings: LoraSettings) -> None:
    parts = {name: part for name in COMPONENTS if (part := getattr(pipeline, name, None)) is not None}
    names = {canonical_name(f"{part}.{name}"): name for part in parts for name, _ in parts[part].named_modules()}
    layers = choose_layers(settings, names)
    unused = unused_layer(names)
    for part, module in parts.items():
        own = {names[layer]: size for layer, size in layers.items() if layer.startswith(f"{part}.")}
        if own:
            skipped = [name for layer, name in names.items() if unused and part == "text_encoder" and unused in layer]
            module.add_adapter(_config(settings, endings(settings, part), own, skipped))


def _measure_lengths(modules: Sequence[nn.Module]) -> None:
    """Compute DoRA's magnitudes again in fp32: PEFT uses the frozen weights' dtype, whose rounding exceeds a step.

    At every step PEFT computes a convolution's norm in its own dtype, so convolutions are kept in fp32.
    """
    for layer in (layer for module in modules for layer in module.modules() if isinstance(layer, LoraLayer)):
        base = layer.get_base_layer()
        if isinstance(base, nn.Conv2d):
            base.float()
        magnitude = cast(Any, layer.lora_magnitude_vector)[ADAPTER]
        up, down = (cast(Any, factors)[ADAPTER].weight for factors in (layer.lora_B, layer.lora_A))
        magnitude.update_layer(base_layer=base, lora_A=down, lora_B=up, scaling=layer.scaling[ADAPTER])


def _config(
    settings: LoraSettings, targets: Sequence[str], layers: Mapping[str, Size], skipped: Sequence[str]
) -> LoraConfig:
    """Return PEFT's configuration of one part; `layers` and `skipped` by the part's own names."""
    alpha = settings.alpha or float(settings.rank)
    return LoraConfig(
        r=settings.rank,
        lora_alpha=_whole(alpha),
        target_modules=list(targets),
        exclude_modules=list(skipped) or None,
        rank_pattern={name: size.rank for name, size in layers.items() if size.rank != settings.rank},
        alpha_pattern={name: _whole(size.alpha) for name, size in layers.items() if size.alpha != alpha},
        use_rslora=settings.rank_stabilised,
        use_dora=settings.dora,
    )


def _whole(alpha: float) -> int:
    """Cast alpha, which PEFT types as an integer although fractions work."""
    return int(alpha) if alpha == int(alpha) else cast(int, cast(Any, alpha))
