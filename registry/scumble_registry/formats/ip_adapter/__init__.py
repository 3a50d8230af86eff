"""IP-Adapter: image prompts, by additional keys and values in every cross-attention (Ye et al., 2308.06721).

A file in the layout of h94's repositories: `image_proj.*` (its kinds are in `projection.py`) and
`ip_adapter.{k}.to_k_ip.weight`, `.to_v_ip.weight` for k = 1, 3, 5… (`attentions.py` maps k to an attention). Training
checkpoints name the two halves `image_proj_model` and `adapter_modules`. FaceID files also have a LoRA,
`ip_adapter.{k}.to_{q,k,v,out}_lora.{down,up}.weight`, for every k; its scale is 1.

FaceID-PlusV2 (with a shortcut around the resampler) has the same keys as FaceID-Plus. A file is one if the publisher
states it (`Hints.shortcut`), else if its header has `"shortcut": "true"` (`"false"`: it is not), else if its name
contains `plusv2`.

A folder may have `image_encoder/` beside the file (see `formats/image_encoder.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import JsonValue

from scumble.errors import Incompatible, InvalidRequest, Refused
from scumble_registry.compatibility import (
    BaseCompatibility,
    Compatibility,
    ImageEncoderCompatibility,
    IpAdapterCompatibility,
    LoraCompatibility,
)
from scumble_registry.formats import image_encoder
from scumble_registry.formats.floats import read_floats
from scumble_registry.formats.format import Format
from scumble_registry.formats.ip_adapter.attentions import attentions
from scumble_registry.formats.ip_adapter.export import LAYOUTS, export_version
from scumble_registry.formats.ip_adapter.projection import Projection, inspect
from scumble_registry.formats.ip_adapter.record import IpAdapterRecord, read_record, unwritten, write_record
from scumble_registry.formats.lora.record import LoraModule, make_module
from scumble_registry.formats.safetensors_header import Array, Header, read_header
from scumble_registry.formats.source import Draft, Source, check_plain
from scumble_registry.formats.unknown_keys import leave_out, refuse_unknown_keys
from scumble_registry.formats.whole import Whole, only_whole

KIND = "ip_adapter"
FILE_NAME, FILE_NAME_V2 = "ip-adapter.safetensors", "ip-adapter-plusv2.safetensors"
"""Names of a single file inside the registry; a pulled file is published again as the same kind."""

_MAX_BYTES = 4 << 30
_PROJECTION = ("image_proj.", "image_proj_model.")
_ATTENTION = ("ip_adapter.", "adapter_modules.")
_KV = re.compile(r"(\d+)\.to_([kv])_ip\.weight")
_LORA = re.compile(r"(\d+)\.to_([qkv]|out)_lora\.(down|up)\.weight")
_RESAMPLER = re.compile(r"^(layers\.\d+)\.attn\.")  # diffusers' name for `.0.`
_LAYERS = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}


def recognises(source: Source) -> bool:
    """Return whether a safetensors file outside `image_encoder/` has an `image_proj`."""
    return bool(_adapter_files(source))


def read(source: Source, base: BaseCompatibility | None) -> Draft:
    file = _single(source)
    if source.path.is_dir():
        check_plain(source)
    if base is None:
        raise Refused(
            "an IP-Adapter numbers the attention layers of its base, so it can only be read with the base: "
            "publish it with --base REF"
        )
    header = read_header(file)
    tensors = read_floats(file, header, what="an IP-Adapter", max_bytes=source.limit(_MAX_BYTES))
    unknown = {name for name in tensors if not name.startswith((*_PROJECTION, *_ATTENTION))}
    leftover = leave_out(source, unknown, "or belong to a training checkpoint's UNet; keep image_proj and ip_adapter")
    projection_part, attention_part = _split(tensors)
    projection = inspect({name: values.shape for name, values in projection_part.items()})
    record = _parse(projection_part, attention_part, base)
    encoder = None
    whole = Whole(source)
    if f"{image_encoder.FOLDER}config.json" in source.files:
        encoder = image_encoder.inspect(source, image_encoder.FOLDER)
        whole = only_whole(source, {"image_encoder": "CLIPVisionModelWithProjection"})
    shortcut = _has_shortcut(source, header, file) if projection.kind == "faceid_plus" else _no_shortcut(source)
    compatibility = _derive(projection, record, base, shortcut=shortcut, encoder=encoder)
    name = FILE_NAME_V2 if shortcut else FILE_NAME
    return Draft(
        files=whole.source.files if source.path.is_dir() else {name: file},
        compatibility=compatibility,
        record=unwritten(record),
        dialect=_dialect(tensors),
        details=_details(compatibility),
        leftover=tuple(sorted({*leftover, *whole.leftover})),
    )


def _dialect(names: Iterable[str]) -> str:
    return "training checkpoint" if any(name.startswith("adapter_modules.") for name in names) else "h94"


def _details(compatibility: IpAdapterCompatibility) -> dict[str, JsonValue]:
    lora = compatibility.lora
    return {
        "serving": "keys and values of image prompts" + (", and a LoRA" if lora is not None else ""),
        "cross_attentions": len(compatibility.attentions),
        "lora_ranks": list[JsonValue](sorted(set(lora.ranks.values()))) if lora is not None else [],
        "family_told_by": "the base",
    }


def _adapter_files(source: Source) -> list[Path]:
    outside = [file for name, file in source.weights().items() if not name.startswith(image_encoder.FOLDER)]
    return [file for file in outside if any(key.startswith(_PROJECTION) for key in read_header(file).tensors)]


def _single(source: Source) -> Path:
    adapters = _adapter_files(source)
    if len(adapters) == 1:
        others = source.weights().keys() - {name for name, file in source.files.items() if file == adapters[0]}
        refuse_unknown_keys(
            {name for name in others if not name.startswith(image_encoder.FOLDER)},
            hint="or have no place beside an IP-Adapter",
        )
        return adapters[0]
    raise Refused(
        f"{source.path} holds {len(adapters)} IP-Adapters ({', '.join(file.name for file in adapters[:4])} …); "
        "publish one file at a time, or a folder with one of them beside image_encoder/"
    )


def _split(tensors: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the tensors of the projection and of the attentions, without their prefixes."""
    halves: tuple[dict[str, Array], dict[str, Array]] = ({}, {})
    for name, values in sorted(tensors.items()):
        first, _, rest = name.partition(".")
        if f"{first}." in _PROJECTION:
            halves[0][_RESAMPLER.sub(r"\1.0.", rest)] = values
        elif f"{first}." in _ATTENTION:
            halves[1][rest] = values
    return halves


def _parse(projection: dict[str, Array], attention: dict[str, Array], base: BaseCompatibility) -> IpAdapterRecord:
    names = attentions(base)
    keys: dict[str, Array] = {}
    values: dict[str, Array] = {}
    factors: dict[str, dict[str, Array]] = {}
    unknown = set[str]()
    for key, array in attention.items():
        match = _KV.fullmatch(key) or _LORA.fullmatch(key)
        index = int(match[1]) if match else len(names)
        if match is None or (match.re is _KV and index % 2 == 0):
            unknown.add(f"ip_adapter.{key}")
        elif index >= len(names):
            raise Incompatible(
                f"the IP-Adapter has keys for attention {index}, but this {base.family} base has only "
                f"{len(names)}, counted from 0; use the base that it was trained on"
            )
        elif match.re is _KV:
            (keys if match[2] == "k" else values)[names[index]] = array
        else:
            factors.setdefault(f"{names[index]}.{_LAYERS[match[2]]}", {})[match[3]] = array
    refuse_unknown_keys(unknown, hint="or name no attention")
    lora: dict[str, LoraModule] = {}
    for target, pair in sorted(factors.items()):
        if len(pair) != 2:
            raise Refused(f"{target}: its LoRA has only one of down and up; the file is incomplete", target=target)
        lora[target] = make_module(target, pair["down"], pair["up"], None)
    if keys.keys() != values.keys():
        raise Refused("some attentions have only one of to_k_ip and to_v_ip; the file is incomplete")
    return IpAdapterRecord(projection, dict(sorted(keys.items())), dict(sorted(values.items())), lora)


def _derive(
    projection: Projection,
    record: IpAdapterRecord,
    base: BaseCompatibility,
    *,
    shortcut: bool,
    encoder: ImageEncoderCompatibility | None,
) -> IpAdapterCompatibility:
    for name, array in record.keys.items():
        shape = record.values[name].shape
        if array.ndim != 2 or array.shape != shape or array.shape[1] != projection.context:
            raise Refused(
                f"{name}: to_k_ip {array.shape} and to_v_ip {shape} do not fit the image's tokens, which have "
                f"width {projection.context}; the file is damaged"
            )
    requires = {target: module.shape for target, module in record.lora.items()}
    ranks = {target: module.rank for target, module in record.lora.items()}
    compatibility = IpAdapterCompatibility(
        family=base.family,
        projection=projection.kind,
        shortcut=shortcut,
        tokens=projection.tokens,
        context=projection.context,
        picture_width=projection.picture_width,
        embedding_width=projection.embedding_width,
        attentions={name: array.shape[0] for name, array in record.keys.items()},
        encoder=encoder,
        lora=LoraCompatibility(family=base.family, requires=requires, ranks=ranks) if ranks else None,
    )
    if encoder is not None:
        compatibility.check_encoder(encoder)
    return compatibility


def _no_shortcut(source: Source) -> bool:
    if source.hints.shortcut is not None:
        raise InvalidRequest("only a FaceID-Plus may be a PlusV2: leave --shortcut out", field="shortcut")
    return False


def _has_shortcut(source: Source, header: Header, file: Path) -> bool:
    if source.hints.shortcut is not None:
        return source.hints.shortcut
    stated = header.metadata.get("shortcut")
    if stated not in {None, "true", "false"}:
        raise Refused(f"the header's metadata has shortcut {stated!r}; it may be 'true' or 'false'")
    return stated == "true" if stated else "plusv2" in file.name.lower()


def check_image_encoder(adapter: Compatibility, encoder: Compatibility) -> None:
    """Check that the adapter can use this encoder.

    Raises InvalidRequest if the adapter has its own encoder, Refused for another kind, Incompatible for other widths.
    """
    assert isinstance(adapter, IpAdapterCompatibility)
    if not isinstance(encoder, ImageEncoderCompatibility):
        raise Refused(f"a {encoder.kind} is not an image encoder; name a version of kind image_encoder")
    if adapter.encoder is not None:
        raise InvalidRequest(
            "the folder has an image encoder of its own: leave --image-encoder out, or remove image_encoder/",
            field="image_encoder",
        )
    adapter.check_encoder(encoder)


FORMAT = Format(
    KIND,
    "a file with image_proj and ip_adapter",
    recognises,
    read,
    LAYOUTS,
    export_version,
    check_image_encoder=check_image_encoder,
)

__all__ = ["FORMAT", "KIND", "IpAdapterRecord", "read", "read_record", "recognises", "write_record"]
