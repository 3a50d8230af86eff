"""Draws samples with fixed prompts and seeds, and the grid of a run: the base, then each checkpoint.

OUT/samples/step-000250.png     one column: the images of one step, top to bottom; step 0 is the base
OUT/sample_grid.png             all columns so far, labelled
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from scumble_trainers.base import Pipeline
from scumble_trainers.data.captions import TextEncoders, TextStates

MARGIN = 4
LABEL = 18  # pixels of a column's or row's caption
TEXT_SIZE = 12


@dataclass(frozen=True, slots=True)
class Samples:
    """The settings of all columns of a grid: prompt i uses seed + i."""

    prompts: tuple[str, ...]
    seed: int
    steps: int
    guidance: float
    resolution: int


@torch.no_grad()
def draw_samples(pipeline: Pipeline, samples: Samples, **more: Any) -> list[Image.Image]:
    """Draw one image per prompt with the base's scheduler; `more` is passed to the pipeline.

    Long prompts are read in chunks, as serving reads them; here the shorter ones are padded to the longest.
    """
    pipeline.set_progress_bar_config(disable=True)
    seeds = range(samples.seed, samples.seed + len(samples.prompts))
    result = pipeline(
        **_texts(pipeline, samples.prompts),
        num_inference_steps=samples.steps,
        guidance_scale=samples.guidance,
        width=samples.resolution,
        height=samples.resolution,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        **more,
    )
    return list(result.images)


def _texts(pipeline: Pipeline, prompts: Sequence[str]) -> dict[str, Any]:
    """Return the prompts as arguments of a pipeline, which itself cuts what is longer than one chunk."""
    encoders = TextEncoders(pipeline)
    tokens = encoders.tokenize([*prompts, ""]).ids
    if _fits(tokens):
        return {"prompt": list(prompts)}
    text: TextStates = encoders(tokens.to(pipeline.device))
    zeros = bool(pipeline.config.get("force_zeros_for_empty_prompt"))  # SDXL's
    arguments: dict[str, Any] = {}
    for name, values in (("prompt_embeds", text.states), ("pooled_prompt_embeds", text.pooled)):
        if values is not None:
            negative = torch.zeros_like(values[-1:]) if zeros else values[-1:]
            arguments |= {name: values[:-1], f"negative_{name}": negative.expand_as(values[:-1])}
    return arguments


def _fits(tokens: Tensor) -> bool:
    """Return whether texts `(N, encoders, C, T)` have one chunk each."""
    return tokens.shape[2] == 1


def add_column(out: Path, step: int, pictures: Sequence[Image.Image], rows: Sequence[str]) -> Image.Image:
    """Write the images of `step`, and `out/sample_grid.png` from all columns up to it.

    Columns are separate files, so a resumed run still has the earlier ones.
    """
    folder = out / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    _strip(pictures).save(folder / f"step-{step:06d}.png")
    files = {int(path.stem.removeprefix("step-")): path for path in sorted(folder.glob("step-*.png"))}
    columns = [
        (f"step {moment}" if moment else "base", _pictures(path)) for moment, path in files.items() if moment <= step
    ]
    sheet = grid(columns, rows)
    save_sheet(sheet, out / "sample_grid.png")
    return sheet


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write the grid in 256 colours, because it is part of every published version."""
    sheet.quantize(256).save(path, optimize=True)


def grid(columns: Sequence[tuple[str, Sequence[Image.Image]]], rows: Sequence[str]) -> Image.Image:
    """Return the grid: labelled columns, with `rows` written under their images."""
    size = columns[0][1][0].width
    width = MARGIN + len(columns) * (size + MARGIN)
    height = LABEL + MARGIN + len(rows) * (size + LABEL + MARGIN)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(TEXT_SIZE)
    for number, (title, pictures) in enumerate(columns):
        left = MARGIN + number * (size + MARGIN)
        pen.text((left, 2), title, fill="black", font=font)
        for row, picture in enumerate(pictures):
            sheet.paste(picture, (left, LABEL + MARGIN + row * (size + LABEL + MARGIN)))
    for row, text in enumerate(rows):
        pen.text((MARGIN, LABEL + MARGIN + row * (size + LABEL + MARGIN) + size + 1), text, fill="black", font=font)
    return sheet


def _strip(pictures: Sequence[Image.Image]) -> Image.Image:
    size = pictures[0].width
    strip = Image.new("RGB", (size, size * len(pictures)))
    for row, picture in enumerate(pictures):
        strip.paste(picture, (0, row * size))
    return strip


def _pictures(path: Path) -> list[Image.Image]:
    """Split a column, which `_strip` joined, into square images from top to bottom."""
    with Image.open(path) as opened:
        strip = opened.convert("RGB")
    size = strip.width
    return [strip.crop((0, top, size, top + size)) for top in range(0, strip.height, size)]
