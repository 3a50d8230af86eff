"""Reads a folder without metadata.jsonl: each picture's captions are in a text file beside it, as for kohya's trainers.

    DIR/apple.png
    DIR/apple.txt      or apple.caption: a caption; several lines are several captions of the picture

A folder's name means nothing here: of kohya's `10_apple` neither the repeats nor the words are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from scumble.errors import InvalidRequest, NotFound

METADATA = "metadata.jsonl"
PICTURE_ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
SIDECAR_ENDINGS = (".txt", ".caption")


@dataclass(frozen=True, slots=True)
class Entry:
    """What is said about a picture. `place` begins a message about it: where it is said, or nothing."""

    place: str
    name: str
    fields: Mapping[str, object]
    caption: str = '"text"'
    """Where its caption belongs."""


def sidecar_entries(folder: Path, *, needed: bool) -> list[Entry]:
    """Return an entry for each picture under `folder`, with the captions beside it.

    Raises NotFound without pictures; InvalidRequest if captions are `needed` and no picture has any.
    """
    if not folder.exists():
        raise NotFound(f"{folder} does not exist: set --data to a folder with pictures and captions", field="data")
    pictures = pictures_under(folder)
    if not pictures:
        raise NotFound(
            f"no {METADATA} and no pictures in {folder}: set --data to a folder with pictures and {METADATA} "
            "(or a .txt beside each picture), or to such a .jsonl file",
            field="data",
        )
    captions = {picture: _captions_beside(picture) for picture in pictures}
    if needed and not any(captions.values()):
        raise InvalidRequest(
            f"{folder} has {len(pictures)} pictures and no captions: put a .txt beside each, or write {METADATA} with "
            'one line {"file_name", "text"} per picture, or pass --caption "{name}" to use the names of the files, or '
            '--caption "a photo of a sks dog" for one caption of all',
            field="data",
        )
    return [_entry(picture.relative_to(folder).as_posix(), texts) for picture, texts in captions.items()]


def pictures_under(folder: Path) -> list[Path]:
    """Return all pictures by their endings, ordered. What begins with a dot (macOS' `._apple.png`) is none."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in PICTURE_ENDINGS
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _captions_beside(picture: Path) -> list[str]:
    file = next((path for ending in SIDECAR_ENDINGS if (path := picture.with_suffix(ending)).is_file()), None)
    if file is None:
        return []
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{file} is not UTF-8 text", field="data") from error
    return [line.strip() for line in lines if line.strip()]


def _entry(name: str, texts: list[str]) -> Entry:
    beside = PurePosixPath(name).with_suffix(SIDECAR_ENDINGS[0]).as_posix()
    return Entry("", name, {"text": texts[0], "texts": texts} if texts else {}, beside)
