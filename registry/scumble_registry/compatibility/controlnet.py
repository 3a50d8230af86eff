"""Compatibility of a ControlNet, T2I-Adapter, control-LoRA or LLLite with a base."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from scumble.errors import Incompatible
from scumble_registry.compatibility.base import BaseCompatibility, Compatibility, Family
from scumble_registry.compatibility.shapes import Shape, show_shape, show_value
from scumble_registry.compatibility.targets import lllite_names


class ControlNetCompatibility(Compatibility):
    kind: Literal["controlnet"] = "controlnet"
    form: Literal["net", "union", "t2i", "control_lora", "lllite"]
    family: Family | None
    """The base's family, if a base was named; else by the width of the text context, else None."""
    widths: tuple[int, ...]
    """Channels of each residual, the middle block's last; for a T2I-Adapter, of each feature."""
    conditioning_channels: int
    """Channels of the control image: 3, or 1 for greyscale."""
    cross_attention_dim: int | None = None
    """None for a T2I-Adapter, which reads no text."""
    in_channels: int | None = None
    """Channels of the latents that it reads; None for a T2I-Adapter, which reads none."""
    control_types: int = 0
    """Number of control types of a union net."""
    pools: bool = False
    """Residuals are averaged over height and width (shuffle nets)."""
    pixels_per_latent: int = 8
    parameters: int
    """Number of parameters once it is loaded, without those that it shares with the base."""
    modules: dict[str, int] = Field(default_factory=dict)
    """Each module that an LLLite changes, by the LLLite's name → the width of the module's input."""

    @model_serializer(mode="wrap")
    def _as_before_modules(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `modules` out where it is empty, so that the digests of older manifests do not change."""
        data: dict[str, Any] = serialise(self)
        return data if self.modules else {key: value for key, value in data.items() if key != "modules"}

    def fits(self, base: BaseCompatibility) -> None:
        """Check the fit. Raises Incompatible, naming what the net has and what the base has."""
        if self.form == "lllite":
            self._match_modules(base)
            return
        t2i = self.form == "t2i"
        widths = feature_widths(base.targets) if t2i else residual_widths(base.targets)
        self._match("a text context of width", self.cross_attention_dim, base.cross_attention_dim, base)
        self._match("latents with channels", self.in_channels, base.latent_channels, base)
        self._match("pixels per latent", self.pixels_per_latent, base.vae_scale, base)
        self._match("features of widths" if t2i else "residuals of widths", self.widths, widths, base)

    def _match_modules(self, base: BaseCompatibility) -> None:
        names = lllite_names(base.targets)
        for name, width in self.modules.items():
            shape = base.targets.get(names.get(name, ""), ())
            if len(shape) != 2 or shape[1] != width:
                has = f"it as {show_shape(shape)}" if shape else "no such module"
                raise Incompatible(
                    f"the net changes {name}, which reads {width} channels; this {base.family} base has {has}; "
                    "use the base that it was trained on",
                    target=name,
                )

    def _match(self, what: str, net: object, of_base: object, base: BaseCompatibility) -> None:
        if net is not None and net != of_base:
            raise Incompatible(
                f"the net has {what} {show_value(net)}, but this {base.family} base has {show_value(of_base)}; "
                "use the base that it was trained on",
                adapter=net,
                base=of_base,
            )


def feature_widths(targets: dict[str, Shape]) -> tuple[int, ...]:
    """Return the channels of the features that a UNet takes from a T2I-Adapter: one per level, and in SDXL (whose first
    level has no attention, so that its feature is added after the downsampler) one for the middle block too.
    """
    widths = tuple(targets[f"unet.down_blocks.{level}.resnets.0.conv1"][0] for level in range(_levels(targets)))
    has_attention = any(name.startswith("unet.down_blocks.0.attentions.") for name in targets)
    return widths if has_attention else (*widths, widths[-1])


def residual_widths(targets: dict[str, Shape]) -> tuple[int, ...]:
    """Return the channels of each skip connection of a base's UNet, and of its middle block."""
    names = ["unet.conv_in"]
    for level in range(_levels(targets)):
        block = f"unet.down_blocks.{level}"
        count = sum(name.startswith(f"{block}.resnets.") and name.endswith(".conv1") for name in targets)
        names += [f"{block}.resnets.{i}.conv1" for i in range(count)]
        names += [name for name in (f"{block}.downsamplers.0.conv",) if name in targets]
    names += [name for name in ("unet.mid_block.resnets.0.conv1",) if name in targets]
    return tuple(targets[name][0] for name in names)


def _levels(targets: dict[str, Shape]) -> int:
    return sum(
        name.startswith("unet.down_blocks.") and name.endswith(".resnets.0.conv1") and name.count(".") == 5
        for name in targets
    )
