"""Reads, checks and splits a folder of captioned pictures before training. Imports no torch until it splits.

    DIR/metadata.jsonl      one line per picture: {"file_name": "images/0001.png", "text": "a red apple"}
    DIR/images/0001.png     any name, any depth; PNG, JPEG, WebP or BMP

This is the layout that the `datasets` library calls an image folder. A line may also have "texts" (more captions of the
picture; each step takes one at random), "concept" and "style" (equal for pictures of the same thing, or in the same
style), and "conditioning_image" (the file of its control picture). A file of such lines may be named in place of the
folder, to train on a part of its pictures. A folder without metadata.jsonl is read by `sidecars.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from scumble.errors import InvalidRequest
from scumble_build.pictures import WHITE, Ground, lay_on, to_eight_bits
from scumble_trainers.data.sidecars import METADATA, Entry, pictures_under, sidecar_entries

TEXT, STYLE, NAME = "{text}", "{style}", "{name}"  # placeholders in a caption template
REPORTED = 10  # largest number of problems that a message lists

_TRAILING_NUMBER = re.compile(r"\s*(\(\d+\)|\b\d+)\s*$", re.ASCII)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Demands:
    """What every example must have."""

    resolution: int
    captions: bool


@dataclass(frozen=True, slots=True)
class Example:
    """One picture, checked to decode and to be large enough, and its captions; `texts[0]` is "text".

    `texts` may be empty until `with_captions`, if templates are in place of them.
    """

    name: str
    path: Path
    texts: tuple[str, ...]
    digest: str
    size: tuple[int, int]
    """Width and height of the file, upright."""
    concept: str | None = None
    control: Path | None = None
    """File of its control picture, for a ControlNet."""
    style: str | None = None


def read_examples(data: Path, *, resolution: int, templates: Sequence[str] = ()) -> list[Example]:
    """Read all examples of a folder or of a file of lines, ordered by name.

    Captions are needed unless `templates` are in their place and none has `{text}`. Raises NotFound without the folder
    or pictures in it. Raises InvalidRequest, listing all problems, for no pictures, a malformed line, or a picture
    that is missing, broken, without caption, named twice or smaller than `resolution`.
    """
    needed = not templates or any(TEXT in template for template in templates)
    metadata = data / METADATA if data.is_dir() else data
    problems: list[str] = []
    entries: Iterable[Entry]
    if metadata.is_file():
        folder, entries = metadata.parent, _entries(_lines(metadata), problems)
    else:
        folder, entries = data, sidecar_entries(data, needed=needed)
    examples = list(_examples(folder, entries, _Demands(resolution, needed), problems))
    if data.is_dir() and metadata.is_file() and not problems:  # only reported if the lines themselves are valid
        problems += _uncaptioned(folder, examples)
    if problems:
        listed = "\n  ".join(problems[:REPORTED])
        more = f"\n  and {len(problems) - REPORTED} more" if len(problems) > REPORTED else ""
        raise InvalidRequest(f"{data} cannot be trained on:\n  {listed}{more}", field="data", problems=problems)
    if not examples:
        raise InvalidRequest(f"{metadata} names no picture", field="data")
    return sorted(examples, key=lambda example: example.name)


def data_digest(examples: Sequence[Example]) -> str:
    """Return `sha256:…` over names, captions and picture bytes, independent of the path."""
    content = [[example.name, *example.texts, example.digest] for example in examples]
    for key in ("concept", "style"):
        shared = [getattr(example, key) for example in examples]
        content += [[f"{key}s", *(str(value) for value in shared)]] if any(shared) else []
    return "sha256:" + hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def held_out_count(items: int, *, fraction: float, most: int) -> int:
    """Return how many of `items` are held out: at least one if `fraction` is above 0, and never the last one."""
    count = min(most, max(1, round(fraction * items))) if fraction > 0 else 0
    return min(count, items - 1)


def hold_out(items: Sequence[T], *, fraction: float, seed: int, most: int) -> tuple[list[T], list[T]]:
    """Split into (trained on, held out): hold out a `fraction` chosen by `seed`, at least one if above 0, at most
    `most`.
    """
    count = held_out_count(len(items), fraction=fraction, most=most)
    import torch

    from scumble_trainers.draws import generator

    order = torch.randperm(len(items), generator=generator(seed, "hold out")).tolist()
    held = set(order[:count])
    return (
        [item for index, item in enumerate(items) if index not in held],
        [item for index, item in enumerate(items) if index in held],
    )


def with_captions(examples: Sequence[Example], templates: Sequence[str]) -> list[Example]:
    """Replace the examples' captions by `templates`, if any; `{text}`, `{style}` and `{name}` in a template are the
    example's.

    Raises InvalidRequest if a template has `{style}` and an example has none.
    """
    return [replace(example, texts=_filled(example, templates)) if templates else example for example in examples]


def _filled(example: Example, templates: Sequence[str]) -> tuple[str, ...]:
    if example.style is None and any(STYLE in template for template in templates):
        raise InvalidRequest(
            f'--caption has {STYLE}, but {example.name} has no "style": add it to its line, or drop {STYLE}',
            field="caption",
        )
    texts = [
        template.replace(STYLE, example.style or "").replace(NAME, spoken(example.name)).replace(TEXT, text)
        for template in templates
        for text in (example.texts if TEXT in template else ("",))
    ]
    return tuple(dict.fromkeys(texts))


def spoken(name: str) -> str:
    """Return what a file's name says: without folder, ending and trailing number, `_` and `-` as spaces.

    >>> spoken("toys/red_apple-02.png"), spoken("hen (3).jpg"), spoken("1960s house.webp")
    ('red apple', 'hen', '1960s house')
    """
    words = re.sub(r"[_-]+", " ", PurePosixPath(name).stem)
    return " ".join(_TRAILING_NUMBER.sub("", words).split()) or words.strip()


def load_picture(path: Path, size: tuple[int, int], ground: Ground = WHITE) -> Image.Image:
    """Load an RGB picture of `size` (width, height): upright, laid on `ground`, resized, centre cropped."""
    with Image.open(path) as opened:
        pixels = np.asarray(to_eight_bits(ImageOps.exif_transpose(opened)))
    return ImageOps.fit(Image.fromarray(lay_on(pixels, ground)), size, Image.Resampling.LANCZOS)


def _lines(metadata: Path) -> str:
    try:
        return metadata.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{metadata} is not UTF-8 text", field="data") from error


def _entries(lines: str, problems: list[str]) -> Iterator[Entry]:
    """Parse lines; what is no JSON object with a name goes to `problems`."""
    for number, line in enumerate(lines.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: not JSON ({error.msg})")
            continue
        name = fields.get("file_name") if isinstance(fields, dict) else None
        if isinstance(name, str):
            yield Entry(f"line {number}: ", name, fields)
        else:
            problems.append(f'line {number}: no "file_name"')


def _examples(folder: Path, entries: Iterable[Entry], demands: _Demands, problems: list[str]) -> Iterator[Example]:
    seen: set[str] = set()
    for entry in entries:
        try:
            yield _example(folder, entry, demands, seen)
        except ValueError as problem:
            problems.append(f"{entry.place}{problem}")


def _example(folder: Path, entry: Entry, demands: _Demands, seen: set[str]) -> Example:
    """Check an entry. Raises ValueError with what is wrong with it."""
    name, fields = entry.name, entry.fields
    texts = _captions(entry, needed=demands.captions)
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{name} is outside the folder")
    if name in seen:
        raise ValueError(f"{name} is named twice")
    seen.add(name)
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{name} does not exist")
    content = path.read_bytes()
    size = _check_picture(path, name, demands.resolution)
    concept, style = (_shared(name, fields, key) for key in ("concept", "style"))
    digest = hashlib.sha256(content)
    control = _control(folder, fields.get("conditioning_image"), seen)
    if control is not None:
        digest.update(control.read_bytes())
    return Example(name, path, texts, digest.hexdigest(), size, concept, control, style)


def _control(folder: Path, name: object, seen: set[str]) -> Path | None:
    """Return the control picture's file, checked like a picture. It needs no line of its own."""
    if name is None:
        return None
    if not isinstance(name, str) or ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
        raise ValueError(f'"conditioning_image" {name!r} is not a file of the folder')
    if not (folder / name).is_file():
        raise ValueError(f"{name} does not exist")
    _check_picture(folder / name, name, 1)
    seen.add(name)
    return folder / name


def _shared(name: str, fields: Mapping[str, object], key: str) -> str | None:
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f'"{key}" of {name} is not a string')
    return value


def _captions(entry: Entry, *, needed: bool) -> tuple[str, ...]:
    name, text, others = entry.name, entry.fields.get("text"), entry.fields.get("texts", [])
    if text is None and not others and not needed:
        return ()
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name} has no caption ({entry.caption})")
    if not isinstance(others, list) or not all(isinstance(other, str) and other.strip() for other in others):
        raise ValueError(f'"texts" of {name} is not a list of captions')
    return tuple(dict.fromkeys(caption.strip() for caption in (text, *others)))


def _check_picture(path: Path, name: str, resolution: int) -> tuple[int, int]:
    """Check a picture and return its width and height, upright. Raises ValueError."""
    try:
        with Image.open(path) as picture:
            width, height = to_eight_bits(ImageOps.exif_transpose(picture)).size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is broken or not a picture ({error})") from error
    if min(width, height) < resolution:
        raise ValueError(f"{name} is too small: {width}x{height}, at least {resolution} a side is needed")
    return width, height


def _uncaptioned(folder: Path, examples: Sequence[Example]) -> list[str]:
    """Return problems for pictures in the folder that no line names."""
    named = {path for example in examples for path in (example.path, example.control)}
    missing = (path for path in pictures_under(folder) if path not in named)
    return [f"{path.relative_to(folder)} has no line in {METADATA}" for path in missing]
