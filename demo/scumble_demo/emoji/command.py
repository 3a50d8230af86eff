"""`scumble train emoji`: writes a folder of the bundled data that trainers read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from scumble.errors import InvalidRequest
from scumble_demo.emoji.concepts import style
from scumble_demo.emoji.folders import Split, find_concept, gallery, one_concept, one_style, write_folder
from scumble_demo.emoji.home import data_home
from scumble_demo.emoji.packages import fetch_packages
from scumble_demo.emoji.render import SIZE


def prepare_style(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    style_name: Annotated[str, typer.Option("--style", help="noto, twemoji, fluent, openmoji or ink.")] = "openmoji",
    whole: Annotated[
        bool, typer.Option("--gallery", help="About 1,400 emoji in the base's three styles, instead of one style.")
    ] = False,
    concept: Annotated[str | None, typer.Option("--concept", help="A few pictures of this one thing.")] = None,
    token: Annotated[str, typer.Option("--token", help="Word for --concept in its captions.")] = "<thing>",  # noqa: S107
    split: Annotated[str, typer.Option("--split", help="Concepts to write: train, held-out or all.")] = "train",
    size: Annotated[int, typer.Option("--size", help="Side in pixels.")] = SIZE,
    data_dir: Annotated[Path | None, typer.Option("--data-dir", help="Cache folder for npm packages.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write emoji with captions, as data for a trainer: a drawing style, many things (--gallery) or one (--concept)."""
    if split not in get_args(Split):
        raise InvalidRequest(f"--split is {split!r}; it is train, held-out or all", field="split")
    chosen, part = style(style_name), cast("Split", split)
    modules = fetch_packages(data_dir or data_home() / "npm")
    if concept is not None:
        entries = one_concept(modules, find_concept(concept), token, part, size)
    else:
        entries = gallery(modules, part, size=size) if whole else one_style(modules, chosen, part, size)
    count = write_folder(entries, out)
    print(json.dumps({"out": str(out), "pictures": count}) if as_json else f"{count} pictures in {out}")
