"""DreamBooth and other full fine-tunings: a checkpoint of a base, stored as its differences to the base.

A folder in the diffusers layout, or a single file, is a checkpoint if it is published *for* a base (`--base`), else a
base. Files that equal the base's are the same blobs; other weights are stored as deltas (`delta.py`), other files as
they are.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pydantic import JsonValue

from scumble.errors import Incompatible, Refused
from scumble_registry.compatibility import BaseCompatibility, DreamboothCompatibility, check_targets
from scumble_registry.formats import base as base_format
from scumble_registry.formats.checkpoint.text import plain
from scumble_registry.formats.dreambooth.delta import (
    SUFFIX,
    expand,
    is_expanded,
    published_names,
    published_sha256,
    read_delta,
    write_delta,
)
from scumble_registry.formats.format import Difference, Format
from scumble_registry.formats.safetensors_header import Array, read_header, read_tensors
from scumble_registry.formats.source import Draft, Source
from scumble_registry.formats.structure import Mismatch, is_unused

KIND = "dreambooth"
_SCHEDULER = "scheduler/scheduler_config.json"
_CHUNK = 1 << 18


def recognises(source: Source) -> bool:
    """Return whether the source is a base's folder or file that is published for a base."""
    return source.base_folder is not None and base_format.recognises(source)


def read(source: Source, base: BaseCompatibility | None) -> Draft:
    """Read a checkpoint and write its deltas. Raises Incompatible, naming what differs, if the architectures differ."""
    assert base is not None and source.base_folder is not None and source.work is not None
    whole = base_format.in_diffusers_layout(source)
    own, _ = base_format.examine(whole.source)
    _check_architecture(own, base)
    whole = base_format.only_whole_components(whole)
    folder = source.base_folder()
    files: dict[str, Path] = {}
    changed: dict[str, int] = {}
    for name, file in whole.source.files.items():
        component = name.rpartition("/")[0]
        if file.suffix != ".safetensors" or _is_same(file, folder / name):
            files[name] = file
            continue
        delta = source.work / (name.replace("/", "_") + SUFFIX)
        changed[component] = changed.get(component, 0) + write_delta(file, _tensors(folder / component), delta)
        files[name + SUFFIX] = delta
    if not changed:
        raise Refused("no weight of this folder differs from the base's; use the base itself")
    compatibility = DreamboothCompatibility(
        family=own.family,
        prediction_type=own.prediction_type,
        in_channels=own.in_channels,
        cross_attention_dim=own.cross_attention_dim,
        text_widths=own.text_widths,
        scheduler=whole.source.json(_SCHEDULER),
        changed=changed,
    )
    details: dict[str, JsonValue] = {**whole.details, "serving": "variant", "changed": dict[str, JsonValue](changed)}
    return Draft(files, compatibility, dialect=whole.dialect, details=details, leftover=whole.leftover)


def write_folder(stored: Path, base_folder: Path, target: Path) -> None:
    """Write the folder as published, from the stored differences. Raises IntegrityError."""
    for file in sorted(path for path in stored.rglob("*") if path.is_file()):
        name = file.relative_to(stored)
        (target / name.parent).mkdir(parents=True, exist_ok=True)
        if file.suffix == SUFFIX:
            expand(file, _tensors(base_folder / name.parent), target / name.with_suffix(""))
        else:
            shutil.copyfile(file, target / name)


def keep_differences(folder: Path, base_folder: Path) -> None:
    """Replace the weights in `folder` by deltas and remove files that equal the base's. `restore` undoes it."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder)
        if not _is_same(file, base_folder / name):
            if file.suffix != ".safetensors":
                continue
            write_delta(file, _tensors(base_folder / name.parent), file.with_name(file.name + SUFFIX))
        file.unlink()
    for empty in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        if not any(empty.iterdir()):
            empty.rmdir()


def is_difference(folder: Path) -> bool:
    return folder.is_dir() and any(folder.rglob(f"*{SUFFIX}"))


def restore(difference: Path, base_folder: Path, target: Path) -> None:
    """Write the folder that `keep_differences` had. Raises IntegrityError if the differences are to another base."""
    own = {file.relative_to(difference) for file in difference.rglob("*") if file.is_file()}
    replaced = {name.with_suffix("") if name.suffix == SUFFIX else name for name in own}
    for file in sorted(path for path in base_folder.rglob("*") if path.is_file()):
        name = file.relative_to(base_folder)
        if name not in replaced:
            (target / name.parent).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / name)
    write_folder(difference, base_folder, target)


def is_folder(stored: Path, folder: Path) -> bool:
    """Return whether `folder` holds the published files, to the byte."""
    files = [path for path in stored.rglob("*") if path.is_file()]
    return all(
        is_expanded(file, folder / file.relative_to(stored).with_suffix(""))
        if file.suffix == SUFFIX
        else _is_same(file, folder / file.relative_to(stored))
        for file in files
    )


def published_digests(stored: Path) -> list[str]:
    """Return the sha256, as published, of the weights files that are stored as deltas. Raises IntegrityError."""
    return [published_sha256(delta) for delta in sorted(stored.rglob(f"*{SUFFIX}"))]


def read_changed(stored: Path, base_folder: Path) -> dict[str, dict[str, Array]]:
    """Return component (`unet`, `vae` …) → plain name → tensor, for tensors that differ from the base's.

    Raises IntegrityError, and Refused for a checkpoint that lacks a tensor: the base's would take its place.
    """
    by_component: dict[str, dict[str, Array]] = {}
    for delta in sorted(stored.rglob(f"*{SUFFIX}")):
        component = delta.parent.relative_to(stored).as_posix()
        of_base = _tensors(base_folder / component)
        if component not in by_component:
            kind = base_format.CLASSES.get(component, "")
            needed = {name for name in of_base if not is_unused(kind, name)}
            missing = needed - _published_names(stored / component)
            Mismatch(missing=tuple(sorted(missing))).refuse(component)
        changed = read_delta(delta, of_base)
        by_component.setdefault(component, {}).update({plain(name): values for name, values in changed.items()})
    return by_component


def _published_names(component: Path) -> set[str]:
    """Return the plain names of all tensors that a component had when it was published."""
    of_deltas = [published_names(delta) for delta in component.glob(f"*{SUFFIX}")]
    whole = [frozenset(read_header(file).tensors) for file in component.glob("*.safetensors")]
    return {plain(name) for names in (*of_deltas, *whole) for name in names}


def _check_architecture(own: BaseCompatibility, base: BaseCompatibility) -> None:
    check_targets(own.targets, base)
    if missing := sorted(base.targets.keys() - own.targets.keys()):
        raise Incompatible(f"the checkpoint lacks {missing[0]}, which the base has; publish the whole folder")
    for name in ("in_channels", "latent_channels", "vae_scale", "cross_attention_dim", "text_widths"):
        if getattr(own, name) != getattr(base, name):
            raise Incompatible(
                f"the checkpoint has {name} {getattr(own, name)}, the base {getattr(base, name)}; "
                "publish it without --base, as a base of its own",
                field=name,
            )


def _tensors(component: Path) -> dict[str, Array]:
    """Return a component's tensors by plain name, memory-mapped."""
    return {
        plain(name): values
        for file in sorted(component.glob("*.safetensors"))
        for name, values in read_tensors(file, read_header(file)).items()
    }


def _is_same(file: Path, other: Path) -> bool:
    """Compare two files byte by byte, in chunks."""
    try:
        if file.stat().st_size != other.stat().st_size:
            return False
        with file.open("rb") as one, other.open("rb") as two:
            while chunk := one.read(_CHUNK):
                if chunk != two.read(_CHUNK):
                    return False
    except FileNotFoundError:
        return False
    return True


FORMAT = Format(
    KIND,
    "a base's folder or file, with --base",
    recognises,
    read,
    difference=Difference(write_folder, is_folder, published_digests, read_changed),
)

__all__ = [
    "FORMAT",
    "KIND",
    "is_difference",
    "is_folder",
    "keep_differences",
    "plain",
    "published_digests",
    "read",
    "read_changed",
    "recognises",
    "restore",
    "write_folder",
]
