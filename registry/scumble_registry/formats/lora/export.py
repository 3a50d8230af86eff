"""Export a record in layouts that other tools read. A module that a layout cannot hold is refused by name.

diffusers       one file, PEFT's names with each component's prefix, ranks and alphas in the header; factors, DoRA by
                rows
kohya, webui    one file, flat names, `.alpha`; every algorithm but rotations in several stages or of columns
peft            `adapter_config.json` and `adapter_model.safetensors`, in a folder for each component if there are
                several; factors, DoRA by rows

Law: an export that is published again for the same base has the same record.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from scumble.errors import InvalidRequest, Refused
from scumble_registry.compatibility import BaseCompatibility, norm_shapes
from scumble_registry.formats.lora.names import original_targets, text_prefixes
from scumble_registry.formats.lora.record import (
    Dense,
    Gain,
    Kronecker,
    LoraModule,
    LoraRecord,
    Magnitude,
    Module,
    Product,
    Rotation,
    read_record,
)
from scumble_registry.formats.safetensors_header import Array, write
from scumble_registry.formats.stored import StoredVersion, header_metadata

LoraLayout = Literal["diffusers", "kohya", "peft", "webui"]
LAYOUTS: tuple[LoraLayout, ...] = ("diffusers", "kohya", "peft", "webui")
FILE = "pytorch_lora_weights.safetensors"


def export_version(version: StoredVersion, layout: str, target: Path) -> None:
    export(
        read_record(version.record()),
        next(name for name in LAYOUTS if name == layout),
        target,
        base=version.base,
        metadata=header_metadata(version),
    )


def export(
    record: LoraRecord,
    layout: LoraLayout,
    folder: Path,
    *,
    base: BaseCompatibility | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `record` into the existing `folder`; `metadata` goes into the header. kohya's names need the base.

    Raises Refused, naming a module that the layout cannot hold, and InvalidRequest for kohya's layout without a base;
    then nothing is written.
    """
    metadata = dict(metadata or {})
    if layout == "diffusers":
        tensors, numbers = _diffusers(record)
        _write(folder / FILE, tensors, metadata | {"lora_adapter_metadata": json.dumps(numbers, sort_keys=True)})
    elif layout == "peft":
        _peft(record, folder, metadata)
    else:
        if base is None:
            raise InvalidRequest(
                "kohya's names are made from the base's: name the base that the LoRA is for", field="base"
            )
        _write(folder / FILE, _kohya(record, base), metadata)


def _write(file: Path, tensors: dict[str, Array], metadata: dict[str, str]) -> None:
    file.write_bytes(write(tensors, {"format": "pt"} | metadata))


def _diffusers(record: LoraRecord) -> tuple[dict[str, Array], dict[str, Any]]:
    tensors: dict[str, Array] = {}
    numbers: dict[str, Any] = {}
    for component, modules in _by_component(record, "diffusers").items():
        numbers |= {f"{component}.{name}": value for name, value in _config(modules).items()}
        # diffusers ignores a text encoder's magnitudes without this suffix
        suffix = "" if component == "unet" else ".weight"
        for name, module in modules.items():
            tensors |= _pair(f"{component}.{name}", module, f"lora_magnitude_vector{suffix}")
    return tensors, numbers


def _peft(record: LoraRecord, folder: Path, metadata: dict[str, str]) -> None:
    components = _by_component(record, "peft")
    for component, modules in components.items():
        doras = [name for name, module in modules.items() if module.magnitude is not None]
        if doras and len(doras) < len(modules):
            raise Refused(
                f"{component} is a DoRA in part only ({doras[0]}), which PEFT's config cannot express; "
                "export it as diffusers or kohya"
            )
    for component, modules in components.items():
        target = folder / component if len(components) > 1 else folder
        target.mkdir(exist_ok=True)
        config = {
            **_config(modules),
            "peft_type": "LORA",
            "use_rslora": False,
            "bias": "none",
            "inference_mode": True,
        }
        tensors: dict[str, Array] = {}
        for name, module in modules.items():
            tensors |= _pair(f"base_model.model.{name}", module, "lora_magnitude_vector")
        (target / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        _write(target / "adapter_model.safetensors", tensors, metadata)


def _by_component(record: LoraRecord, layout: str) -> dict[str, dict[str, LoraModule]]:
    """Return component → module's name in it → module. Raises Refused for all but plain factors and DoRA by rows."""
    by_component: dict[str, dict[str, LoraModule]] = {}
    for target, module in record.items():
        if not isinstance(module, LoraModule) or module.inner is not None or module.bias is not None:
            raise _cannot(target, module, layout)
        if module.magnitude is not None and module.magnitude.axis != 0:
            raise Refused(f"{target} is a DoRA by columns, which {layout}'s layout cannot hold; export it as kohya")
        component, _, name = target.partition(".")
        by_component.setdefault(component, {})[name] = module
    return by_component


def _config(modules: Mapping[str, LoraModule]) -> dict[str, Any]:
    """Return LoraConfig's fields: the most frequent rank and alpha, and patterns for all others."""
    ranks = {_any_transformers(name): module.rank for name, module in modules.items()}
    alphas = {_any_transformers(name): module.alpha for name, module in modules.items()}
    (rank, _), *_ = Counter(ranks.values()).most_common(1)
    (alpha, _), *_ = Counter(alphas.values()).most_common(1)
    return {
        "target_modules": sorted(ranks),
        "use_dora": any(module.magnitude is not None for module in modules.values()),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
    }


def _any_transformers(name: str) -> str:
    """Return the name without `text_model.`: PEFT matches ends of names, so it fits every version of transformers."""
    return name.removeprefix("text_model.")


def _pair(name: str, module: LoraModule, lengths: str) -> dict[str, Array]:
    tensors = {f"{name}.lora_A.weight": module.down, f"{name}.lora_B.weight": module.up}
    if module.magnitude is not None:
        values = module.magnitude.lengths
        tensors[f"{name}.{lengths}"] = values.reshape(1, -1, 1, 1) if module.down.ndim == 4 else values
    return tensors


def _kohya(record: LoraRecord, base: BaseCompatibility) -> dict[str, Array]:
    """Return tensors by kohya's names: SDXL's UNet by original names, as in kohya's tools, others by diffusers'."""
    originals = original_targets(base) if base.family == "sdxl" else {}
    known = {*base.targets, *norm_shapes(base)}
    tensors: dict[str, Array] = {}
    for target, module in record.items():
        if target not in known:
            raise Refused(f"{target} is no module of this {base.family} base; name the base that the LoRA is for")
        component, _, name = target.partition(".")
        prefix = "lora_unet_" if component == "unet" else text_prefixes(base, component)[0]
        flat = prefix + originals.get(target, name).replace(".", "_")
        tensors |= {f"{flat}.{part}": values for part, values in _parts(target, module).items()}
    return tensors


def _parts(target: str, module: Module) -> dict[str, Array]:
    parts = _change(target, module)
    if module.magnitude is not None:
        parts["dora_scale"] = _lengths(module.magnitude, module.shape or ())
    if module.bias is not None:
        parts["b_norm" if "w_norm" in parts else "diff_b"] = module.bias
    return parts


def _change(target: str, module: Module) -> dict[str, Array]:
    if isinstance(module, LoraModule):
        return _factors(module)
    match module:
        case Product():
            first = {"hada_w1_a": module.first.up, "hada_w1_b": module.first.down, "alpha": _number(module.alpha)}
            return first | {"hada_w2_a": module.second.up, "hada_w2_b": module.second.down}
        case Kronecker():
            return {"lokr_w1": module.left, "lokr_w2": module.right}
        case Dense(delta=delta):
            return {} if delta is None else {"w_norm" if delta.ndim == 1 else "diff": delta}
        case Gain(of_bias=None):
            return {"weight": module.values, "on_input": _number(module.axis)}
        case Rotation(axis=0) if len(module.blocks) == 1:
            rescale = {} if module.rescale is None else {"rescale": module.rescale}
            return {"oft_diag": module.blocks[0].swapaxes(1, 2), **rescale}
    raise _cannot(target, module, "kohya")


def _factors(module: LoraModule) -> dict[str, Array]:
    alpha = {"alpha": _number(module.alpha)}
    if module.inner is None:
        return {"lora_down.weight": module.down, "lora_up.weight": module.up, **alpha}
    inner = {"a1.weight": module.inner.up, "a2.weight": module.inner.down}
    return {**inner, "b1.weight": module.up, "b2.weight": module.down, **alpha}


def _lengths(magnitude: Magnitude, shape: tuple[int, ...]) -> Array:
    ones = (1,) * (len(shape) - 2)
    return magnitude.lengths.reshape(-1, 1, *ones) if magnitude.axis == 0 else magnitude.lengths.reshape(1, -1, *ones)


def _number(value: float) -> Array:
    return np.array(value, dtype="<f4")


def _cannot(target: str, module: Module, layout: str) -> Refused:
    kind = "GLoRA" if isinstance(module, LoraModule) and module.inner is not None else type(module).__name__.lower()
    kind = {"loramodule": "LoRA with a bias", "dense": "full difference", "product": "LoHa"}.get(kind, kind)
    return Refused(f"{target} is changed by a {kind}, which {layout}'s layout cannot hold", target=target)
