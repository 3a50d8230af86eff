"""Classifies a picture's concept (by a small convolutional network) and style (by colours, or a stored rendering).

It is trained on real renderings only, never on generated images, so that it can score those. It is independent of the
base's vision tower, which is trained with the text encoder and less accurate.
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
from torch import Tensor, nn
from torch.nn import functional

from scumble.errors import NotFound
from scumble_demo.emoji.concepts import STYLES, Concept, Style, concepts
from scumble_registry.formats.safetensors_header import read_header

SIZE = 128
NEAR = 0.005  # mean squared distance of thumbnails; one real rendering in 100 is this close to any other
_LEVELS = 8  # levels of each colour channel in the palette
_THUMB = 16  # side of a thumbnail in pixels
SCORER_FILE = "scorer/model.safetensors"


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.first(functional.relu(self.norm1(x)))
        result: Tensor = x + self.second(functional.relu(self.norm2(inner)))
        return result


class ScorerNet(nn.Module):
    """Classifies concepts by shape and styles by colour; `pixels (n, 3, 128, 128)` are in -1…1 throughout.

    Concepts are classified from small patches and a coarse 4×4 map, styles from the palette. A picture that nearly
    equals a stored rendering gets that one's style, because generated images often have a style's shapes with slightly
    wrong colours.
    """

    templates: Tensor
    template_styles: Tensor

    def __init__(
        self, classes: int, styles: int, templates: int = 0, widths: tuple[int, int, int, int] = (16, 32, 64, 128)
    ) -> None:
        super().__init__()
        a, b, c, d = widths
        self.near = nn.Sequential(
            nn.Conv2d(3, a, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(a, b, 3, stride=2, padding=1),
            _Residual(b),
            nn.Conv2d(b, c, 3, stride=2, padding=1),
            _Residual(c),
        )
        self.far = nn.Sequential(nn.Conv2d(c, d, 3, stride=2, padding=1), _Residual(d), nn.GroupNorm(8, d), nn.ReLU())
        self.near_norm = nn.GroupNorm(8, c)
        self.narrow = nn.Conv2d(d, d // 4, 1)
        self.concept_head = nn.Linear(c + d + 16 * (d // 4), classes)
        self.style_head = nn.Sequential(nn.Linear(_LEVELS**3, 64), nn.ReLU(), nn.Linear(64, styles))
        self.register_buffer("templates", torch.zeros(templates, 3 * _THUMB**2, dtype=torch.uint8))
        self.register_buffer("template_styles", torch.zeros(templates, dtype=torch.long))

    def concept(self, pixels: Tensor) -> Tensor:
        """Return logits over concepts `(n, classes)`."""
        near = self.near(pixels)
        far = self.far(near)
        local = functional.relu(self.near_norm(near)).mean(dim=(2, 3))
        places = functional.adaptive_avg_pool2d(self.narrow(far), 4).flatten(1)
        logits: Tensor = self.concept_head(torch.cat([local, far.mean(dim=(2, 3)), places], dim=1).float())
        return logits

    def style_by_palette(self, pixels: Tensor) -> Tensor:
        """Return logits over styles `(n, styles)`, from the palette."""
        logits: Tensor = self.style_head(palette(pixels))
        return logits

    def style(self, pixels: Tensor) -> Tensor:
        """Return logits over styles `(n, styles)`; the style of a nearly equal stored rendering is ranked first."""
        logits = self.style_by_palette(pixels)
        if len(self.templates) == 0:
            return logits
        distance = torch.cdist(thumbnails(pixels), self.templates.float() / 255).square() / self.templates.shape[1]
        closest, which = distance.min(dim=1)
        wins = functional.one_hot(self.template_styles[which], logits.shape[1]) * (closest < NEAR)[:, None]
        return logits + wins * (logits.amax(dim=1) - logits.amin(dim=1) + 1)[:, None]

    def forget(self) -> None:
        """Drop the stored renderings, to measure the classifier alone."""
        self.remember(torch.zeros(0, 3, SIZE, SIZE), torch.zeros(0, dtype=torch.long))

    def remember(self, pixels: Tensor, styles: Tensor) -> None:
        """Store renderings `(m, 3, H, W)` of known `styles (m,)` as thumbnails."""
        self.templates = (thumbnails(pixels) * 255).round().byte()
        self.template_styles = styles.clone()


def thumbnails(pixels: Tensor) -> Tensor:
    """Return thumbnails `(n, 3·16·16)` in 0…1."""
    return functional.adaptive_avg_pool2d(pixels.float(), _THUMB).flatten(1).add(1).div(2)


def palette(pixels: Tensor) -> Tensor:
    """Return the frequency of 8×8×8 colours in `pixels (n, 3, H, W)`: `(n, 512)`, square roots, times ten.

    Every set has its own palette, which distinguishes styles better than shapes.
    """
    levels = ((pixels.detach().float() + 1) * (_LEVELS / 2)).long().clamp(0, _LEVELS - 1).flatten(2)
    bins = (levels[:, 0] * _LEVELS + levels[:, 1]) * _LEVELS + levels[:, 2]
    counts = torch.zeros(len(pixels), _LEVELS**3, device=pixels.device)
    counts.scatter_add_(1, bins, torch.ones_like(bins, dtype=counts.dtype))
    return (counts / bins.shape[1]).sqrt() * 10


@dataclass(frozen=True, slots=True)
class Scores:
    """Logits of n pictures: `concept (n, concepts)`, `style (n, styles)`."""

    concept: Tensor
    style: Tensor

    def best(self, picture: int, among: Sequence[Concept] | None = None) -> tuple[Concept, Style]:
        """Return the most likely concept (of `among`, or of all) and style of one picture."""
        order = list(among or concepts())
        columns = [concepts().index(concept) for concept in order]
        return order[int(self.concept[picture, columns].argmax())], STYLES[int(self.style[picture].argmax())]


class Scorer:
    """Owns the network. Stateless after loading; any thread may call it."""

    def __init__(self, net: ScorerNet, device: str = "cpu") -> None:
        self.net, self.device = net.to(device).eval().requires_grad_(False), device

    @classmethod
    def load(cls, base: Path, device: str = "cpu") -> Scorer:
        """Load `scorer/` of a base's folder. Raises NotFound if it has none."""
        if not (base / SCORER_FILE).is_file():
            raise NotFound(f"{base} has no scorer ({SCORER_FILE})", path=str(base))
        read_header(base / SCORER_FILE, SCORER_FILE)  # with limits
        weights = load_file(base / SCORER_FILE)
        net = ScorerNet(len(weights["concept_head.bias"]), len(weights["style_head.2.bias"]), len(weights["templates"]))
        net.load_state_dict(weights)
        return cls(net, device)

    @torch.no_grad()
    def score(self, pictures: NDArray[np.uint8] | Sequence[Image.Image], batch: int = 64) -> Scores:
        """Score `(n, H, W, 3)` bytes, or PIL images, of any size."""
        pixels = torch.stack([_pixels(picture) for picture in pictures])
        parts = [part.to(self.device) for part in pixels.split(batch)]
        concept = torch.cat([self.net.concept(part).cpu() for part in parts])
        return Scores(concept, torch.cat([self.net.style(part).cpu() for part in parts]))

    def palettes(self, pictures: NDArray[np.uint8] | Sequence[Image.Image]) -> Tensor:
        """Return colour frequencies `(n, bins)`, the input of the style classifier."""
        return palette(torch.stack([_pixels(picture) for picture in pictures]))


def _pixels(picture: NDArray[np.uint8] | Image.Image) -> Tensor:
    """Convert a picture to `(3, SIZE, SIZE)` in -1…1."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float().div(127.5).sub(1)


def hit_rate(scores: Tensor, wanted: Sequence[int], k: int) -> float:
    """Return the share of rows of `scores (n, classes)` whose wanted class is among the k best."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    hits = (best == torch.tensor(list(wanted))[:, None]).any(dim=1)
    return int(hits.sum()) / len(hits)
