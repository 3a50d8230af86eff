"""The base that an adapter is trained for: a folder, or a version in the registry.

torch is imported by `load_base` alone, so that a missing base and bad data are told at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from scumble.errors import Incompatible, NotFound, Refused
from scumble_registry import Registry, Status, Version
from scumble_registry.compatibility import vae_scale
from scumble_registry.formats.safetensors_header import read_header
from scumble_registry.formats.whole import check_headers
from scumble_registry.hashes import content_digest

if TYPE_CHECKING:
    import torch

INDEX = "model_index.json"

_HOW_TO_GET_ONE = (
    "give a folder in the diffusers layout, or get one with `scumble registry import hf:OWNER/REPO --name NS/NAME` "
    "or `scumble registry publish FOLDER --name NS/NAME`"
)

_SCHEDULER = "scheduler/scheduler_config.json"
_COMPONENTS = {
    "StableDiffusionPipeline": ("unet", "vae", "text_encoder"),
    "StableDiffusionXLPipeline": ("unet", "vae", "text_encoder", "text_encoder_2"),
}
"""Kind → folders of the models that are trained with."""
KINDS = tuple(_COMPONENTS)
"""Pipelines of SD 1.x and 2.x, and of SDXL."""
_UNUSED = "safety_checker"

Pipeline: TypeAlias = Any
"""A pipeline of one of KINDS. diffusers sets `unet`, `vae`, `text_encoder` … at run time, unseen by type checkers."""


@dataclass(frozen=True, slots=True)
class TrainingBase:
    """A base's files, with reference and digest if it is in the registry."""

    folder: Path
    content: str
    """`sha256:…` of names and bytes, independent of the path."""
    ref: str | None
    """`ns/name@N`, or None if the registry does not have it."""
    digest: str
    """The registry's digest, or `content` if the registry does not have it."""


@dataclass(frozen=True, slots=True)
class LocatedBase:
    """A base's files, not read yet, and its version if a reference named it."""

    folder: Path
    version: Version | None


def find_base(base: str, home: Path) -> TrainingBase:
    """Find a base by folder or reference; a folder is also looked up in the registry.

    Raises NotFound, Incompatible for a folder that is not one of KINDS, Refused for one with a broken file.
    """
    return identify_base(locate_base(base, home), home)


def locate_base(base: str, home: Path) -> LocatedBase:
    """Find a base's files, of whose weights only the headers are read. Raises as `find_base`."""
    folder = Path(base).expanduser()
    located = LocatedBase(folder.resolve(), None) if folder.is_dir() else _from_registry(base, home)
    _check_kind(located.folder)
    _check_files(located.folder)
    return located


def identify_base(located: LocatedBase, home: Path) -> TrainingBase:
    """Read all files for their digest, and look a folder up in the registry."""
    content = folder_digest(located.folder)
    version = located.version or _published(located.folder, home)
    if version is None:
        return TrainingBase(located.folder, content, None, content)
    return TrainingBase(located.folder, content, version.ref, version.digest)


def load_base(base: TrainingBase, *, dtype: torch.dtype | None = None) -> Pipeline:
    """Load a base as a diffusers pipeline without safety checker, all weights frozen, the autoencoder in fp32.

    `dtype` is that of the other components, by default fp32. Raises Refused for a base that is not whole.
    """
    import torch
    from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
    from diffusers.utils.logging import disable_progress_bar
    from torch import nn
    from transformers.utils.logging import disable_progress_bar as disable_loading_bar

    from scumble_build.graphs.families import FAMILIES
    from scumble_build.graphs.loading import load_whole, loading
    from scumble_build.graphs.models import text_class

    disable_progress_bar()
    disable_loading_bar()
    xl = pipeline_kind(base.folder) == "StableDiffusionXLPipeline"
    unchecked = {} if xl else {"safety_checker": None, "requires_safety_checker": False}
    chosen = dtype or torch.float32
    # Loaded here, because a pipeline fills what is missing at random.
    with loading(base.ref or str(base.folder), base.digest):
        whole = {
            "unet": load_whole(UNet2DConditionModel, base.folder / "unet", chosen),
            "vae": load_whole(AutoencoderKL, base.folder / "vae", torch.float32),
            **{
                part.encoder: load_whole(text_class(part), base.folder / part.encoder, chosen)
                for part in FAMILIES["sdxl" if xl else "sd1"].texts
            },
        }
    pipeline: Pipeline = DiffusionPipeline.from_pretrained(
        base.folder,
        dtype={"default": chosen, "vae": torch.float32},
        local_files_only=True,
        **whole,
        **unchecked,
    )
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(requires_grad=False)
    return pipeline


def pipeline_kind(folder: Path) -> str:
    """Return the class name of the pipeline in a diffusers folder."""
    return str(_config(folder, INDEX).get("_class_name"))


def native_resolution(folder: Path) -> int:
    """Return the side in pixels that a base was trained at, from its configuration."""
    unet = _config(folder, "unet/config.json")
    vae = _config(folder, "vae/config.json")
    return int(unet["sample_size"]) * vae_scale(vae)


def schedule_config(base: TrainingBase) -> dict[str, Any]:
    """Return the configuration of a base's scheduler."""
    return _config(base.folder, _SCHEDULER)


def side_multiple(folder: Path) -> int:
    """Return the number of pixels that sides must be a multiple of, as the UNet halves latents between its levels."""
    unet = _config(folder, "unet/config.json")
    vae = _config(folder, "vae/config.json")
    return int(vae_scale(vae) * 2 ** (len(unet["block_out_channels"]) - 1))


def folder_digest(folder: Path) -> str:
    """Return `sha256:…` over the names and bytes of all files of a folder."""
    return content_digest(dict(_files(folder)))


def _from_registry(base: str, home: Path) -> LocatedBase:
    if not _looks_like_reference(base):
        raise NotFound(
            f"base {base} is neither a folder nor a reference such as demo/base@1; {_HOW_TO_GET_ONE}", field="base"
        )
    name = base.partition("@")[0]
    try:
        with Registry.open(home) as registry:
            if name not in registry.names():
                raise NotFound(f"no base {name} is published in {home}")
            version = registry.resolve(base)
            return LocatedBase(registry.materialise(version), version)
    except NotFound as error:
        if "ref" in error.fields:  # the name is there, this version of it is not
            raise
        raise NotFound(
            f"{error.message}. {_how_to_publish(base, name)}", **{**error.fields, "field": "base"}
        ) from error


def _how_to_publish(base: str, name: str) -> str:
    """Return the commands that put a base under the name that was asked for."""
    return (
        f"No folder {base} exists either. If it is on the Hugging Face Hub, run `scumble registry import hf:{name} "
        f"--name {name.lower()}`; if you have its files, `scumble registry publish FOLDER --name {name.lower()}`"
    )


def _published(folder: Path, home: Path) -> Version | None:
    """Return the newest approved version of kind base with exactly these files."""
    try:
        registry = Registry.open(home)
    except NotFound:
        return None
    with registry:
        versions = [version for name in registry.names() for version in reversed(registry.versions(name))]
    bases = [v for v in versions if v.manifest.kind == "base" and v.status is Status.APPROVED]
    if not bases:
        return None
    files = {name: f"sha256:{digest}" for name, digest in _files(folder)}
    published = ({name: blob.digest for name, blob in version.manifest.files.items()} for version in bases)
    return next((version for version, theirs in zip(bases, published, strict=True) if theirs == files), None)


def _files(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (name with '/', sha256 in hex) of every file, ordered by name."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as content:
            yield path.relative_to(folder).as_posix(), hashlib.file_digest(content, "sha256").hexdigest()


def _looks_like_reference(base: str) -> bool:
    return base.partition("@")[0].count("/") == 1 and not base.startswith((".", "/", "~"))


def _check_kind(folder: Path) -> None:
    index = folder / INDEX
    if not index.is_file():
        raise Incompatible(f"{folder} is not a diffusers folder: it has no {INDEX}", field="base")
    kind = pipeline_kind(folder)
    if kind not in KINDS:
        raise Incompatible(f"{folder} is a {kind}; trainers take a {' or '.join(KINDS)}", field="base")
    unet = _config(folder, "unet/config.json")
    if unet["in_channels"] != unet["out_channels"]:
        raise Incompatible(
            f"{folder} is an inpainting base; train on the plain base that it was made from", field="base"
        )


def _check_files(folder: Path) -> None:
    """Check that configs are JSON and weights are what they are called, as far as a pipeline of them is loaded.

    Raises Refused, naming the file and what to do.
    """
    for component in _COMPONENTS[pipeline_kind(folder)]:
        _config(folder, f"{component}/config.json")
        check_headers(folder / component)
    _config(folder, _SCHEDULER)
    for component in sorted(_config(folder, INDEX).keys() - {_UNUSED}):
        for file in sorted((folder / component).glob("*.safetensors")):
            read_header(file, f"{component}/{file.name}")


def _config(folder: Path, name: str) -> dict[str, Any]:
    """Read a base's JSON file. Raises Refused, naming it."""
    try:
        config = json.loads((folder / name).read_text("utf-8"))
    except FileNotFoundError as error:
        raise Refused(f"{folder} lacks {name}; get the whole folder", field="base") from error
    except (ValueError, RecursionError) as error:
        raise Refused(f"{name} in {folder} is not JSON: {error}; get it again", field="base") from error
    if not isinstance(config, dict):
        raise Refused(f"{name} in {folder} must hold a JSON object; get it again", field="base")
    return config
