"""Graphs that read or produce pictures: a VAE's encoder and decoder, and CLIP's vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from scumble_build.export.graph import PRECISIONS, Graph
from scumble_build.export.manifest import FLOAT, Axis, Port, Precision
from scumble_build.export.ports import HEIGHT, WIDTH
from scumble_registry.compatibility import vae_scale

_IMAGES = Axis(min=1, opt=1, max=16, about="Pictures of a call.")


def decoder_graph(vae: Any, parameters: Mapping[str, Tensor], precision: Precision, kept: tuple[str, ...]) -> Graph:
    """Make the graph that decodes latents, in the VAE's own scale, to pixels in about -1…1."""
    scale = vae_scale(vae.config)
    latents = ("rows", int(vae.config.latent_channels), "height", "width")
    inputs = (Port(name="latents", dtype="float32", dims=latents, about="In the VAE's own scale."),)
    outputs = (
        Port(
            name="pixels", dtype="float32", dims=("rows", 3, "pixel_height", "pixel_width"), about="In about -1…1, RGB."
        ),
    )
    axes = {"rows": _IMAGES, "height": HEIGHT, "width": WIDTH, **pixel_axes(scale)}
    module = _Decoder(vae, precision)
    return Graph("vae_decoder", "vae_decoder", module, inputs, outputs, axes, precision, parameters, kept_in_fp32=kept)


def encoder_graph(vae: Any, parameters: Mapping[str, Tensor], precision: Precision, kept: tuple[str, ...]) -> Graph:
    """Make the graph that encodes pixels in -1…1 to the latents' mean and log variance, in the VAE's own scale."""
    inputs = (
        Port(name="pixels", dtype="float32", dims=("rows", 3, "pixel_height", "pixel_width"), about="In -1…1, RGB."),
    )
    moments = ("rows", 2 * int(vae.config.latent_channels), "height", "width")
    outputs = (Port(name="moments", dtype="float32", dims=moments, about="Means, then logarithms of variances."),)
    axes = {"rows": _IMAGES, **pixel_axes(vae_scale(vae.config)), "height": HEIGHT, "width": WIDTH}
    module = _Encoder(vae, precision)
    return Graph("vae_encoder", "vae_encoder", module, inputs, outputs, axes, precision, parameters, kept_in_fp32=kept)


def vision_graph(model: Any, parameters: Mapping[str, Tensor], precision: Precision, kept: tuple[str, ...]) -> Graph:
    """Make the graph that encodes prepared pictures to the projected embedding and the last layer but one's states."""
    dtype, config = FLOAT[precision], model.config
    side, width = int(config.image_size), int(config.hidden_size)
    positions = (side // int(config.patch_size)) ** 2 + 1
    inputs = (
        Port(name="pixels", dtype="float32", dims=("rows", 3, side, side), about="As the processor prepares them."),
    )
    outputs = (
        Port(name="embedding", dtype=dtype, dims=("rows", int(config.projection_dim)), about="The projected output."),
        Port(name="states", dtype=dtype, dims=("rows", positions, width), about="States of the last layer but one."),
    )
    return Graph(
        "image_encoder",
        "image_encoder",
        _Vision(model, precision),
        inputs,
        outputs,
        {"rows": _IMAGES},
        precision,
        parameters,
        kept_in_fp32=kept,
    )


def pixel_axes(scale: int) -> dict[str, Axis]:
    def pixels(side: str, axis: Axis) -> Axis:
        least, usual, most = (scale * size for size in (axis.min, axis.opt, axis.max))
        return Axis(min=least, opt=usual, max=most, multiple=scale, about=f"{scale} pixels for each of {side}.")

    return {"pixel_height": pixels("height", HEIGHT), "pixel_width": pixels("width", WIDTH)}


class _Decoder(nn.Module):
    def __init__(self, vae: Any, precision: Precision) -> None:
        super().__init__()
        self.vae = vae
        self.dtype = PRECISIONS[precision]

    def forward(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.dtype)
        if self.vae.post_quant_conv is not None:
            latents = self.vae.post_quant_conv(latents)
        decoded: Tensor = self.vae.decoder(latents)
        return decoded.float()


class _Encoder(nn.Module):
    def __init__(self, vae: Any, precision: Precision) -> None:
        super().__init__()
        self.vae = vae
        self.dtype = PRECISIONS[precision]

    def forward(self, pixels: Tensor) -> Tensor:
        moments: Tensor = self.vae.encoder(pixels.to(self.dtype))
        if self.vae.quant_conv is not None:
            moments = self.vae.quant_conv(moments)
        return moments.float()


class _Vision(nn.Module):
    """The layers of transformers' CLIPVisionModelWithProjection, in its order."""

    def __init__(self, model: Any, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self.dtype = PRECISIONS[precision]

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        tower = self.model.vision_model if hasattr(self.model, "vision_model") else self.model
        states = tower.pre_layrnorm(tower.embeddings(pixels.to(self.dtype)))
        before = states
        for layer in tower.encoder.layers:
            before, states = states, layer(states, None)
        return self.model.visual_projection(tower.post_layernorm(states[:, 0])), before
