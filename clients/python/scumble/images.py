"""Finished pictures: pixels with the receipt that says how they were made, and files that keep both."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from scumble.errors import InvalidRequest, NotFound
from scumble.events import Pixels
from scumble.files import write_whole
from scumble.receipt import Receipt
from scumble.request import Format

PNG_RECEIPT = "scumble_receipt"
"""Keyword of the PNG text chunk (iTXt) that holds the receipt's JSON."""
EXIF_RECEIPT = 0x010E
"""The Exif tag (ImageDescription) that holds it in a JPEG or WebP."""
FORMATS: dict[str, Format] = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}
"""By a file's ending."""
QUALITY = 90


@dataclass(frozen=True, slots=True)
class Images:
    """The result of one request; `maps` are the control maps, if it asked for them.

    Where the request asked for a format, `images` is empty and `encoded` holds files of that format.
    """

    images: Pixels
    receipt: Receipt
    maps: Pixels | None = None
    encoded: tuple[bytes, ...] = ()

    def __len__(self) -> int:
        return len(self.encoded) or len(self.images)

    def pil(self) -> list[Image.Image]:
        if self.encoded:
            return [Image.open(BytesIO(content)).convert("RGB") for content in self.encoded]
        return [Image.fromarray(pixels) for pixels in self.images]

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write `a.png`, or for several pictures `a-0.png`, `a-1.png` …; a file appears whole or not at all.

        The ending says the format: .png, .webp, .jpg. A file's receipt gains `image`, its place in the request. What
        the server encoded in this format is written as it came. Raises as `check_path`.
        """
        paths = paths_for(Path(path), len(self))
        kind = FORMATS[Path(path).suffix.lower()]
        as_it_came = self.encoded if kind == self.receipt.request.options.get("format") else ()
        contents = as_it_came or (
            encode(picture, kind, self.receipt.of_image(index)) for index, picture in enumerate(self.pil())
        )
        for file, content in zip(paths, contents, strict=True):
            write_whole(file, content)
        return paths


def encode(picture: Image.Image, kind: Format, receipt: Receipt, quality: int = QUALITY) -> bytes:
    """A file that carries its receipt; `quality` means nothing to PNG.

    Raises InvalidRequest if the receipt is larger than what a JPEG holds (64 KB).
    """
    text = json.dumps(receipt.to_json(), separators=(",", ":"))
    buffer = BytesIO()
    if kind == "png":
        info = PngInfo()
        info.add_itxt(PNG_RECEIPT, text)
        picture.save(buffer, "PNG", pnginfo=info)
        return buffer.getvalue()
    exif = Image.Exif()
    exif[EXIF_RECEIPT] = text
    try:
        picture.save(buffer, kind.upper(), exif=exif, quality=quality)
    except ValueError as error:
        raise InvalidRequest(
            f"the receipt does not fit into a {kind} file ({error}); ask for png", field="options.format"
        ) from error
    return buffer.getvalue()


def receipt_text(path: Path) -> str:
    """The receipt's JSON in a picture of ours, or "". Raises InvalidRequest for a damaged one."""
    try:
        with Image.open(path, formats=("PNG", "WEBP", "JPEG")) as picture:
            in_png = getattr(picture, "text", {}).get(PNG_RECEIPT)
            return str(in_png or picture.getexif().get(EXIF_RECEIPT, ""))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise InvalidRequest(f"{path} is a damaged picture: {error}", field="from_receipt") from error


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


def paths_for(path: Path, count: int) -> list[Path]:
    check_path(path)
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{index}{path.suffix}") for index in range(count)]


def check_path(path: Path) -> None:
    """Call before any work. Raises InvalidRequest for an unknown ending, NotFound if its folder is missing."""
    if path.suffix.lower() not in FORMATS:
        raise InvalidRequest(f"{path}: pictures are written as {', '.join(FORMATS)}; name such a file", field="out")
    if not path.parent.is_dir():
        raise NotFound(f"folder {path.parent} does not exist; make it first", path=str(path.parent))
