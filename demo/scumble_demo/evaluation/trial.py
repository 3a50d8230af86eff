"""Fixed prompts and seeds, drawn with different adapters and arranged in a grid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from scumble.request import Adapter, Request
from scumble_demo.emoji.captions import canonical_caption
from scumble_demo.emoji.concepts import BASE_STYLES, Concept, base_concepts
from scumble_trainers.base import TrainingBase, native_resolution
from scumble_trainers.results.sampling import grid, save_sheet
from scumble_trainers.results.serving import Served

ADAPTER = "trained/adapter"
GRID = "effect_grid.png"
COUNT = 32
SHOWN = 6
STEPS = 25
GUIDANCE = 3.0
"""The same as for the base (`scumble train base --evaluate`)."""

Metrics = dict[str, float]


@dataclass(frozen=True, slots=True)
class Trial:
    """Prompts for a base; prompt i always has seed i."""

    base: TrainingBase
    prompts: tuple[str, ...]

    def draw(self, served: Served, adapters: Sequence[Adapter | None], **more: Any) -> list[Image.Image]:
        """Draw one image per prompt, the i-th with `adapters[i]`, or with none."""
        side = native_resolution(self.base.folder)
        requests = [
            Request(
                prompt=prompt,
                seed=seed,
                steps=STEPS,
                guidance_scale=GUIDANCE,
                width=side,
                height=side,
                adapters=() if adapter is None else (adapter,),
                images=_wanted(adapter, more.get("images", {})),
            )
            for seed, (prompt, adapter) in enumerate(zip(self.prompts, adapters, strict=True))
        ]
        return served.draw(requests)

    def plain(self, served: Served) -> list[Image.Image]:
        """Draw all prompts with the base alone."""
        return self.draw(served, [None] * len(self.prompts))

    def adapted(self, served: Served, **options: Any) -> list[Image.Image]:
        """Draw all prompts with the trained adapter."""
        return self.draw(served, [Adapter(ref=ADAPTER, **options)] * len(self.prompts))


def _wanted(adapter: Adapter | None, images: Mapping[str, bytes]) -> dict[str, bytes]:
    return {} if adapter is None else {name: images[name] for name in adapter.images}


def show(out: Path, columns: Mapping[str, Sequence[Image.Image]], rows: Sequence[str]) -> None:
    """Write OUT/effect_grid.png with the first images of each column."""
    some = [(title, list(pictures)[:SHOWN]) for title, pictures in columns.items()]
    save_sheet(grid(some, list(rows)[:SHOWN]), out / GRID)


def some_concepts(count: int = COUNT) -> list[Concept]:
    """Return concepts evenly spread over those that the base knows."""
    known = base_concepts()
    return [known[index * len(known) // count] for index in range(count)]


def known_prompts(wanted: Iterable[Concept]) -> tuple[str, ...]:
    """Return prompts in the base's training captions, in its styles in turn."""
    return tuple(
        canonical_caption(concept, BASE_STYLES[index % len(BASE_STYLES)]) for index, concept in enumerate(wanted)
    )


def rounded(metrics: Mapping[str, float]) -> Metrics:
    return {name: round(value, 4) for name, value in metrics.items()}
