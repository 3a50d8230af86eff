"""Finished images: pixels with their receipt, and files that contain both."""

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
"""The Exif tag (ImageDescription) that holds the receipt in a JPEG or WebP."""
FORMATS: dict[str, Format] = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}
"""Ending of a file → its format."""
QUALITY = 90
PNG_LEVEL = 6
"""zlib's level of a PNG, 0 (none) to 9, where nobody waits for it."""


@dataclass(frozen=True, slots=True)
class Images:
    """The result of one request; `maps` are the control maps, if it has `return_maps`.

    If the request has a `format`, `images` is empty and `encoded` has files of that format.
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
        """Write `a.png`, or for several images `a-0.png`, `a-1.png` …, each atomically, and return the paths.

        The ending is the format: .png, .webp, .jpg. A file's receipt has `image`, its index in the request. Files that
        the server encoded in this format are written unchanged. Raises the errors of `check_path`.
        """
        paths = paths_for(Path(path), len(self))
        kind = FORMATS[Path(path).suffix.lower()]
        unchanged = self.encoded if kind == self.receipt.request.options.get("format") else ()
        contents = unchanged or (
            encode(image, kind, self.receipt.of_image(index)) for index, image in enumerate(self.pil())
        )
        for file, content in zip(paths, contents, strict=True):
            write_whole(file, content)
        return paths


def encode(
    image: Image.Image, kind: Format, receipt: Receipt, quality: int = QUALITY, *, png_level: int = PNG_LEVEL
) -> bytes:
    """Encode an image with its receipt inside; `quality` (1–100) is not for PNG, `png_level` (0–9) for PNG alone.

    Raises InvalidRequest if the receipt does not fit (a JPEG holds 64 KB).
    """
    text = json.dumps(receipt.to_json(), separators=(",", ":"))
    buffer = BytesIO()
    if kind == "png":
        info = PngInfo()
        info.add_itxt(PNG_RECEIPT, text)
        image.save(buffer, "PNG", pnginfo=info, compress_level=png_level)
        return buffer.getvalue()
    exif = Image.Exif()
    exif[EXIF_RECEIPT] = text
    try:
        image.save(buffer, kind.upper(), exif=exif, quality=quality)
    except ValueError as error:
        raise InvalidRequest(
            f"the receipt does not fit into a {kind} file ({error}); ask for png", field="options.format"
        ) from error
    return buffer.getvalue()


def receipt_text(path: Path) -> str:
    """Return the receipt's JSON in an image file, or "". Raises InvalidRequest for a damaged file."""
    try:
        with Image.open(path, formats=("PNG", "WEBP", "JPEG")) as image:
            in_png = getattr(image, "text", {}).get(PNG_RECEIPT)
            return str(in_png or image.getexif().get(EXIF_RECEIPT, ""))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise InvalidRequest(f"{path} is a damaged image file: {error}", field="from_receipt") from error


def encoded(image: bytes | str | os.PathLike[str] | Image.Image) -> bytes:
    """Return an input image as bytes: as given, a file's content, or a PIL image as PNG. Raises NotFound."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        buffer = BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()
    path = Path(image)
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotFound(f"image {path} cannot be read: {error.strerror}; check the path", path=str(path)) from error


def paths_for(path: Path, count: int) -> list[Path]:
    check_path(path)
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{index}{path.suffix}") for index in range(count)]


def check_path(path: Path) -> None:
    """Check a path before any work. Raises InvalidRequest for an unknown ending, NotFound if its folder is missing."""
    if path.suffix.lower() not in FORMATS:
        raise InvalidRequest(
            f"{path}: images are written as {', '.join(FORMATS)}; choose one of these endings", field="out"
        )
    if not path.parent.is_dir():
        raise NotFound(f"folder {path.parent} does not exist; make it first", path=str(path.parent))
