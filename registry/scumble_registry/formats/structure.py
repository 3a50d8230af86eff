"""Compare a whole model's tensors with those that its config describes, before it is published.

Loaders fill what is missing at random. What a config describes is read from diffusers' and transformers' own classes,
built on torch's meta device, which has shapes and no memory.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from scumble.errors import Refused, Unavailable
from scumble_registry.compatibility import Shape
from scumble_registry.compatibility.shapes import show_shape

ModelClass = Literal[
    "UNet2DConditionModel",
    "AutoencoderKL",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPVisionModelWithProjection",
    "ControlNetModel",
    "ControlNetUnionModel",
    "T2IAdapter",
]
_SHOWN = 8
_OLD_ATTENTION = re.compile(r"(\.attentions\.\d+)\.(query|key|value|proj_attn)\.")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_TEXT_PREFIX = "text_model."
_OF_WHOLE_CLIP = frozenset({"text_projection.weight", "logit_scale"})
_BUILD_ERRORS = (ValueError, TypeError, RuntimeError, ArithmeticError, AssertionError, LookupError, AttributeError)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How a model's tensors differ from what its config describes; `misshapen` has the actual shape, then that of the
    config.
    """

    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    misshapen: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)

    def refuse(self, what: str) -> None:
        """Raise Refused if anything differs; `what` is the component, e.g. `unet`."""
        parts: list[str] = []
        if self.missing:
            parts.append(f"lacks {_count(self.missing)} that its config describes: {_some(self.missing)}")
        if self.misshapen:
            shapes = [f"{name} is {show_shape(a)} and not {show_shape(b)}" for name, (a, b) in self.misshapen.items()]
            parts.append(f"has {_count(self.misshapen)} of another shape than its config describes: {_some(shapes)}")
        if self.unknown:
            parts.append(f"has {_count(self.unknown)} that its config does not describe: {_some(self.unknown)}")
        if parts:
            help_ = "get the whole file again, or the config that belongs to it"
            if not self.missing and not self.misshapen:
                help_ = (
                    "get the config that belongs to it; or publish it with --allow-leftover, which leaves these "
                    "tensors out: pictures are wrong if the model was trained with them"
                )
            raise Refused(
                f"{what} {'; '.join(parts)}; {help_}", tensors=[*self.missing, *self.misshapen, *self.unknown]
            )


def compare(kind: ModelClass, config: Mapping[str, Any], tensors: Mapping[str, Shape]) -> Mismatch:
    """Compare `tensors`, by their names in the files, with the model of class `kind` that `config` describes.

    Raises Refused for a config that describes no such model, Unavailable without torch and diffusers.
    """
    needed = {name: shape for name, shape in tensors.items() if not is_unused(kind, name)}
    return compare_shapes(described(kind, json.dumps(config, sort_keys=True), most_of(tensors)), needed)


def most_of(tensors: Mapping[str, Shape]) -> int:
    """Return the number of tensors beyond which a config cannot be that of `tensors`, even if most are missing."""
    return 4 * len(tensors) + 1000


def compare_shapes(of_config: Mapping[str, Shape], tensors: Mapping[str, Shape]) -> Mismatch:
    """Compare names and shapes; the names of `tensors` in any of the spellings that `current_name` knows."""
    left = dict(of_config)
    unknown: list[str] = []
    misshapen: dict[str, tuple[Shape, Shape]] = {}
    for name, shape in sorted(tensors.items()):
        expected = left.pop(current_name(name), None)
        if expected is None:
            unknown.append(name)
        elif expected != shape:
            misshapen[name] = (shape, expected)
    return Mismatch(tuple(sorted(left)), tuple(unknown), misshapen)


def current_name(name: str) -> str:
    """Return a tensor's name as the current classes spell it, without the prefix that only some versions write.

    >>> current_name("encoder.mid_block.attentions.0.proj_attn.weight")
    'encoder.mid_block.attentions.0.to_out.0.weight'
    >>> current_name("text_model.final_layer_norm.bias")
    'final_layer_norm.bias'
    """
    return _OLD_ATTENTION.sub(lambda m: f"{m[1]}.{_NEW_ATTENTION[m[2]]}.", name.removeprefix(_TEXT_PREFIX))


def is_unused(kind: str, name: str) -> bool:
    """Return whether old files of this class hold a tensor that is not needed: the numbers of positions, which are
    computed; the projection and scale of the whole CLIP that a text encoder was a part of.
    """
    return name.endswith("embeddings.position_ids") or (kind == "CLIPTextModel" and name in _OF_WHOLE_CLIP)


@lru_cache(maxsize=32)
def described(kind: ModelClass, config: str, most: int) -> Mapping[str, Shape]:
    """Return current name → shape of every tensor of the model that `config` (JSON) describes.

    Raises Refused for a config that describes no such model, or one of more than `most` tensors: building it would
    take as long as a stranger likes.
    """
    try:
        with _quiet(), _on_meta(most):
            model = _build(kind, json.loads(config))
    except _BUILD_ERRORS as error:
        raise Refused(f"config.json does not describe a valid {kind}: {error}") from error
    return shapes_of(model)


def shapes_of(model: Any) -> dict[str, Shape]:
    """Return current name → shape of every tensor of a model."""
    return {current_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def described_net(unet: Mapping[str, Any], widths: tuple[int, ...], channels: int, most: int) -> Mapping[str, Shape]:
    """Return name → shape of every tensor of the ControlNet that diffusers derives of a UNet's config.

    `widths` are those of the control image's embedding, `channels` the image's. Raises as `described` does.
    """
    try:
        with _quiet(), _on_meta(most):
            import diffusers

            base = _build("UNet2DConditionModel", unet)
            net = diffusers.ControlNetModel.from_unet(
                base,
                conditioning_embedding_out_channels=widths,
                load_weights_from_unet=False,
                conditioning_channels=channels,
            )
    except _BUILD_ERRORS as error:
        raise Refused(f"the base's unet/config.json does not describe a valid ControlNetModel: {error}") from error
    return shapes_of(net)


def _build(kind: ModelClass, config: Mapping[str, Any]) -> Any:
    import diffusers
    import transformers

    if kind.startswith("CLIP"):
        model: Any = getattr(transformers, kind)
        own = config.get(model.config_class.base_config_key)
        return model(model.config_class.from_dict(own if isinstance(own, dict) else dict(config)))
    return getattr(diffusers, kind).from_config(dict(config))


@contextmanager
def _on_meta(most: int) -> Iterator[None]:
    """Build on the meta device; a module with more than `most` parameters so far raises ValueError."""
    import torch
    from torch.nn.modules.module import register_module_parameter_registration_hook as on_each_parameter

    built, own = 0, threading.get_ident()

    def count(*_: object) -> None:
        nonlocal built
        if threading.get_ident() == own:  # the hook sees every thread's modules
            built += 1
            if built > most:
                raise ValueError(f"it describes more than {most} tensors, many more than the file has")

    hook = on_each_parameter(count)
    try:
        with torch.device("meta"):
            yield
    finally:
        hook.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' warnings on fields of old configs, which change no tensor. Raises Unavailable without
    the libraries.
    """
    try:
        from diffusers.utils import logging as of_diffusers
        from transformers.utils import logging as of_transformers
    except ModuleNotFoundError as error:
        raise Unavailable(
            "a whole model is compared with what its config describes, which diffusers tells: pip install "
            "'scumble[build]'"
        ) from error
    logs = (of_diffusers, of_transformers)
    before = [log.get_verbosity() for log in logs]
    try:
        for log in logs:
            log.set_verbosity_error()
        yield
    finally:
        for log, verbosity in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)


def _count(names: Any) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _some(names: Any) -> str:
    shown = list(names)[:_SHOWN]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
