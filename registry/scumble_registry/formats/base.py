"""A base: Stable Diffusion 1.x, 2.x or XL, as a diffusers folder or a single file (`checkpoint/`) that becomes one.

Everything is read from configs and headers. Weights that a folder holds in one precision under that precision's name
(`….fp16.safetensors`) are stored under the plain name, where diffusers looks for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

from pydantic import ValidationError

from scumble.errors import InvalidRequest, Refused
from scumble_registry.compatibility import BaseCompatibility, Family, PredictionType, Shape, canonical_name, vae_scale
from scumble_registry.formats import checkpoint, image_encoder
from scumble_registry.formats.checkpoint.precision import one_precision
from scumble_registry.formats.floats import check_finite
from scumble_registry.formats.format import Format
from scumble_registry.formats.safetensors_header import Header, read_header, read_tensors
from scumble_registry.formats.source import Draft, Source, Unpacked, check_plain
from scumble_registry.formats.structure import ModelClass
from scumble_registry.formats.whole import only_whole
from scumble_registry.manifest import Defaults

KIND = "base"
_LIBRARIES = {
    "diffusers",
    "transformers",
    "stable_diffusion",
    None,
}  # the libraries that model_index.json may name; a folder's own modules are refused
CLASSES: dict[str, ModelClass] = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
"""The classes that a server loads the components as."""
_TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
_OPENCLIP_WIDTH = 1024  # SD 2's text encoder


def recognises(source: Source) -> bool:
    return "model_index.json" in source.files or checkpoint.recognises(source)


def read(source: Source, base: BaseCompatibility | None) -> Draft:
    if base is not None:
        raise InvalidRequest("a base is published for no other base: leave --base out", field="base")
    whole = in_diffusers_layout(source)
    compatibility, defaults = examine(whole.source)
    whole = only_whole_components(whole)
    details = {**whole.details, "serving": "base", "family_told_by": f"text encoders {compatibility.text_widths} wide"}
    return Draft(
        whole.source.files,
        compatibility,
        defaults=defaults,
        dialect=whole.dialect,
        details=details,
        leftover=whole.leftover,
    )


def in_diffusers_layout(source: Source) -> Unpacked:
    """Return the source as a folder in the diffusers layout. Raises Refused for a single file that cannot be split."""
    if checkpoint.recognises(source):
        return checkpoint.unpack(source)
    if source.hints.like is not None or source.hints.ema:
        raise InvalidRequest("a folder in the diffusers layout is complete of its own: leave --like and --ema out")
    return one_precision(source)


def only_whole_components(unpacked: Unpacked) -> Unpacked:
    """Compare every component that is served with its config. Raises Refused, naming what differs, and Unavailable."""
    source = unpacked.source
    classes = {folder: kind for folder, kind in CLASSES.items() if f"{folder}/config.json" in source.files}
    if image_encoder.has_config(source, image_encoder.FOLDER):
        classes["image_encoder"] = "CLIPVisionModelWithProjection"
    whole = only_whole(source, classes)
    return replace(unpacked, source=whole.source, leftover=tuple(sorted({*unpacked.leftover, *whole.leftover})))


def examine(source: Source) -> tuple[BaseCompatibility, Defaults]:
    """Check a folder in the diffusers layout, and derive compatibility and defaults.

    Raises Refused for another layout or model, and for files that may not be in a registry.
    """
    check_plain(source)
    headers = {name: read_header(file) for name, file in source.weights().items()}
    for name, header in headers.items():
        check_finite(read_tensors(source.files[name], header))
    folder = _Folder(source, headers)
    return folder.compatibility(), folder.defaults()


@dataclass(frozen=True, slots=True)
class _Folder:
    source: Source
    headers: dict[str, Header]

    def compatibility(self) -> BaseCompatibility:
        self._check_index()
        unet, vae = self.config("unet"), self.config("vae")
        self._check_shards()
        self._check_class("unet", "UNet2DConditionModel")
        self._check_class("vae", "AutoencoderKL")
        encoders = self._text_encoders()
        widths = tuple(_integer(self.config(name), "hidden_size", name) for name in encoders)
        in_channels, latents = _integer(unet, "in_channels", "unet"), _integer(vae, "latent_channels", "vae")
        if in_channels == 2 * latents:
            raise Refused(
                f"this UNet reads {in_channels} channels: it is InstructPix2Pix, which reads an image beside the "
                "latents; it cannot be served"
            )
        context = _same(unet.get("cross_attention_dim"), "cross_attention_dim")
        if context != sum(widths):
            raise Refused(
                f"the UNet reads text of width {context}, but the text encoders give {sum(widths)}; "
                "these components do not belong together"
            )
        targets: dict[str, Shape] = {}
        for component in ("unet", "vae", *encoders):
            weighted = dict(self._weighted(component))
            if not weighted:
                raise Refused(f"{component} has no safetensors weights; publish the whole folder")
            targets |= {} if component == "vae" else weighted
        return BaseCompatibility(
            family=_family(widths),
            prediction_type=self._prediction_type(),
            in_channels=in_channels,
            latent_channels=latents,
            sample_size=_same(unet.get("sample_size"), "sample_size"),
            vae_scale=vae_scale(vae),
            cross_attention_dim=context,
            text_widths=widths,
            targets=targets,
        )

    def defaults(self) -> Defaults:
        """Return the defaults in `scumble.json`, if there is one; else 30 steps of DDIM at 7.5 and the trained size."""
        unet, vae = self.config("unet"), self.config("vae")
        side = _same(unet.get("sample_size"), "sample_size") * vae_scale(vae)
        values: dict[str, Any] = {"steps": 30, "guidance_scale": 7.5, "scheduler": "ddim"}
        values |= {"width": side, "height": side}
        if "scumble.json" in self.source.files:
            given = _object(self.source.json("scumble.json"), "scumble.json")
            values |= _object(given.get("defaults", given), "scumble.json")
        try:
            return Defaults.model_validate(values)
        except ValidationError as error:
            problems = "; ".join(f"{item['loc'][0]}: {item['msg']}" for item in error.errors())
            raise Refused(f"the defaults in scumble.json are not usable: {problems}") from error

    def config(self, component: str) -> dict[str, Any]:
        return _object(self.source.json(f"{component}/config.json"), f"{component}/config.json")

    def _check_index(self) -> None:
        index = _object(self.source.json("model_index.json"), "model_index.json")
        if "transformer" in index or "prior" in index:
            raise Refused(
                f"this is a {index.get('_class_name')}: only Stable Diffusion 1.x, 2.x and XL are served here"
            )
        for name, value in index.items():
            if isinstance(value, list) and (len(value) != 2 or value[0] not in _LIBRARIES):
                raise Refused(f"model_index.json loads {name} from {value}; only diffusers and transformers may be")
        for name in self._text_encoders():
            loaded = index.get(name)
            if loaded not in [["transformers", encoder] for encoder in _TEXT_ENCODERS]:
                raise Refused(
                    f"model_index.json has {name} as {loaded}; only {' or '.join(_TEXT_ENCODERS)} can be served"
                )
        if not any(name.startswith("tokenizer/") for name in self.source.files):
            raise Refused("the folder lacks tokenizer/; publish the whole folder")

    def _check_shards(self) -> None:
        for name in self.source.files:
            if name.endswith(".safetensors.index.json"):
                shards = _object(_object(self.source.json(name), name).get("weight_map"), name).values()
                folder = name.rpartition("/")[0]
                missing = sorted({str(shard) for shard in shards if f"{folder}/{shard}" not in self.source.files})
                if missing:
                    raise Refused(f"{name} names files that are not there: {', '.join(missing)}")

    def _check_class(self, component: str, expected: str) -> None:
        actual = self.config(component).get("_class_name")
        if actual != expected:
            raise Refused(
                f"{component} is a {actual}, not a {expected}: only Stable Diffusion 1.x, 2.x and XL are bases"
            )

    def _text_encoders(self) -> tuple[str, ...]:
        names = tuple(n for n in ("text_encoder", "text_encoder_2") if f"{n}/config.json" in self.source.files)
        if names == ("text_encoder_2",):
            raise Refused("this is SDXL's refiner (one text encoder, the second); it cannot be a base yet")
        if not names:
            raise Refused("the folder lacks text_encoder/config.json; publish the whole folder")
        return names

    def _prediction_type(self) -> PredictionType:
        name = "scheduler/scheduler_config.json"
        prediction = _object(self.source.json(name), name).get("prediction_type", "epsilon")
        if prediction not in get_args(PredictionType):
            raise Refused(
                f"{name} has prediction_type {prediction!r}; {', '.join(get_args(PredictionType))} can be served"
            )
        return cast(PredictionType, prediction)

    def _weighted(self, component: str) -> Iterator[tuple[str, Shape]]:
        """Yield canonical name and weight shape of every matrix and convolution of a component."""
        for name, header in self.headers.items():
            if name.rpartition("/")[0] != component:
                continue
            for key, info in header.tensors.items():
                module, _, role = key.rpartition(".")
                if role == "weight" and len(info.shape) in {2, 4} and "embeddings." not in module:
                    yield canonical_name(f"{component}.{module}"), info.shape


def _family(widths: tuple[int, ...]) -> Family:
    if len(widths) == 2:
        return "sdxl"
    return "sd2" if widths == (_OPENCLIP_WIDTH,) else "sd1"


def _integer(config: dict[str, Any], key: str, component: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise Refused(f"{component}/config.json has {key} = {value!r}; it must be a positive integer")
    return value


def _same(value: Any, key: str) -> int:
    """Return the positive integer that `value` is, or that all items of the list `value` are. Raises Refused."""
    values = set(value) if isinstance(value, list) else {value}
    one = next(iter(values)) if len(values) == 1 else None
    if type(one) is not int or one < 1:
        raise Refused(f"unet/config.json has {key} = {value!r}; it must be one positive integer")
    return one


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused(f"{name} must hold a JSON object")
    return value


FORMAT = Format(
    KIND,
    "a folder with model_index.json, or a single file with model.diffusion_model",
    recognises,
    read,
    has_sampling=False,
)
