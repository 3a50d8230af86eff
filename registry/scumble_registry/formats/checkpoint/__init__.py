"""Single files: a whole Stable Diffusion in the original layout, which becomes a folder in diffusers'.

It is no kind of its own: what comes out is a base, or, with a base, a checkpoint of it. `parts.py` takes the file
apart; configs come from a folder that the publisher names (`Hints.like`), from the base that it is published for, or,
where the models are Stable Diffusion's own, from `configs.py`; the tokenizer likewise, or from `vocabulary.py`. What
the file lacks (many come without a VAE) is that folder's too.
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
    """One weights file, alone or beside texts, with a UNet by its original name."""
    if "model_index.json" in source.files or "config.json" in source.files:
        return False
    files = list(source.weights().values())
    return len(files) == 1 and is_whole(read_header(files[0]).tensors)


def unpack(source: Source) -> Unpacked:
    """Raises Refused, naming what is missing, left over or unknown, and InvalidRequest where a hint contradicts it."""
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
    files = _take_over(like, parts, source.work) if like else {}
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
    made = replace(source, path=whole, files=dict(sorted(files.items())))
    return Unpacked(made, details, leftover, f"single file ({parts.family})")


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
    """The publisher's word, then the file's, then that of the folder it is like. SD 2.x's cannot be guessed."""
    said = source.hints.prediction_type
    word = header.metadata.get("modelspec.prediction_type", "").lower()
    marked = "v_prediction" if V_PREDICTION in parts.marks else _WORDS.get(word)
    if said is not None and marked is not None and said != marked:
        raise InvalidRequest(
            f"the file says that it predicts {marked}, not {said}: leave --prediction-type out", field="prediction_type"
        )
    if said or marked:
        return said or marked or "epsilon"
    if like is not None:
        config = json.loads((like / _SCHEDULER).read_text(encoding="utf-8"))
        return _WORDS.get(config.get("prediction_type", "epsilon"), "epsilon")
    if parts.family == "sd2":
        raise Refused(
            "a single file of SD 2.x does not say what its UNet predicts, and the wrong guess draws noise: say it, "
            "--prediction-type v_prediction (those for 768 pixels) or epsilon (those for 512)"
        )
    return "epsilon"


def _take_over(like: Path, parts: CheckpointParts, work: Path) -> dict[str, Path]:
    """Files of the folder that the checkpoint is like: all but the weights that it has itself.

    A component whose every weight equals that folder's stays that folder's. Raises Refused where structures differ.
    """
    files = one_precision(replace(Source.scan(like), work=work)).source.files
    for component, tensors in parts.components.items():
        own = {name for name in files if _component(name) == component and ".safetensors" in name}
        if f"{component}/config.json" not in files:
            raise Refused(
                f"the checkpoint has a {component}, which {like.name} has not; they are of different families"
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
        said = config.get(key, 4 if key == "in_channels" else None)
        if isinstance(said, list) != isinstance(structure[key], list):
            continue  # written out for each level
        if said != structure[key]:
            raise Refused(
                f"the checkpoint's UNet has {key} {structure[key]}, the folder that it is said to be like {said}; "
                "name one of its own kind"
            )


def _write_configs(
    folder: Path, parts: CheckpointParts, prediction: PredictionType, given: Mapping[str, Path]
) -> dict[str, Path]:
    """What `given` lacks, and a scheduler that says what is predicted."""
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
    wanted = schedule | {"prediction_type": prediction}
    if ZERO_SNR in parts.marks:
        wanted |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if _SCHEDULER not in given or wanted != {"prediction_type": "epsilon", **schedule}:
        made[_SCHEDULER] = wanted
    for name, config in made.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}


def _check_complete(parts: CheckpointParts) -> None:
    needed = {"unet", "vae", "text_encoder", *(("text_encoder_2",) if parts.family == "sdxl" else ())}
    if missing := sorted(needed - parts.components.keys()):
        raise Refused(
            f"the checkpoint has no {' and no '.join(missing)}; say which folder or base in the diffusers layout has "
            "it, --like"
        )


def _text_config(parts: CheckpointParts, name: str) -> dict[str, Any]:
    is_open_clip = parts.family == "sd2" or name == "text_encoder_2"
    return configs.text_config(_shapes(parts.components[name]), is_open_clip=is_open_clip)


def _shapes(tensors: Mapping[str, Array]) -> dict[str, Shape]:
    return {name: values.shape for name, values in tensors.items()}


__all__ = ["Unpacked", "recognises", "unpack"]
