"""Simulated traffic: the steps that a loop of eight images computes for varied, mixed requests, as tiny records.

A record has the structure of a step's inputs (rows, tokens, rank pages, which parts there are); widths are 1.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from scumble_build.graphs.adapted import Factors, Pages
from scumble_build.graphs.inputs import ImageInputs, StepInputs
from scumble_build.graphs.layout import PAGE, rank_bucket
from scumble_server.executors.padding import TEXT, Step

RANKS = (4, 8, 16, 16, 32, 32, 64, 128)


@dataclass(frozen=True)
class Mix:
    """How requests are spread. `arrivals` per step; the rest are shares of all requests, or of those with LoRAs."""

    arrivals: float = 0.15
    lora: float = 0.7
    several: float = 0.25
    full: float = 0.2
    unguided: float = 0.1
    long: float = 0.15
    pictures: float = 0.05
    nets: float = 0.05
    adapters: int = 200
    most: int = 8


@dataclass
class Drawn:
    """An image on its way. `loras` names its set, `pictures` its groups and tokens."""

    left: int
    rows: int
    tokens: int
    loras: tuple[int, ...] = ()
    pictures: tuple[int, int] | None = None
    nets: bool = False


@dataclass
class Traffic:
    """Requests in, steps out; the same seed, the same steps."""

    mix: Mix
    seed: int = 0
    pool: Tensor = field(default_factory=lambda: torch.nn.Buffer(torch.zeros(4, PAGE), persistent=False))

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._ranks = [self._rng.choice(RANKS) for _ in range(self.mix.adapters)]
        self._full = [self._rng.random() < self.mix.full for _ in range(self.mix.adapters)]

    def steps(self) -> Iterator[Step]:
        """Without end."""
        waiting: list[Drawn] = []
        active: list[Drawn] = []
        while True:
            while self._rng.random() < self.mix.arrivals / (1 + self.mix.arrivals):
                waiting += self._request()
            joining = self.mix.most - len(active)
            active += waiting[:joining]
            del waiting[:joining]
            if active:
                yield self._stacked(active)
            for image in active:
                image.left -= 1
            active = [image for image in active if image.left]

    def _request(self) -> list[Drawn]:
        """One to four images that share all but their seed."""
        rng, mix = self._rng, self.mix
        count = 1 if rng.random() < 0.75 else 2
        loras = tuple(rng.sample(range(mix.adapters), count)) if rng.random() < mix.lora else ()
        pictures = (rng.choice((1, 1, 1, 2)), rng.choice((4, 4, 16))) if rng.random() < mix.pictures else None
        steps, rows = rng.choice((20, 25, 30)), 1 if rng.random() < mix.unguided else 2
        tokens = TEXT * (rng.choice((2, 2, 3)) if rng.random() < mix.long else 1)
        nets = rng.random() < mix.nets
        return [Drawn(steps, rows, tokens, loras, pictures, nets) for _ in range(rng.choice((1, 1, 1, 2, 4)))]

    def _stacked(self, active: Sequence[Drawn]) -> Step:
        images = sorted(active, key=lambda image: (not image.loras, image.loras))
        rows, tokens = sum(image.rows for image in images), max(image.tokens for image in images)
        mask = torch.ones(rows, tokens, dtype=torch.bool) if len({image.tokens for image in images}) > 1 else None
        nets = any(image.nets for image in images)
        inputs = StepInputs(
            torch.zeros(rows, tokens, 1),
            mask,
            self._factors([image for image in images if image.loras]),
            _pictures(images),
            residuals=(torch.zeros(rows, 1, 1, 1),) if nets else None,
        )
        return Step(torch.zeros(rows, 1, 1, 1), torch.zeros(rows), inputs)

    def _factors(self, images: Sequence[Drawn]) -> Factors | None:
        if not images:
            return None
        rank = rank_bucket(max(sum(self._ranks[lora] for lora in image.loras) for image in images))
        full = any(self._full[lora] for image in images for lora in image.loras)
        rows = sum(image.rows for image in images)
        of_sets = {sum(image.rows for image in own) for _, own in groupby(images, key=lambda image: image.loras)}
        pages = Pages(self.pool, self.pool, torch.zeros(rows, rank // PAGE, dtype=torch.int64))
        group = of_sets.pop() if len(of_sets) == 1 else 0
        return Factors(pages, pages if full else None, torch.zeros(rows, rank), group)


def _pictures(images: Sequence[Drawn]) -> ImageInputs | None:
    present = [image for image in images if image.pictures is not None]
    if not present:
        return None
    sizes = [image.pictures for image in present if image.pictures is not None]
    groups, tokens = (max(size) for size in zip(*sizes, strict=True))
    of_rows = [image.pictures is not None for image in images for _ in range(image.rows)]
    at = torch.tensor([row for row, has in enumerate(of_rows) if has])
    mask = torch.ones(len(at), groups, tokens, dtype=torch.bool) if len(set(sizes)) > 1 else None
    return ImageInputs(at, torch.zeros(len(at), groups, tokens, 1), mask, torch.zeros(len(at), groups))
