"""LoRA and related algorithms, which change the weights of some modules of the base.

A file is read key by key (`names.py` recognises the layout) and module by module (`algorithms.py` recognises the
algorithm) into one record (`record.py`). Changes that are exactly of low rank become factors (`algebra.py`). `peft.py`
reads ranks and alphas from PEFT's configs, `metadata.py` trigger words from a header, and `sampling_hints.py` the
sampling from a name; `serving.py` classifies each module, `export.py` writes files.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Container, Mapping
from pathlib import Path

from pydantic import JsonValue

from scumble.errors import Incompatible, Refused
from scumble_registry.compatibility import BaseCompatibility, Family, LoraCompatibility, norm_shapes
from scumble_registry.formats.floats import read_floats
from scumble_registry.formats.format import Format
from scumble_registry.formats.lora import metadata as header_metadata
from scumble_registry.formats.lora.export import LAYOUTS, export_version
from scumble_registry.formats.lora.names import FLAT, Names, is_key, without_adapter_names
from scumble_registry.formats.lora.parse import Parsed, parse
from scumble_registry.formats.lora.peft import Scaling, parse_config, parse_metadata
from scumble_registry.formats.lora.record import (
    LoraModule,
    LoraRecord,
    Module,
    read_record,
    row_columns,
    unwritten,
    write_record,
)
from scumble_registry.formats.lora.refused_models import refused_model
from scumble_registry.formats.lora.sampling_hints import sampling_of
from scumble_registry.formats.lora.serving import count_modules, describe_modules, is_change, serving
from scumble_registry.formats.safetensors_header import DTYPES, Array, Header, read_header, read_tensors
from scumble_registry.formats.source import Draft, Source, check_plain
from scumble_registry.formats.stable_diffusion import FAMILIES, stable_diffusion
from scumble_registry.formats.unknown_keys import refuse_unknown_keys

KIND = "lora"
FILE_NAME = "pytorch_lora_weights.safetensors"
"""The name of a single file inside the registry (diffusers' default), whatever its name on disk."""
CONFIG_NAME = "adapter_config.json"
"""The config beside the weights of a PEFT folder."""

_MAX_BYTES = 2 << 30
_HALVES = (("lora_A.", "lora_B."), ("lora_down.", "lora_up."), (".down.weight", ".up.weight"))
"""How keys of the two factors of one module differ."""
_CONTEXT_FAMILY: dict[int, Family] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_WORDS = ("lora", "hada_", "lokr_", "oft_", "boft_", "ia3_l", "dora_scale", "w_norm", "vera_", "fourierft_")
_ENDS = (".on_input", ".a1.weight", ".diff", ".diff_b", ":up")


def recognises(source: Source) -> bool:
    """Return whether there is one safetensors file with a key of LoRA or a related algorithm, or a PEFT folder.

    A PEFT folder has such a file for each component.
    """
    weights = list(source.weights().values()) or ([source.path] if source.path.is_file() else [])
    if not weights:
        return False
    if len(weights) != 1 and not _configs(source):
        return False
    return all(_looks_like_lora(read_header(file)) for file in weights)


def read(source: Source, base: BaseCompatibility | None) -> Draft:
    if source.path.is_dir():
        check_plain(source)
    tensors, scalings, metadata = _read_all(source)
    fitting = _fitting_families(tensors, scalings) if base is None else []
    naming_base = fitting[0] if fitting else base
    parsed = parse(tensors, scalings, naming_base)
    if not source.allow_leftover:
        _check_halves(parsed.leftover, tensors)
    _check_leftover(parsed, source, naming_base)
    family = base.family if base is not None else fitting[0].family if len(fitting) == 1 else None
    return Draft(
        files=source.files if source.path.is_dir() else {FILE_NAME: next(iter(_weights(source).values()))},
        compatibility=_derive(parsed.record, naming_base, family),
        record=unwritten(parsed.record),
        sampling=sampling_of(metadata, source.path.name),
        trigger_words=header_metadata.trigger_words(metadata),
        dialect=parsed.dialect,
        details=_details(parsed, metadata, "the base" if base else "its modules" if fitting else "the width of text"),
        leftover=parsed.leftover,
    )


def _read_all(source: Source) -> tuple[dict[str, Array], Mapping[str, Scaling], dict[str, str]]:
    """Return the tensors, component → ranks and alphas by its config, and the header's metadata."""
    configs = _configs(source)
    tensors: dict[str, Array] = {}
    scalings: dict[str, Scaling] = {}
    metadata: dict[str, str] = {}
    for name, file in _weights(source).items():
        header = read_header(file)
        metadata |= header.metadata
        of_file = _read_tensors(file, header, source.limit(_MAX_BYTES))
        config = configs.get(name.rpartition("/")[0])
        if config is None:
            scalings |= parse_metadata(header.metadata)
        else:
            component = _component(name.rpartition("/")[0], of_file)
            scalings[component] = config
            of_file = {_in_component(key, component): values for key, values in of_file.items()}
        if tensors.keys() & of_file.keys():
            raise Refused("two files of the folder hold the same modules; publish one of them")
        tensors |= of_file
    keys, adapters = without_adapter_names(tensors)
    if len(adapters) > 1:
        raise Refused(f"the file holds {len(adapters)} adapters, {', '.join(adapters[:8])}; publish each on its own")
    return {keys[key]: values for key, values in tensors.items()}, scalings, metadata


def _read_tensors(file: Path, header: Header, max_bytes: int) -> dict[str, Array]:
    """Read floating-point tensors, and single integers beside them (`alpha`, `on_input`). Raises Refused."""
    integers = {
        name: info
        for name, info in header.tensors.items()
        if DTYPES[info.dtype].kind in "iub" and math.prod(info.shape) == 1
    }
    rest = {name: info for name, info in header.tensors.items() if name not in integers}
    floats = read_floats(file, Header(rest, header.metadata, header.data_start), what="a LoRA", max_bytes=max_bytes)
    return floats | read_tensors(file, Header(integers, header.metadata, header.data_start))


def _configs(source: Source) -> dict[str, Scaling]:
    """Return folder inside the source → ranks and alphas by PEFT's config in it."""
    names = [name for name in source.files if name.rpartition("/")[2] == CONFIG_NAME]
    return {name.rpartition("/")[0]: parse_config(source.json(name)) for name in names}


def _component(folder: str, keys: Mapping[str, object]) -> str:
    """Return the component of PEFT's keys, which do not name it: by the folder's name, else by the modules."""
    name = folder.rpartition("/")[2]
    if name in {"unet", "text_encoder", "text_encoder_2"}:
        return name
    is_text = any(part in key for key in keys for part in ("self_attn.", "mlp.fc", "text_projection"))
    return "text_encoder" if is_text else "unet"


def _in_component(key: str, component: str) -> str:
    return f"{component}.{key.removeprefix('base_model.model.')}" if key.startswith("base_model.model.") else key


def _weights(source: Source) -> dict[str, Path]:
    return source.weights() or {source.path.name: source.path}


def _check_halves(leftover: Collection[str], keys: Container[str]) -> None:
    """Raises Refused for a module that has one of its two factors only, unless the file is of a model known by name."""
    for key in leftover if refused_model(leftover) is None else ():
        for own, other in (*_HALVES, *((other, own) for own, other in _HALVES)):
            if key.endswith(".weight") and own in key and key.replace(own, other) not in keys:
                raise Refused(
                    f"{key} is one half of a LoRA module, whose other half {key.replace(own, other)} is missing: the "
                    "file was cut or badly converted; fetch or save it again; nothing was published",
                    tensor=key,
                    keys=sorted(leftover),
                )


def _check_leftover(parsed: Parsed, source: Source, base: BaseCompatibility | None) -> None:
    """Raises Refused for unknown keys, unless the publisher allows to leave them out and there are known ones."""
    if base is None and (flat := [key for key in parsed.leftover if key.startswith(FLAT)]):
        refused = refused_model(flat)
        refuse_unknown_keys(flat if refused else (), "", of=refused)
        raise Refused(
            "this LoRA is in kohya's layout, whose names can only be read with the base, and it does not fit the "
            "original sizes of Stable Diffusion: publish it with --base REF"
        )
    if source.allow_leftover and parsed.record:
        return
    hint = (
        f"or they name no module of this {base.family} base" if base else "or are no complete module of a known layout"
    )
    refuse_unknown_keys(parsed.leftover, hint, of=refused_model(parsed.leftover))


def _fitting_families(tensors: Mapping[str, Array], scalings: Mapping[str, Scaling]) -> list[BaseCompatibility]:
    """Return the original families that a file fits whose names cannot be read without a base.

    Often one; none for a file for another size; two where it only changes shapes that SD 1.x and 2.x share.
    """
    keys = [key for key in tensors if key.startswith((*FLAT, "diffusion_model."))]
    fitting = []
    for base in map(stable_diffusion, FAMILIES) if keys else ():
        names = Names(base)
        if not all(names.read(key) for key in keys):
            continue
        with contextlib.suppress(Refused, Incompatible):
            _derive(parse(tensors, scalings, base).record, base, None).fits(base)
            fitting.append(base)
    return fitting


def _derive(record: LoraRecord, base: BaseCompatibility | None, family: Family | None) -> LoraCompatibility:
    """Derive the compatibility; `base` has the shapes that the file does not determine. Raises Refused without them."""
    shapes = {**norm_shapes(base), **base.targets} if base is not None else {}
    requires = {}
    for target, module in record.items():
        shape = module.shape or shapes.get(target)
        if shape is None:
            raise Refused(f"{target}: the shape of its weight is known from the base only; publish it with --base REF")
        requires[target] = shape
    in_rows = {
        target: columns for target, module in record.items() if (columns := row_columns(target, module)) is not None
    }
    return LoraCompatibility(
        family=family or _guess_family(requires),
        requires=requires,
        ranks=in_rows,
        magnitudes=any(serving(target, record[target]) == "row with gain" for target in in_rows),
        merged=tuple(sorted(record.keys() - in_rows.keys())),
        idle=not any(map(is_change, record.values())),
    )


def _guess_family(requires: Mapping[str, tuple[int, ...]]) -> Family | None:
    """Return the family by the width of the text context in cross-attention: 768, 1024 or 2048."""
    for target, shape in requires.items():
        if target.startswith("unet.") and target.endswith((".attn2.to_k", ".attn2.to_v")):
            return _CONTEXT_FAMILY.get(shape[1])
    return None


def _details(parsed: Parsed, metadata: Mapping[str, str], rests_on: str) -> dict[str, JsonValue]:
    return {
        "counts": count_modules(parsed.record, parsed.algorithms),
        "modules": describe_modules(parsed.record, parsed.algorithms),
        "family": {"rests_on": rests_on, "header_says": header_metadata.stated_family(metadata)},
    }


def _looks_like_lora(header: Header) -> bool:
    names = header.tensors
    return any(any(word in name for word in _WORDS) or name.endswith(_ENDS) or is_key(name) for name in names)


FORMAT = Format(
    KIND,
    "a file (or a folder with one) of lora_A/lora_B or lora_down/lora_up",
    recognises,
    read,
    LAYOUTS,
    export_version,
)

__all__ = [
    "FILE_NAME",
    "FORMAT",
    "KIND",
    "LoraModule",
    "LoraRecord",
    "Module",
    "read",
    "read_record",
    "recognises",
    "write_record",
]
