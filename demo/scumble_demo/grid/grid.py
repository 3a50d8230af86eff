"""Draws a labelled grid of images that is readable in a README."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

PAPER = (255, 255, 255)
INK = (38, 38, 38)
FAINT = (120, 120, 120)
FRAME = (222, 222, 222)
MARGIN = 24
GAP = 12
LABEL_WIDTH = 190
HEADER_HEIGHT = 44
MIN_CELL = 256


def draw_grid(
    pictures: Sequence[Sequence[Image.Image]],
    columns: Sequence[str],
    rows: Sequence[tuple[str, str]],
    insets: Sequence[Sequence[Path | None]] | None = None,
) -> Image.Image:
    """Draw `pictures[row][column]`, all of one size; a row's label is a text and a fainter note.

    Pictures under MIN_CELL pixels are enlarged by an integer factor. `insets[row][column]`, the reference of a picture,
    is drawn small in its corner.
    """
    width, height = (_enlarge(pictures[0][0])).size
    page = Image.new(
        "RGB",
        (
            2 * MARGIN + LABEL_WIDTH + len(columns) * (width + GAP),
            2 * MARGIN + HEADER_HEIGHT + len(rows) * (height + GAP) - GAP,
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(page)
    left, top = MARGIN + LABEL_WIDTH + GAP, MARGIN + HEADER_HEIGHT
    for column, label in enumerate(columns):
        _column_label(draw, label, left + column * (width + GAP) + width // 2, width)
    for line, (label, note) in enumerate(rows):
        y = top + line * (height + GAP)
        _row_label(draw, label, note, y + height // 2)
        for column, picture in enumerate(pictures[line]):
            x = left + column * (width + GAP)
            page.paste(_enlarge(picture), (x, y))
            if insets is not None and (inset := insets[line][column]) is not None:
                _inset(page, draw, inset, (x, y), width // 3)
            draw.rectangle((x - 1, y - 1, x + width, y + height), outline=FRAME)
    return page


def _inset(page: Image.Image, draw: ImageDraw.ImageDraw, inset: Path, corner: tuple[int, int], side: int) -> None:
    with Image.open(inset) as opened:
        small = opened.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    x, y = corner
    page.paste(small, corner)
    draw.rectangle((x - 1, y - 1, x + side, y + side), outline=FAINT)


def _enlarge(picture: Image.Image) -> Image.Image:
    factor = max(1, MIN_CELL // picture.width)
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.LANCZOS)


def _column_label(draw: ImageDraw.ImageDraw, label: str, x: int, width: int) -> None:
    size = 19
    while size > 10 and draw.textlength(label, ImageFont.load_default(size)) > width:
        size -= 1
    draw.text((x, MARGIN + HEADER_HEIGHT - 14), label, INK, ImageFont.load_default(size), anchor="ms")


def _row_label(draw: ImageDraw.ImageDraw, label: str, note: str, y: int) -> None:
    text, small = ImageFont.load_default(19), ImageFont.load_default(14)
    lines = [(line, text, INK, 25) for line in textwrap.wrap(label, 19)]
    lines += [(line, small, FAINT, 19) for line in note.splitlines()]
    y -= sum(height for *_, height in lines) // 2
    for line, font, colour, height in lines:
        draw.text((MARGIN, y), line, colour, font)
        y += height
