"""Finished pictures: pixels with the receipt that says how they were made, and PNG files that keep both."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from scumble.errors import InvalidRequest, NotFound
from scumble.events import Pixels

PNG_RECEIPT = "scumble_receipt"
"""Keyword of the PNG text chunk (iTXt) that holds the receipt's JSON."""


@dataclass(frozen=True, slots=True)
class Images:
    """The result of one request; `maps` are the control maps, if it asked for them."""

    images: Pixels
    receipt: dict[str, Any]
    maps: Pixels | None = None

    def __len__(self) -> int:
        return len(self.images)

    def pil(self) -> list[Image.Image]:
        return [Image.fromarray(pixels) for pixels in self.images]

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write `a.png`, or for several pictures `a-0.png`, `a-1.png` …; a file appears whole or not at all.

        A file's receipt gains `image`, its place in the request. Raises as `check_png_path`.
        """
        paths = png_paths(Path(path), len(self))
        for index, (file, picture) in enumerate(zip(paths, self.pil(), strict=True)):
            info = PngInfo()
            info.add_itxt(PNG_RECEIPT, json.dumps(self.receipt | {"image": index}, separators=(",", ":")))
            encoded = BytesIO()
            picture.save(encoded, "PNG", pnginfo=info)
            write_whole(file, encoded.getvalue())
        return paths


def encoded(picture: bytes | str | os.PathLike[str] | Image.Image) -> bytes:
    """A picture for a request: as it is, a file's content, or a PNG of what PIL opened. Raises NotFound."""
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, Image.Image):
        buffer = BytesIO()
        picture.save(buffer, "PNG")
        return buffer.getvalue()
    path = Path(picture)
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotFound(f"picture {path} cannot be read: {error.strerror}", path=str(path)) from error


def png_paths(path: Path, count: int) -> list[Path]:
    check_png_path(path)
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{index}{path.suffix}") for index in range(count)]


def check_png_path(path: Path) -> None:
    """Call before any work. Raises InvalidRequest if `path` is no PNG, NotFound if its folder is missing."""
    if path.suffix.lower() != ".png":
        raise InvalidRequest(f"{path}: pictures are written as PNG; name a .png file", field="out")
    if not path.parent.is_dir():
        raise NotFound(f"folder {path.parent} does not exist; make it first", path=str(path.parent))


def write_whole(path: Path, content: bytes) -> None:
    """Put `content` at `path`; who reads there meanwhile finds the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
