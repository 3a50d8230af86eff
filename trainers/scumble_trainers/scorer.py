"""Says what a picture shows and in which style: the base's vision tower with its two heads.

It learnt from real renderings only, never from generated pictures, so that it can judge those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionModelWithProjection

from scumble.errors import NotFound
from scumble_trainers.emoji.concepts import STYLES, Concept, Style, concepts

LOGIT_SCALE = 11.0  # what the heads' unit-length input is multiplied by, in training and here
HEADS_FILE = "scorer/model.safetensors"


@dataclass(frozen=True, slots=True)
class Scores:
    """Logits of n pictures: `concept (n, concepts)`, `style (n, styles)`, `embedding (n, D)` of unit length."""

    concept: Tensor
    style: Tensor
    embedding: Tensor

    def best(self, picture: int, among: Sequence[Concept] | None = None) -> tuple[Concept, Style]:
        """The most likely concept (of `among`, or of all) and style of one picture."""
        order = list(among or concepts())
        columns = [concepts().index(concept) for concept in order]
        return order[int(self.concept[picture, columns].argmax())], STYLES[int(self.style[picture].argmax())]


class Scorer:
    """Owns the vision tower and the heads; stateless after loading, safe to share between threads."""

    def __init__(self, tower: CLIPVisionModelWithProjection, concept_head: Tensor, style_head: Tensor) -> None:
        """Heads are `(classes, D + 1)`: weights, and the bias as the last column."""
        self.tower = tower.eval().requires_grad_(False)
        self.concept_head, self.style_head = concept_head.float(), style_head.float()
        self.size = int(tower.config.image_size)

    @classmethod
    def load(cls, base: Path, device: str = "cpu") -> Scorer:
        """Reads `image_encoder/` and the heads of a base's folder; NotFound where it has none."""
        if not (base / HEADS_FILE).is_file():
            raise NotFound(f"{base} has no scorer ({HEADS_FILE})", path=str(base))
        tower = CLIPVisionModelWithProjection.from_pretrained(
            base / "image_encoder", local_files_only=True, dtype=torch.float32
        )
        heads = load_file(base / HEADS_FILE)
        return cls(tower.to(device), _with_bias(heads, "concept_head"), _with_bias(heads, "style_head"))

    @torch.no_grad()
    def score(self, pictures: NDArray[np.uint8] | Sequence[Image.Image], batch: int = 64) -> Scores:
        """Scores `(n, H, W, 3)` bytes, or PIL pictures, of any size."""
        pixels = torch.stack([self._pixels(picture) for picture in pictures])
        embeddings = [self.tower(pixel_values=part.to(self.tower.device)).image_embeds for part in pixels.split(batch)]
        unit = functional.normalize(torch.cat(embeddings).float().cpu(), dim=-1)
        scaled = torch.cat([unit * LOGIT_SCALE, torch.ones(len(unit), 1)], dim=1)
        return Scores((scaled @ self.concept_head.T)[:, : len(concepts())], scaled @ self.style_head.T, unit)

    def _pixels(self, picture: NDArray[np.uint8] | Image.Image) -> Tensor:
        """`(3, S, S)` in -1…1."""
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float().div(127.5).sub(1)


def hit_rate(scores: Tensor, wanted: Sequence[int], k: int) -> float:
    """The share of rows of `scores (n, classes)` whose wanted class is among the k best."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return float((best == torch.tensor(list(wanted))[:, None]).any(dim=1).float().mean())


def _with_bias(heads: dict[str, Tensor], name: str) -> Tensor:
    return torch.cat([heads[f"{name}.weight"].float(), heads[f"{name}.bias"].float()[:, None]], dim=1).cpu()
