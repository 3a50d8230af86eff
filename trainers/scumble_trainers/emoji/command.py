"""`scumble train emoji`: writes one style as a folder of captioned pictures, the form that trainers read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

import typer
from PIL import Image

from scumble.errors import InvalidRequest
from scumble_trainers.emoji.captions import canonical_caption, captions
from scumble_trainers.emoji.concepts import concepts, style
from scumble_trainers.emoji.home import data_home
from scumble_trainers.emoji.icons import read_icon_set
from scumble_trainers.emoji.packages import fetch_packages
from scumble_trainers.emoji.render import SIZE, render

Split = Literal["train", "held-out", "all"]


def write_style(modules: Path, style_name: str, out: Path, split: Split = "train", size: int = SIZE) -> int:
    """Writes `out/*.png` and `out/metadata.jsonl` (file_name, text, texts, concept); returns the count.

    The split is by concept: "train" holds those that the base knows, "held-out" the others.
    """
    chosen = style(style_name)
    icons = read_icon_set(modules / chosen.package)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for concept in concepts():
        if split != "all" and concept.held_out != (split == "held-out"):
            continue
        file_name = f"{concept.name.replace(' ', '-')}.png"
        Image.fromarray(render(icons.svg_of_code(concept.code), size)).save(out / file_name)
        texts = captions(concept, chosen)
        row = {"file_name": file_name, "text": canonical_caption(concept, chosen), "texts": texts}
        rows.append(json.dumps(row | {"concept": concept.name}))
    (out / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return len(rows)


def prepare_style(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    style_name: Annotated[str, typer.Option("--style", help="noto, twemoji, fluent, openmoji or ink.")] = "openmoji",
    split: Annotated[str, typer.Option("--split", help="train, held-out or all: which concepts.")] = "train",
    size: Annotated[int, typer.Option("--size", help="Pixels of a side.")] = SIZE,
    data_dir: Annotated[Path | None, typer.Option("--data-dir", help="Where npm packages are kept.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write the pictures of one drawing style with captions, as data for a trainer."""
    if split not in get_args(Split):
        raise InvalidRequest(f"--split is {split!r}; it is train, held-out or all", field="split")
    style(style_name)
    modules = fetch_packages(data_dir or data_home() / "npm")
    count = write_style(modules, style_name, out, cast("Split", split), size)
    print(json.dumps({"out": str(out), "pictures": count}) if as_json else f"{count} pictures in {out}")
