"""Renders SVG documents on white by resvg, the same renderer on every platform."""

from __future__ import annotations

import io

import numpy as np
import resvg_py
from numpy.typing import NDArray
from PIL import Image

SIZE = 128


def render(svg: str, size: int = SIZE) -> NDArray[np.uint8]:
    """Render to `(size, size, 3)`; a picture that is not square is centred."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    page = Image.new("RGBA", (size, size), "white")
    drawn.thumbnail((size, size))
    page.alpha_composite(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
    return np.asarray(page.convert("RGB"))


def contact_sheet(pictures: NDArray[np.uint8], columns: int, gap: int = 2) -> Image.Image:
    """Arrange `(n, H, W, 3)` in rows of a sheet."""
    n, height, width, _ = pictures.shape
    rows = -(-n // columns)
    page = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "#888")
    for i, picture in enumerate(pictures):
        page.paste(Image.fromarray(picture), ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    return page
