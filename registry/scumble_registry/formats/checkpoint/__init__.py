"""Single files: a whole Stable Diffusion in the original layout, converted to a folder in diffusers' layout.

This is no kind of its own: the result is a base, or, with a base, a checkpoint of it. `parts.py` splits the file.
Configs and the tokenizer come from a folder that the publisher names (`Hints.like`) or from the base that it is
published for; for the original sizes of Stable Diffusion, from `configs.py` and `vocabulary.py`. Components that the
file lacks (many have no VAE) come from that folder too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import JsonValue

from scumble.errors import InvalidRequest, Refused
from scumble_registry.compatibility import Family, PredictionType, Shape
from scumble_registry.formats.checkpoint import configs
from scumble_registry.formats.checkpoint.parts import V_PREDICTION, ZERO_SNR, CheckpointParts, is_whole, take_apart
from scumble_registry.formats.checkpoint.precision import one_precision
from scumble_registry.formats.checkpoint.text import plain
from scumble_registry.formats.checkpoint.vocabulary import write_tokenizer
from scumble_registry.formats.floats import is_finite
from scumble_registry.formats.refused_models import refuse_known_models
from scumble_registry.formats.safetensors_header import Array, Header, read_header, read_tensors, write_file
from scumble_registry.formats.source import Source, Unpacked
from scumble_registry.formats.unknown_keys import leave_out

_FILES = {"unet": "unet/diffusion_pytorch_model.safetensors", "vae": "vae/diffusion_pytorch_model.safetensors"}
_TEXT_FILE = "model.safetensors"
_SCHEDULER = "scheduler/scheduler_config.json"
_TYPES = ("F32", "F16", "BF16")
_WORDS: Mapping[str, PredictionType] = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
}
_MAX_BYTES = 20 << 30
_OPENCLIP_WIDTH = 1024  # SD 2's text encoder


def recognises(source: Source) -> bool:
    """Return whether the source is one file of weights, alone or beside texts, with a UNet by its original name."""
    if "model_index.json" in source.files or "config.json" in source.files:
        return False
    files = list(source.weights().values())
    return len(files) == 1 and is_whole(read_header(files[0]).tensors)


def unpack(source: Source) -> Unpacked:
    """Convert a single file to a folder in `source.work`.

    Raises Refused, naming what is missing or unknown, and InvalidRequest where a hint contradicts the file.
    """
    (file,) = source.weights().values()
    if file.stat().st_size > source.limit(_MAX_BYTES):
        raise Refused(f"{file.name} is larger than {source.limit(_MAX_BYTES)} bytes, too large for a checkpoint")
    header = read_header(file)
    refuse_known_models(header.tensors, file.name)
    folder = source.hints.like or source.base_folder
    like = folder() if folder else None
    parts = take_apart(read_tensors(file, header), _family_of(like) if like else None, ema=source.hints.ema)
    leftover = leave_out(source, parts.unknown, "or no part of Stable Diffusion")
    _check_values(parts)
    prediction = _prediction(source, header, parts, like)
    assert source.work is not None
    whole = source.work / "whole"
    whole.mkdir()
    files = _files_of(like, parts, source.work) if like else {}
    files |= _write_configs(whole, parts, prediction, files)
    for component, tensors in parts.components.items():
        if not any(_component(name) == component and name.endswith(".safetensors") for name in files):
            name = _FILES.get(component, f"{component}/{_TEXT_FILE}")
            (whole / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(whole / name, tensors, {"format": "pt"})
            files[name] = whole / name
    taken = {_component(name) for name in files} - parts.components.keys() - {""} if like else set()
    details: dict[str, JsonValue] = {
        "prediction_type": prediction,
        "tensors": {component: len(tensors) for component, tensors in sorted(parts.components.items())},
        "unused": list[JsonValue](sorted(parts.unused)),
        "averaged_left_out": parts.averaged,
        "of_the_folder_it_is_like": list[JsonValue](sorted(taken)),
    }
    converted = replace(source, path=whole, files=dict(sorted(files.items())))
    return Unpacked(converted, details, leftover, f"single file ({parts.family})")


def _family_of(like: Path) -> Family:
    if (like / "text_encoder_2/config.json").is_file():
        return "sdxl"
    config = json.loads((like / "text_encoder/config.json").read_text(encoding="utf-8"))
    return "sd2" if config.get("hidden_size") == _OPENCLIP_WIDTH else "sd1"


def _component(name: str) -> str:
    return name.rpartition("/")[0]


def _check_values(parts: CheckpointParts) -> None:
    for component, tensors in parts.components.items():
        for name, values in tensors.items():
            if values.dtype.name not in {"float32", "float16", "bfloat16"}:
                raise Refused(f"{component}: {name} is {values.dtype.name}; a checkpoint may be {', '.join(_TYPES)}")
            if not is_finite(values):
                raise Refused(f"{component}: {name} holds NaN or infinite values; the merge or training went wrong")


def _prediction(source: Source, header: Header, parts: CheckpointParts, like: Path | None) -> PredictionType:
    """Return the publisher's prediction type, else the file's, else that of the folder `like`.

    Raises Refused for an SD 2.x that none of them states, and InvalidRequest where publisher and file disagree.
    """
    hinted = source.hints.prediction_type
    word = header.metadata.get("modelspec.prediction_type", "").lower()
    marked = "v_prediction" if V_PREDICTION in parts.marks else _WORDS.get(word)
    if hinted is not None and marked is not None and hinted != marked:
        raise InvalidRequest(
            f"the file states prediction type {marked}, not {hinted}: leave --prediction-type out",
            field="prediction_type",
        )
    if hinted or marked:
        return hinted or marked or "epsilon"
    if like is not None:
        config = json.loads((like / _SCHEDULER).read_text(encoding="utf-8"))
        return _WORDS.get(config.get("prediction_type", "epsilon"), "epsilon")
    if parts.family == "sd2":
        raise Refused(
            "a single file of SD 2.x does not state what its UNet predicts, and the wrong type gives noise: add "
            "--prediction-type v_prediction (models for 768 pixels) or epsilon (models for 512)"
        )
    return "epsilon"


def _files_of(like: Path, parts: CheckpointParts, work: Path) -> dict[str, Path]:
    """Return the files of the folder `like` that the checkpoint uses: all but the weights that it has itself.

    A component whose weights all equal the folder's uses the folder's files. Raises Refused where structures differ.
    """
    files = one_precision(replace(Source.scan(like), work=work)).source.files
    for component, tensors in parts.components.items():
        own = {name for name in files if _component(name) == component and ".safetensors" in name}
        if f"{component}/config.json" not in files:
            raise Refused(
                f"the checkpoint has a {component}, which {like.name} lacks; name a folder of its family, --like"
            )
        if component == "unet":
            _check_structure(json.loads(files["unet/config.json"].read_text(encoding="utf-8")), tensors)
        if not _equal(tensors, [files[name] for name in own if name.endswith(".safetensors")]):
            files = {name: file for name, file in files.items() if name not in own}
    return files


def _equal(tensors: Mapping[str, Array], files: list[Path]) -> bool:
    theirs = {plain(name): v for file in files for name, v in read_tensors(file, read_header(file)).items()}
    ours = {plain(name): values for name, values in tensors.items()}
    return ours.keys() == theirs.keys() and all(
        values.dtype == theirs[name].dtype
        and values.shape == theirs[name].shape
        and np.array_equal(_bytes(values), _bytes(theirs[name]))
        for name, values in ours.items()
    )


def _bytes(values: Array) -> Array:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _check_structure(config: Mapping[str, Any], tensors: Mapping[str, Array]) -> None:
    structure = configs.unet_structure(_shapes(tensors))
    for key in ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"):
        stated = config.get(key, 4 if key == "in_channels" else None)
        if isinstance(stated, list) != isinstance(structure[key], list):
            continue  # one form lists a number per level, the other is a single number
        if stated != structure[key]:
            raise Refused(
                f"the checkpoint's UNet has {key} {structure[key]}, but the folder of --like has {stated}; "
                "name a folder of the same architecture"
            )


def _write_configs(
    folder: Path, parts: CheckpointParts, prediction: PredictionType, given: Mapping[str, Path]
) -> dict[str, Path]:
    """Write the configs that `given` lacks, and a scheduler config with the prediction type."""
    made: dict[str, dict[str, Any]] = {}
    texts = sorted(name for name in parts.components if name.startswith("text_encoder"))
    if "model_index.json" not in given:
        _check_complete(parts)
        made |= {f"{name}/config.json": _text_config(parts, name) for name in texts}
        unet, vae = _shapes(parts.components["unet"]), _shapes(parts.components["vae"])
        made["unet/config.json"] = configs.unet_config(unet, parts.family, prediction)
        made["vae/config.json"] = configs.vae_config(vae, parts.family, prediction)
        made["model_index.json"] = configs.model_index(
            parts.family, {name: made[f"{name}/config.json"] for name in texts}
        )
        for name in texts:
            tokenizer = folder / name.replace("text_encoder", "tokenizer")
            write_tokenizer(tokenizer, **({} if made[f"{name}/config.json"]["pad_token_id"] else {"pad": "!"}))
    schedule = configs.scheduler_config(parts.family)
    if _SCHEDULER in given:
        schedule = json.loads(given[_SCHEDULER].read_text(encoding="utf-8"))
    scheduler = schedule | {"prediction_type": prediction}
    if ZERO_SNR in parts.marks:
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if _SCHEDULER not in given or scheduler != {"prediction_type": "epsilon", **schedule}:
        made[_SCHEDULER] = scheduler
    for name, config in made.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}


def _check_complete(parts: CheckpointParts) -> None:
    needed = {"unet", "vae", "text_encoder", *(("text_encoder_2",) if parts.family == "sdxl" else ())}
    if missing := sorted(needed - parts.components.keys()):
        raise Refused(
            f"the checkpoint has no {' and no '.join(missing)}; name a folder in the diffusers layout, or a base, that "
            "has it: --like DIR or REF"
        )


def _text_config(parts: CheckpointParts, name: str) -> dict[str, Any]:
    is_open_clip = parts.family == "sd2" or name == "text_encoder_2"
    return configs.text_config(_shapes(parts.components[name]), is_open_clip=is_open_clip)


def _shapes(tensors: Mapping[str, Array]) -> dict[str, Shape]:
    return {name: values.shape for name, values in tensors.items()}


__all__ = ["Unpacked", "recognises", "unpack"]
