"""Stage 2: trains text and vision tower contrastively on captioned pictures.

Half of a batch are concepts, half other emoji, whose names extend the vocabulary. Beside CLIP's loss, two auxiliary
heads on the vision tower classify emoji and style.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTokenizer

from scumble_demo.emoji.captions import captions, plain_caption
from scumble_demo.emoji.concepts import STYLES, concepts
from scumble_demo.emoji.gallery import Gallery
from scumble_demo.emoji.render import contact_sheet
from scumble_demo.pretraining.augment import augment
from scumble_demo.pretraining.device import mixed_precision, step_generator
from scumble_demo.pretraining.towers import Clip, contrastive_loss
from scumble_demo.pretraining.unseen import UnseenPair
from scumble_demo.pretraining.vae import to_bytes, to_model

TEXT_LENGTH = 24  # longest caption; positions beyond it do not change the pooled embedding


def all_captions(gallery: Gallery) -> list[list[tuple[str, ...]]]:
    """Return all captions by gallery row and style."""
    known = concepts()
    return [
        [captions(known[row], s) if row < len(known) else (plain_caption(name, s),) for s in STYLES]
        for row, name in enumerate(gallery.names)
    ]


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], length: int) -> Tensor:
    """Tokenize texts to `(n, length)`, padded with eos."""
    ids: Tensor = tokenizer(
        texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids
    return ids


class ClipStage:
    """Trains on the gallery and on its `softened` version (reconstructions by the autoencoder)."""

    name = "clip"

    def __init__(
        self,
        model: Clip,
        tokenizer: CLIPTokenizer,
        gallery: Gallery,
        softened: NDArray[np.uint8],
        unseen: tuple[UnseenPair, ...],
        *,
        seed: int,
        device: torch.device,
        batch: int = 96,
    ) -> None:
        self.module, self.tokenizer, self.device = model.to(device), tokenizer, device
        self.gallery, self.softened, self.unseen = gallery, softened, unseen
        self.seed, self.batch, self.styles = seed, batch, len(STYLES)
        self.captions = all_captions(gallery)
        hidden = {(pair.row, pair.style) for pair in unseen}
        places = [(r, s) for r in range(len(gallery.codes)) for s in range(self.styles) if (r, s) not in hidden]
        known = len(concepts())
        self.of_concepts = torch.tensor([pair for pair in places if pair[0] < known])
        self.of_others = torch.tensor([pair for pair in places if pair[0] >= known] or places)
        texts = [texts[0] for row in self.captions[:known] for texts in row]
        self.canonical = tokenize(tokenizer, texts, TEXT_LENGTH).to(device)

    def loss(self, step: int) -> Tensor:
        generator = step_generator(self.seed, step)
        places = self._draw(generator)
        rows, styles = places[:, 0], places[:, 1]
        ids = self._captions(places, generator)
        pixels = augment(self._pictures(places, generator), generator)
        with mixed_precision(self.device):
            pictures = self.module.embed_pictures(pixels)
            texts = self.module.embed_text(ids.to(self.device))
        label = (rows * self.styles + styles).to(self.device)
        same = label[:, None] == label[None]
        matched = contrastive_loss(pictures, texts, same, self.module.log_scale)
        unit = functional.normalize(pictures, dim=-1) * 11
        concept = functional.cross_entropy(self.module.concept_head(unit), rows.to(self.device), label_smoothing=0.05)
        style = functional.cross_entropy(self.module.style_head(unit), styles.to(self.device), label_smoothing=0.05)
        return matched + concept + style

    def validate(self) -> dict[str, float]:
        """Measure accuracy on held-out renderings, by the heads and by the captions' embeddings."""
        rows = torch.tensor([pair.row for pair in self.unseen])
        styles = torch.tensor([pair.style for pair in self.unseen])
        pixels = to_model(self.gallery.pictures[rows.numpy(), styles.numpy()], self.device)
        pictures = functional.normalize(self.module.embed_pictures(pixels), dim=-1)
        known = len(concepts())
        by_head = self.module.concept_head(pictures * 11)[:, :known].cpu()
        style_scores = self.module.style_head(pictures * 11).cpu()
        by_text = (pictures @ self.module.embed_text(self.canonical).T).cpu().view(len(rows), known, self.styles)
        return {
            "val_concept_top1": _top(by_head, rows, 1),
            "val_concept_top5": _top(by_head, rows, 5),
            "val_style": _top(style_scores, styles, 1),
            "val_text_top1": _top(by_text.amax(2), rows, 1),
            "val_text_top5": _top(by_text.amax(2), rows, 5),
            "val_text_style": _top(by_text.amax(1), styles, 1),
        }

    def sample(self, path: Path) -> None:
        """Write a sheet of augmented pictures, the tower's input."""
        generator = step_generator(self.seed, 0)
        pixels = augment(self._pictures(self._draw(generator), generator), generator)
        contact_sheet(to_bytes(pixels), columns=12).save(path)

    def _draw(self, generator: torch.Generator) -> Tensor:
        half = self.batch // 2
        first = torch.randint(len(self.of_concepts), (self.batch - half,), generator=generator)
        second = torch.randint(len(self.of_others), (half,), generator=generator)
        places = torch.cat([self.of_concepts[first], self.of_others[second]])
        return places[torch.randperm(len(places), generator=generator)]

    def _captions(self, places: Tensor, generator: torch.Generator) -> Tensor:
        picks = torch.rand(len(places), generator=generator).tolist()
        texts = []
        for (row, style), pick in zip(places.tolist(), picks, strict=True):
            choice = self.captions[row][style]
            texts.append(choice[int(pick * len(choice))])
        return tokenize(self.tokenizer, texts, TEXT_LENGTH)

    def _pictures(self, places: Tensor, generator: torch.Generator) -> Tensor:
        """Return originals, replaced by the autoencoder's reconstruction in two cases of five."""
        soft = (torch.rand(len(places), generator=generator) < 0.4).tolist()
        chosen = [
            (self.softened if use else self.gallery.pictures)[row, style]
            for use, (row, style) in zip(soft, places.tolist(), strict=True)
        ]
        return to_model(np.stack(chosen), self.device)


def _top(scores: Tensor, wanted: Tensor, k: int) -> float:
    """Return the share of rows whose wanted column is among the k best."""
    return float((scores.topk(k, dim=1).indices == wanted[:, None]).any(dim=1).float().mean())
