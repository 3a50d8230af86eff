"""Stage 4: trains the scorer to classify concept and style, on real renderings only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from scumble_demo.emoji.concepts import STYLES, concepts
from scumble_demo.emoji.extras import Extras
from scumble_demo.emoji.gallery import Gallery
from scumble_demo.emoji.render import contact_sheet
from scumble_demo.pretraining.augment import augment, inked, outlined
from scumble_demo.pretraining.device import mixed_precision, step_generator
from scumble_demo.pretraining.unseen import UnseenPair
from scumble_demo.pretraining.vae import to_bytes, to_model
from scumble_demo.scorer import ScorerNet, hit_rate

# Share of pictures with simulated outlines or ink, so that concepts are recognised in unseen styles.
INKED, OUTLINED = 0.15, 0.2


class ScorerStage:
    """Trains on batches of two thirds concepts, in the five styles or in extra ones, and one third other emoji.

    Other emoji make the style classifier independent of concepts; extra styles make the concept classifier independent
    of styles.
    """

    name = "scorer"

    def __init__(
        self,
        net: ScorerNet,
        gallery: Gallery,
        softened: NDArray[np.uint8],
        extras: Extras,
        unseen: tuple[UnseenPair, ...],
        *,
        seed: int,
        device: torch.device,
        batch: int = 96,
    ) -> None:
        self.module = net.to(device)
        self.gallery, self.softened, self.extras, self.unseen = gallery, softened, extras, unseen
        self.seed, self.device, self.batch, self.known = seed, device, batch, len(concepts())
        hidden = {(pair.row, pair.style) for pair in unseen}
        rows = len(gallery.codes)
        places = [(r, s) for r in range(rows) for s in range(len(STYLES)) if (r, s) not in hidden]
        # The third column is the index of a picture in `extras`, or -1.
        learnt = [(row, style, -1) for row, style in places if row < self.known]
        learnt += [(int(row), -1, number) for number, row in enumerate(extras.rows)]
        self.of_concepts = torch.tensor(learnt)
        self.of_others = torch.tensor([(row, style, -1) for row, style in places if row >= self.known])

    def loss(self, step: int) -> Tensor:
        generator = step_generator(self.seed, step)
        places = self._draw(generator)
        plain = self._plain(places, generator)
        pixels = self._redraw(plain.clone(), generator)
        with mixed_precision(self.device):
            concept = self.module.concept(pixels.contiguous(memory_format=torch.channels_last))
        rows = torch.where(places[:, 0] < self.known, places[:, 0], -1).to(self.device)
        named = functional.cross_entropy(concept.float(), rows, ignore_index=-1, label_smoothing=0.05)
        styles = self.module.style_by_palette(plain)
        return named + functional.cross_entropy(styles, places[:, 1].to(self.device), ignore_index=-1)

    def validate(self) -> dict[str, float]:
        """Measure accuracy on held-out renderings, among all concepts and styles."""
        rows, styles = [pair.row for pair in self.unseen], [pair.style for pair in self.unseen]
        pixels = to_model(self.gallery.pictures[rows, styles], self.device)
        concept, style = self.module.concept(pixels).cpu(), self.module.style(pixels).cpu()
        return {
            "val_concept_top1": hit_rate(concept, rows, 1),
            "val_concept_top5": hit_rate(concept, rows, 5),
            "val_style": hit_rate(style, styles, 1),
        }

    def sample(self, path: Path) -> None:
        """Write a sheet of augmented pictures, the scorer's input."""
        generator = step_generator(self.seed, 0)
        pixels = self._redraw(self._plain(self._draw(generator), generator), generator)
        contact_sheet(to_bytes(pixels), columns=12).save(path)

    def _draw(self, generator: torch.Generator) -> Tensor:
        others = self.batch // 3
        first = torch.randint(len(self.of_concepts), (self.batch - others,), generator=generator)
        second = torch.randint(len(self.of_others), (others,), generator=generator)
        places = torch.cat([self.of_concepts[first], self.of_others[second]])
        return places[torch.randperm(len(places), generator=generator)]

    def _plain(self, places: Tensor, generator: torch.Generator) -> Tensor:
        """Return originals or, in half of the cases, the autoencoder's reconstructions, `(n, 3, H, W)`."""
        soft = (torch.rand(len(places), generator=generator) < 0.5).tolist()
        chosen = [self._picture(entry, softened=use) for use, entry in zip(soft, places.tolist(), strict=True)]
        return to_model(np.stack(chosen), self.device)

    def _redraw(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Simulate ink or outlines for some pictures, and augment all; changes `pixels`."""
        redrawn = torch.rand(len(pixels), generator=generator)
        ink, line = redrawn < INKED, (redrawn >= INKED) & (redrawn < INKED + OUTLINED)
        pixels[ink], pixels[line] = inked(pixels[ink]), outlined(pixels[line])
        strength = 0.1 + 0.9 * float(torch.rand((), generator=generator))
        return augment(pixels, generator, strength, shrink=0.45)

    def _picture(self, entry: list[int], *, softened: bool) -> NDArray[np.uint8]:
        row, style, extra = entry
        if extra >= 0:
            place_of: tuple[int, ...] = (extra,)
            source = self.extras.pictures
        else:
            place_of = (row, style)
            source = self.softened if softened else self.gallery.pictures
        chosen: NDArray[np.uint8] = source[place_of]
        return chosen
