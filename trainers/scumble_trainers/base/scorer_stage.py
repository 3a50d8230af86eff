"""Stage 4: the scorer learns to name emoji and style, from real renderings only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from scumble_trainers.base.augment import augment
from scumble_trainers.base.device import mixed_precision, step_generator
from scumble_trainers.base.unseen import Pair
from scumble_trainers.base.vae import to_bytes, to_model
from scumble_trainers.emoji.concepts import STYLES, concepts
from scumble_trainers.emoji.gallery import Gallery
from scumble_trainers.emoji.render import contact_sheet
from scumble_trainers.scorer import ScorerNet, hit_rate


class ScorerStage:
    """Two thirds of a batch are concepts, the rest other emoji: they show what a style is beyond the concepts."""

    name = "scorer"

    def __init__(
        self,
        net: ScorerNet,
        gallery: Gallery,
        softened: NDArray[np.uint8],
        unseen: tuple[Pair, ...],
        *,
        seed: int,
        device: torch.device,
        batch: int = 96,
    ) -> None:
        self.module = net.to(device, memory_format=torch.channels_last)
        self.gallery, self.softened, self.unseen = gallery, softened, unseen
        self.seed, self.device, self.batch = seed, device, batch
        hidden = {(pair.row, pair.style) for pair in unseen}
        rows, known = len(gallery.codes), len(concepts())
        places = [(r, s) for r in range(rows) for s in range(len(STYLES)) if (r, s) not in hidden]
        self.of_concepts = torch.tensor([place for place in places if place[0] < known])
        self.of_others = torch.tensor([place for place in places if place[0] >= known] or places)

    def loss(self, step: int) -> Tensor:
        generator = step_generator(self.seed, step)
        places = self._draw(generator)
        pixels = augment(self._pictures(places, generator), generator)
        with mixed_precision(self.device):
            concept, style = self.module(pixels.contiguous(memory_format=torch.channels_last))
        wanted = places.to(self.device)
        named = functional.cross_entropy(concept.float(), wanted[:, 0], label_smoothing=0.05)
        return named + functional.cross_entropy(style.float(), wanted[:, 1], label_smoothing=0.05)

    def validate(self) -> dict[str, float]:
        """Accuracy on the renderings that it never sees, among all concepts and styles."""
        rows, styles = [pair.row for pair in self.unseen], [pair.style for pair in self.unseen]
        concept, style = self.module(to_model(self.gallery.pictures[rows, styles], self.device))
        concept = concept[:, : len(concepts())].cpu()
        return {
            "val_concept_top1": hit_rate(concept, rows, 1),
            "val_concept_top5": hit_rate(concept, rows, 5),
            "val_style": hit_rate(style.cpu(), styles, 1),
        }

    def sample(self, path: Path) -> None:
        """What it sees: a sheet of augmented pictures."""
        generator = step_generator(self.seed, 0)
        pixels = augment(self._pictures(self._draw(generator), generator), generator)
        contact_sheet(to_bytes(pixels), columns=12).save(path)

    def _draw(self, generator: torch.Generator) -> Tensor:
        others = self.batch // 3
        first = torch.randint(len(self.of_concepts), (self.batch - others,), generator=generator)
        second = torch.randint(len(self.of_others), (others,), generator=generator)
        places = torch.cat([self.of_concepts[first], self.of_others[second]])
        return places[torch.randperm(len(places), generator=generator)]

    def _pictures(self, places: Tensor, generator: torch.Generator) -> Tensor:
        """Originals and, two times in five, what the autoencoder made of them."""
        soft = (torch.rand(len(places), generator=generator) < 0.4).tolist()
        chosen = [
            (self.softened if use else self.gallery.pictures)[row, style]
            for use, (row, style) in zip(soft, places.tolist(), strict=True)
        ]
        return to_model(np.stack(chosen), self.device)
