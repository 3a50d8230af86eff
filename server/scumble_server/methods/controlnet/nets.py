"""Loads the ControlNets of one request and embeds their pictures.

Nets, embedded pictures, features and the nets' keys and values are kept by digest: whoever asks for the same while it
is resident finds it. Rows of one net object share its run, so a net is one object however many requests ask for it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import T2IAdapter
from PIL import Image
from torch import Tensor

from scumble_build.control_maps import Pixels, control_map
from scumble_build.graphs.control_models import load_net, load_t2i, load_union
from scumble_build.graphs.inputs import level_sizes
from scumble_build.graphs.lllite import Embeddings, LLLite, load_lllite
from scumble_build.graphs.loading import loading
from scumble_server.executors.protocol import Net, NetModel
from scumble_server.methods.context import Context, Text
from scumble_server.methods.controlnet.checks import (
    compatibility,
    control_types,
    picture_scales,
    preprocessor,
)
from scumble_server.request.adapter import ResolvedAdapter


@dataclass(frozen=True, slots=True, eq=False)
class Control:
    """One adapter of a request, whatever its weight in a phase.

    A net with its hint `(1, C, H/8, W/8)`; or a T2I-Adapter's features, `(1, C, h, w)` for each down block; or an
    LLLite with its embedded picture.
    """

    adapter: ResolvedAdapter
    net: Net | None = None
    hint: Tensor | None = None
    features: tuple[Tensor, ...] = ()
    lite: LLLite | None = None
    embeddings: Embeddings = field(default_factory=dict)


def control_of(context: Context, adapter: ResolvedAdapter) -> Control:
    """Load the adapter and embed its picture, once for all phases. Raises Refused for files that make no net."""
    executor = context.executor
    like = torch.empty(0, dtype=executor.dtype, device=executor.device)
    return context.once(("control", adapter), lambda: _control(context, adapter, like))


def control_maps(context: Context, adapter: ResolvedAdapter) -> list[Pixels]:
    """Make the control maps of its pictures. A ready map is laid on black where it is transparent, others on white."""
    settings, made_by = context.settings, preprocessor(adapter)
    return [
        control_map(picture.on_black if made_by is None else picture.on_white, settings.width, settings.height, made_by)
        for picture in adapter.pictures
    ]


def _control(context: Context, adapter: ResolvedAdapter, like: Tensor) -> Control:
    form = compatibility(adapter).form
    if form == "t2i":
        return Control(adapter, features=_features(context, adapter, like))
    if form == "lllite":
        return _lite(context, adapter, like)
    net = _net(context, adapter, like)
    net.check(context.latents)
    return Control(adapter, net, _hint(context, adapter, net, like))


def _lite(context: Context, adapter: ResolvedAdapter, like: Tensor) -> Control:
    def load() -> LLLite:
        folder = context.registry.materialise(adapter.version)
        with loading(adapter.version.ref, adapter.version.digest):
            return load_lllite(folder, context.base.compatibility.targets).to_like(like)

    key = ("lllite", adapter.version.digest, context.base.version.digest)
    lite = context.device.get(key, compatibility(adapter).parameters * like.element_size(), load)
    settings = context.settings
    nbytes = lite.embedded_values(settings.height, settings.width) * like.element_size()

    @torch.inference_mode()
    def embed() -> Embeddings:
        return lite.embed(_pixels(context, adapter).to(like))

    embeddings = context.device.get(("lllite picture", _picture_key(context, adapter)), nbytes, embed)
    return Control(adapter, lite=lite, embeddings=embeddings)


def of_text(context: Context, adapter: ResolvedAdapter, net: Net, text: Text) -> tuple[Tensor, Tensor | None]:
    """The net's own keys and values `(rows, T, K)` of the prompts, and what it adds to the time `(rows, E)`."""
    states = text.states
    net.check({"tokens": states.shape[1]})
    key = ("net kv", adapter.version.digest, context.base.version.digest, text.key)
    nbytes = states.shape[0] * states.shape[1] * net.kv_width * states.element_size()
    kv = context.device.get(key, nbytes, lambda: net.project(states))
    added = None
    if text.pooled is not None:
        sizes = torch.tensor([context.settings.sizes], dtype=torch.float32).expand(len(states), -1)
        added = net.condition(text.pooled, sizes)
    return kv, added


def _net(context: Context, adapter: ResolvedAdapter, like: Tensor) -> Net:
    """One object for all requests that may share its run: for a union net, those with the same kinds of control."""
    fit = compatibility(adapter)
    # A control-LoRA changes the encoder of whatever the request is drawn with; other nets have their own.
    builds_on = context.weights.version if fit.form == "control_lora" else context.base.version
    key = ("net", adapter.version.digest, builds_on.digest)
    nbytes = fit.parameters * like.element_size() * context.base_weights.executor.copies

    def unet() -> Path:
        return context.registry.materialise(builds_on) / "unet"  # hashes the whole folder: only if it is read

    def load() -> NetModel:
        folder = context.registry.materialise(adapter.version)
        with loading(adapter.version.ref, adapter.version.digest):
            return load_union(folder) if fit.form == "union" else load_net(folder, unet)

    executor = context.base_weights.executor
    nets = context.device.get(
        key, nbytes, lambda: executor.load_net(adapter.version, load), drop=lambda nets: nets.close()
    )
    return nets.of(control_types(adapter))


def _hint(context: Context, adapter: ResolvedAdapter, net: Net, like: Tensor) -> Tensor:
    scales = picture_scales(adapter)
    weights = [adapter.spec.weight * scale for scale in scales] if len(scales) > 1 else [1.0]
    key = ("hint", _picture_key(context, adapter), tuple(weights), control_types(adapter))
    height, width = level_sizes(context.settings.height // 8, context.settings.width // 8, 1)[0]
    nbytes = compatibility(adapter).widths[0] * height * width * like.element_size()

    return context.device.get(key, nbytes, lambda: net.embed(_pixels(context, adapter), weights))


def _features(context: Context, adapter: ResolvedAdapter, like: Tensor) -> tuple[Tensor, ...]:
    fit = compatibility(adapter)
    levels = context.base.blocks.levels
    sizes = level_sizes(context.settings.height // 8, context.settings.width // 8, levels)
    if len(fit.widths) > levels:  # SDXL's: behind the first downsampler, then at each level, then in the middle
        sizes = [sizes[1], *sizes[1:], sizes[-1]]
    nbytes = sum(c * h * w for c, (h, w) in zip(fit.widths, sizes, strict=True)) * like.element_size()

    def load() -> T2IAdapter:
        folder = context.registry.materialise(adapter.version)
        with loading(adapter.version.ref, adapter.version.digest):
            return load_t2i(folder).to(like.device, like.dtype)

    network = context.device.get(("t2i", adapter.version.digest), fit.parameters * like.element_size(), load)

    @torch.inference_mode()
    def draw() -> tuple[Tensor, ...]:
        return tuple(network(_pixels(context, adapter).to(like)))

    return context.device.get(("features", _picture_key(context, adapter)), nbytes, draw)


def _picture_key(context: Context, adapter: ResolvedAdapter) -> Hashable:
    """All that an embedded picture is made of."""
    settings = context.settings
    pictures = tuple(picture.digest for picture in adapter.pictures)
    return (
        adapter.version.digest,
        context.base.version.digest,
        pictures,
        preprocessor(adapter),
        settings.height,
        settings.width,
    )


def _pixels(context: Context, adapter: ResolvedAdapter) -> Tensor:
    """`(n, 3, H, W)`, or grey `(n, 1, H, W)` where the net reads it so, in 0…1."""
    pictures = []
    for pixels in control_maps(context, adapter):
        tensor = torch.from_numpy(pixels.copy())
        if compatibility(adapter).conditioning_channels == 1:
            # As PIL weighs the colours, which is how diffusers' users make grey pictures.
            tensor = torch.frombuffer(bytearray(Image.fromarray(pixels).convert("L").tobytes()), dtype=torch.uint8)
            tensor = tensor.view(*pixels.shape[:2], 1)
        pictures.append(tensor.permute(2, 0, 1))
    return torch.stack(pictures).float() / 255
