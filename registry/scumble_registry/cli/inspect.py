"""`inspect`: show what publishing would derive from a file."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from scumble_registry.cli.options import (
    AllowLeftover,
    Averaged,
    Home,
    Json,
    Like,
    MaxSize,
    Prediction,
    Shortcut,
    Trigger,
    folder_of,
    read_size,
    registry_if_there,
)
from scumble_registry.cli.printing import listed, plain, print_json, print_rows, print_table
from scumble_registry.compatibility import LoraCompatibility
from scumble_registry.formats.source import Hints
from scumble_registry.inspection import Inspection, hashes_to_dict
from scumble_registry.inspection import inspect as look_at

app = typer.Typer()

_REFUSED = 4
_MOST_MODULES = 20


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A file or folder, as for publish.", metavar="FILE-OR-DIR")],
    base: Annotated[
        str | None,
        typer.Option(help="The base to check it against: a reference, or a folder (./base).", metavar="REF-OR-DIR"),
    ] = None,
    trigger: Trigger = None,
    allow_leftover: AllowLeftover = False,
    max_size: MaxSize = None,
    like: Like = None,
    prediction: Prediction = None,
    averaged: Averaged = False,
    shortcut: Shortcut = None,
    every: Annotated[bool, typer.Option("--all", help="List every module, not only the first 20.")] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show what a file is, without publishing it. Exits with 4 if publishing it with these options would be refused."""
    with registry_if_there(home) or nullcontext() as registry:
        inspection = look_at(
            path,
            registry,
            base=base,
            trigger_words=trigger or (),
            max_bytes=read_size(max_size),
            hints=Hints(folder_of(like, registry), prediction, averaged, shortcut),
        )
    if as_json:
        print_json(inspection.to_dict())
    else:
        _print(inspection, None if every else _MOST_MODULES)
    if inspection.misfit is not None or (inspection.leftover and not allow_leftover):
        raise typer.Exit(_REFUSED)


def _print(inspection: Inspection, most: int | None) -> None:
    print_rows(_rows(inspection))
    modules = inspection.details.get("modules")
    if isinstance(modules, dict) and modules:
        print()
        _print_modules(modules, most)
    if inspection.training:
        print("\nThe file's own statements on its training (unchecked):")
        print_rows({plain(key, 60): _value(value) for key, value in inspection.training.items()})


def _rows(inspection: Inspection) -> dict[str, object]:
    hashes = hashes_to_dict(inspection.hashes)
    fit = f"no: {plain(inspection.misfit)}" if inspection.misfit else f"{plain(inspection.base)}: fits"
    keys = inspection.leftover
    unknown = f"{len(keys)} keys, which publish accepts with --allow-leftover only: {listed(keys)}"
    others = {key: value for key, value in inspection.details.items() if key not in {"family", "modules", "training"}}
    return {
        "kind": inspection.kind,
        "dialect": plain(inspection.dialect),
        "family": inspection.compatibility.family or "?",
        "family by": _value(inspection.details.get("family") or ""),
        **{key: plain(value) for key, value in _shape(inspection).items()},
        **{_words(plain(key, 40)): _value(value) for key, value in others.items()},
        "trigger words": listed(inspection.trigger_words),
        "sampling": inspection.sampling and inspection.sampling.model_dump_json(),
        "unknown keys": unknown if keys else None,
        "warning": "every change in it is zero: it changes no picture" if _is_idle(inspection) else None,
        "base": fit if inspection.base else None,
        "size": f"{sum(blob.size for blob in inspection.files.values()):,} bytes in {len(inspection.files)} files",
        "sha256": hashes["sha256"],
        "AutoV2": hashes["autov2"],
        "AutoV3": hashes["autov3"],
        "record": inspection.record,
        "published": _published(inspection),
    }


def _is_idle(inspection: Inspection) -> bool:
    return isinstance(inspection.compatibility, LoraCompatibility) and inspection.compatibility.idle


def _published(inspection: Inspection) -> str:
    same: dict[str, list[str]] = {}
    for match in inspection.known:
        same.setdefault(f"{match.version.ref} ({match.version.status})", []).append(str(match.kind))
    return "; ".join(f"{version}: same {', '.join(dict.fromkeys(kinds))}" for version, kinds in same.items())


def _shape(inspection: Inspection) -> dict[str, object]:
    """Return the compatibility in a few words: long tables are counted."""
    fields = inspection.compatibility.model_dump(mode="json", exclude={"kind", "family"}, exclude_none=True)
    return {_words(key): _counted(value) for key, value in fields.items() if value not in ({}, [], False)}


def _counted(value: Any) -> str:
    if not isinstance(value, dict) or len(value) <= 4:
        return _value(value)
    numbers = sorted({number for number in value.values() if isinstance(number, int)})
    if not numbers:
        return f"{len(value)} modules"
    return (
        f"{numbers[0]} to {numbers[-1]} in {len(value)} modules"
        if numbers[1:]
        else f"{numbers[0]} in {len(value)} modules"
    )


def _print_modules(modules: Mapping[str, Any], most: int | None) -> None:
    """Print one line for each module, with its format's details."""
    columns = list(dict.fromkeys(key for details in modules.values() if isinstance(details, dict) for key in details))
    rows = [
        (
            plain(name, 120),
            *(plain(details.get(column, "") if isinstance(details, dict) else "", 60) for column in columns),
        )
        for name, details in list(modules.items())[:most]
    ]
    print_table(("module", *(plain(column, 40) for column in columns)), rows)
    if most is not None and len(modules) > most:
        print(f"… and {len(modules) - most} more modules; --all shows them")


def _words(key: str) -> str:
    """Return a field's name as words, and a module's name as it is."""
    return key if "." in key else key.replace("_", " ")


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return listed((f"{_words(key)} {_value(item)}" for key, item in value.items() if item is not None), most=20)
    if isinstance(value, list | tuple):
        return listed(value, most=20)
    return plain(value)
