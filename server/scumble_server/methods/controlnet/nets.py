"""From the ControlNets of one request to what its rows carry.

Nets, embedded pictures, features and the nets' keys and values are kept by digest: whoever asks for the same while it
is resident finds it. Rows of one net object share its run, so a net is one object however many requests ask for it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from scumble_build.control_maps import Pixels, control_map
from scumble_build.graphs.control_models import load_net, load_t2i, load_union
from scumble_build.graphs.inputs import level_sizes
from scumble_build.graphs.lllite import Embeddings, LLLite, load_lllite
from scumble_server.denoise.phase import RowLite, RowNet, spread
from scumble_server.executors.protocol import Net, NetModel
from scumble_server.methods.context import Context, Text
from scumble_server.methods.controlnet.checks import (
    compatibility,
    control_types,
    mode,
    picture_scales,
    preprocessor,
)
from scumble_server.methods.controlnet.scales import of_features, of_lite, of_residuals
from scumble_server.request.adapter import Bound


@dataclass(frozen=True, slots=True, eq=False)
class Control:
    """One adapter of a request, whatever its weight in a phase.

    A net with its hint `(1, C, H/8, W/8)`; or a T2I-Adapter's features, `(1, C, h, w)` for each down block; or an
    LLLite with its embedded picture.
    """

    bound: Bound
    net: Net | None = None
    hint: Tensor | None = None
    features: tuple[Tensor, ...] = ()
    lite: LLLite | None = None
    embeddings: Embeddings = field(default_factory=dict)


def prepare(context: Context, adapters: Sequence[Bound]) -> tuple[Control, ...]:
    """What of them does not depend on the prompts. Raises Refused for files that make no net."""
    executor = context.executor
    like = torch.empty(0, dtype=executor.dtype, device=executor.device)
    return tuple(_control(context, bound, like) for bound in adapters)


def row_nets(context: Context, controls: Sequence[Control], weights: Sequence[float], text: Text) -> tuple[RowNet, ...]:
    """The nets that act in a phase, in which `text` is read; `weights` has one for each of `controls`."""
    found = []
    for control, weight in zip(controls, weights, strict=True):
        if weight and control.net is not None and control.hint is not None:
            about = compatibility(control.bound)
            scales = picture_scales(control.bound)
            # Of several pictures, each one's strength is in the hint already.
            strength = weight * scales[0] if len(scales) == 1 else 1.0
            scale = of_residuals(mode(control.bound), strength, len(about.widths), context.sides, pools=about.pools)
            hint, (kv, added) = control.hint, _of_text(context, control.bound, control.net, text)
            found.append(RowNet(control.net, kv, hint, spread(scale, context.rows).to(hint.device), added))
    return tuple(found)


def features(context: Context, controls: Sequence[Control], weights: Sequence[float]) -> tuple[Tensor, ...] | None:
    """What the T2I-Adapters of a phase add together, `(1, C, h, w)` or `(rows, C, h, w)` for each down block."""
    total: list[Tensor] = []
    for control, weight in zip(controls, weights, strict=True):
        if weight and control.features:
            scale = of_features(mode(control.bound), weight, len(control.features), context.sides)
            parts = [
                feature * scale[:, level, None, None, None].to(feature)
                for level, feature in enumerate(control.features)
            ]
            total = [a + b for a, b in zip(total, parts, strict=True)] if total else parts
    return tuple(part if len(part) == 1 else spread(part, context.rows) for part in total) or None


def row_lites(context: Context, controls: Sequence[Control], weights: Sequence[float]) -> tuple[RowLite, ...]:
    """The LLLites that act in a phase."""
    found = []
    for control, weight in zip(controls, weights, strict=True):
        if weight and control.lite is not None:
            strength = spread(of_lite(mode(control.bound), weight, context.sides), context.rows)
            found.append(RowLite(control.lite, control.embeddings, strength))
    return tuple(found)


def maps(context: Context, adapters: Sequence[Bound]) -> tuple[Pixels, ...]:
    """The control maps that were made of pictures here, in the order of adapters and their images."""
    return tuple(
        each for bound in adapters if bound.spec.preprocess is not None for each in _control_maps(context, bound)
    )


def _control(context: Context, bound: Bound, like: Tensor) -> Control:
    form = compatibility(bound).form
    if form == "t2i":
        return Control(bound, features=_features(context, bound, like))
    if form == "lllite":
        return _lite(context, bound, like)
    net = _net(context, bound, like)
    net.check(context.latents)
    return Control(bound, net, _hint(context, bound, net, like))


def _lite(context: Context, bound: Bound, like: Tensor) -> Control:
    def load() -> LLLite:
        folder = context.registry.materialise(bound.version)
        return load_lllite(folder, context.base.compatibility.targets).to_like(like)

    key = ("lllite", bound.version.digest, context.base.version.digest)
    lite = context.device.get(key, compatibility(bound).parameters * like.element_size(), load)
    settings = context.settings
    nbytes = lite.embedded_values(settings.height, settings.width) * like.element_size()

    @torch.inference_mode()
    def embed() -> Embeddings:
        return lite.embed(_pixels(context, bound).to(like))

    embeddings = context.device.get(("lllite picture", _picture_key(context, bound)), nbytes, embed)
    return Control(bound, lite=lite, embeddings=embeddings)


def _of_text(context: Context, bound: Bound, net: Net, text: Text) -> tuple[Tensor, Tensor | None]:
    """The net's own keys and values `(rows, T, K)` of the prompts, and what it adds to the time `(rows, E)`."""
    states = text.states
    net.check({"tokens": states.shape[1]})
    key = ("net kv", bound.version.digest, context.base.version.digest, text.key)
    nbytes = states.shape[0] * states.shape[1] * net.kv_width * states.element_size()
    kv = context.device.get(key, nbytes, lambda: net.project(states))
    added = None
    if text.pooled is not None:
        sizes = torch.tensor([context.settings.sizes], dtype=torch.float32).expand(len(states), -1)
        added = net.condition(text.pooled, sizes)
    return kv, added


def _net(context: Context, bound: Bound, like: Tensor) -> Net:
    """One object for all requests that may share its run: for a union net, those with the same kinds of control."""
    about = compatibility(bound)
    # A control-LoRA changes the encoder of whatever the request is drawn with; other nets have their own.
    builds_on = context.drawn_with if about.form == "control_lora" else context.base.version
    key = ("net", bound.version.digest, builds_on.digest)
    nbytes = about.parameters * like.element_size() * context.of_base.copies

    def unet() -> Path:
        return context.registry.materialise(builds_on) / "unet"  # hashes the whole folder: only if it is read

    def load() -> NetModel:
        folder = context.registry.materialise(bound.version)
        return load_union(folder) if about.form == "union" else load_net(folder, unet)

    nets = context.device.get(
        key, nbytes, lambda: context.of_base.load_net(bound.version, load), drop=lambda nets: nets.close()
    )
    return nets.of(control_types(bound))


def _hint(context: Context, bound: Bound, net: Net, like: Tensor) -> Tensor:
    scales = picture_scales(bound)
    strengths = [bound.spec.weight * scale for scale in scales] if len(scales) > 1 else [1.0]
    key = ("hint", _picture_key(context, bound), tuple(strengths), control_types(bound))
    height, width = level_sizes(context.settings.height // 8, context.settings.width // 8, 1)[0]
    nbytes = compatibility(bound).widths[0] * height * width * like.element_size()

    return context.device.get(key, nbytes, lambda: net.embed(_pixels(context, bound), strengths))


def _features(context: Context, bound: Bound, like: Tensor) -> tuple[Tensor, ...]:
    about = compatibility(bound)
    levels = context.base.blocks.levels
    sizes = level_sizes(context.settings.height // 8, context.settings.width // 8, levels)
    if len(about.widths) > levels:  # SDXL's: behind the first downsampler, then at each level, then in the middle
        sizes = [sizes[1], *sizes[1:], sizes[-1]]
    nbytes = sum(c * h * w for c, (h, w) in zip(about.widths, sizes, strict=True)) * like.element_size()

    adapter = context.device.get(
        ("t2i", bound.version.digest),
        about.parameters * like.element_size(),
        lambda: load_t2i(context.registry.materialise(bound.version)).to(like.device, like.dtype),
    )

    @torch.inference_mode()
    def draw() -> tuple[Tensor, ...]:
        return tuple(adapter(_pixels(context, bound).to(like)))

    return context.device.get(("features", _picture_key(context, bound)), nbytes, draw)


def _picture_key(context: Context, bound: Bound) -> Hashable:
    """All that an embedded picture is made of."""
    settings = context.settings
    pictures = tuple(picture.digest for picture in bound.pictures)
    return (
        bound.version.digest,
        context.base.version.digest,
        pictures,
        preprocessor(bound),
        settings.height,
        settings.width,
    )


def _pixels(context: Context, bound: Bound) -> Tensor:
    """`(n, 3, H, W)`, or grey `(n, 1, H, W)` where the net reads it so, in 0…1."""
    found = []
    for pixels in _control_maps(context, bound):
        tensor = torch.from_numpy(pixels.copy())
        if compatibility(bound).conditioning_channels == 1:
            # As PIL weighs the colours, which is how diffusers' users make grey pictures.
            tensor = torch.frombuffer(bytearray(Image.fromarray(pixels).convert("L").tobytes()), dtype=torch.uint8)
            tensor = tensor.view(*pixels.shape[:2], 1)
        found.append(tensor.permute(2, 0, 1))
    return torch.stack(found).float() / 255


def _control_maps(context: Context, bound: Bound) -> list[Pixels]:
    settings, made_by = context.settings, preprocessor(bound)
    return [control_map(picture.rgb, settings.width, settings.height, made_by) for picture in bound.pictures]
