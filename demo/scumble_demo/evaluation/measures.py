"""Measures of pictures, which are `(H, W, 3)` bytes or PIL images, all of one size in a list."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from scumble_build.control_maps import Canny
from scumble_demo.emoji.concepts import STYLES, Concept, concepts
from scumble_demo.scorer import Scorer, hit_rate

Picture = Image.Image
TOLERANCE = 1  # largest distance of matching edges, in pixels


def style_rate(scorer: Scorer, pictures: Sequence[Picture], style: str) -> float:
    """Return the share of pictures whose style is ranked first among all styles."""
    wanted = [known.name for known in STYLES].index(style)
    return hit_rate(scorer.score(pictures).style, [wanted] * len(pictures), 1)


def concept_rate(scorer: Scorer, pictures: Sequence[Picture], wanted: Sequence[Concept]) -> float:
    """Return the share of pictures whose concept is ranked first among all concepts."""
    order = concepts()
    return hit_rate(scorer.score(pictures).concept, [order.index(concept) for concept in wanted], 1)


def similarity(scorer: Scorer, pictures: Sequence[Picture], references: Sequence[Picture]) -> float:
    """Return the mean cosine between the scorer's logits over all concepts for `pictures` and for `references`."""
    return float((_thoughts(scorer, pictures) @ _thoughts(scorer, references).T).mean())


def first_rate(scorer: Scorer, pictures: Sequence[Picture], references: Sequence[Picture]) -> float:
    """Return the share of pictures i whose most similar reference is the i-th, by concept and colours."""
    alike = _thoughts(scorer, pictures) @ _thoughts(scorer, references).T
    alike += _colours(scorer, pictures) @ _colours(scorer, references).T
    return float((alike.argmax(dim=1) == torch.arange(len(pictures))).float().mean())


def edge_f1(pictures: Sequence[Picture], edges: Sequence[NDArray[np.uint8]]) -> float:
    """Return the mean F1 between the Canny edges of each picture and the given edge map `(H, W, 3)`."""
    pairs = zip(pictures, edges, strict=True)
    return float(
        np.mean([_f1(Canny().apply(np.array(picture))[..., 0] > 0, edge[..., 0] > 0) for picture, edge in pairs])
    )


def _f1(edges: NDArray[np.bool_], wanted: NDArray[np.bool_]) -> float:
    """Return F1; an edge matches if the other map has one at most TOLERANCE pixels away."""
    if not edges.any() or not wanted.any():
        return 0.0
    precision, recall = float(_near(wanted)[edges].mean()), float(_near(edges)[wanted].mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _near(edges: NDArray[np.bool_]) -> NDArray[np.bool_]:
    kernel = np.ones((2 * TOLERANCE + 1, 2 * TOLERANCE + 1), np.uint8)
    return np.asarray(cv2.dilate(edges.astype(np.uint8), kernel)) > 0


def _thoughts(scorer: Scorer, pictures: Sequence[Picture]) -> Tensor:
    """Return logits over concepts `(n, concepts)`, normalised to unit length."""
    logits = scorer.score(pictures).concept
    return functional.normalize(logits - logits.mean(dim=1, keepdim=True), dim=1)


def _colours(scorer: Scorer, pictures: Sequence[Picture]) -> Tensor:
    """Return colour histograms `(n, bins)`, normalised to unit length."""
    return functional.normalize(scorer.palettes(pictures), dim=1)
