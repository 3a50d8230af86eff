"""Measures the base on 200 training captions with fixed seeds by the scorer, and the scorer on real renderings."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray

from scumble_demo.emoji.captions import captions
from scumble_demo.emoji.concepts import BASE_STYLES, STYLES, Concept, Style, base_concepts, concepts
from scumble_demo.emoji.gallery import Gallery
from scumble_demo.emoji.render import contact_sheet
from scumble_demo.pretraining.unseen import unseen_pairs
from scumble_demo.scorer import Scorer, hit_rate

STEPS, GUIDANCE = 25, 3.0
COUNT, SEED = 200, 2026
NEEDED = {"concept_top5": 0.60, "style_top1": 0.85, "real_concept_top5": 0.95, "real_style_top1": 0.95}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A caption with its concept, its style and the seed of its image."""

    text: str
    concept: Concept
    style: Style
    seed: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Shares between 0 and 1. Generated images are ranked among the trained concepts and all styles; `real_…` is the
    scorer on held-out renderings, among all concepts and styles.
    """

    concept_top1: float
    concept_top5: float
    style_top1: float
    real_concept_top1: float
    real_concept_top5: float
    real_style_top1: float
    pictures: int
    real_pictures: int

    @property
    def passed(self) -> bool:
        values = asdict(self)
        return all(values[name] >= least for name, least in NEEDED.items())


def evaluation_prompts(count: int = COUNT, seed: int = SEED) -> tuple[Prompt, ...]:
    """Return training captions: shuffled (concept, style) pairs, a random wording each, seeds 0, 1, 2, …"""
    order = np.random.default_rng(seed)
    pairs = [(concept, style) for concept in base_concepts() for style in BASE_STYLES]
    chosen = order.permutation(len(pairs))[:count]
    prompts = []
    for number, index in enumerate(chosen):
        concept, style = pairs[int(index)]
        texts = captions(concept, style)
        prompts.append(Prompt(texts[int(order.integers(len(texts)))], concept, style, number))
    return tuple(prompts)


def load_pipeline(base: Path) -> Any:
    """Load the base with diffusers, in float32."""
    pipe = StableDiffusionPipeline.from_pretrained(base, local_files_only=True, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, prompts: tuple[Prompt, ...], batch: int = 20) -> NDArray[np.uint8]:
    """Draw images `(n, H, W, 3)`; each depends on its own prompt and seed only."""
    parts = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        made = pipe(
            [prompt.text for prompt in some],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator("cpu").manual_seed(prompt.seed) for prompt in some],
            output_type="np",
        ).images
        parts.append((made * 255).round().astype(np.uint8))
    return np.concatenate(parts)


def evaluate_base(base: Path, gallery: Gallery, device: torch.device, grid: Path | None = None) -> Evaluation:
    """Measure the base; writes the first 36 images to `grid`."""
    pipe = load_pipeline(base).to(device)
    prompts = evaluation_prompts()
    pictures = generate(pipe, prompts)
    if grid:
        contact_sheet(pictures[:36], columns=6).save(grid)
    return judge(Scorer.load(base), pictures, prompts, gallery)


def judge(scorer: Scorer, pictures: NDArray[np.uint8], prompts: tuple[Prompt, ...], gallery: Gallery) -> Evaluation:
    """Compare the scorer's results with the prompts, and on real renderings with the truth."""
    scores = scorer.score(pictures)
    known = base_concepts()
    columns = [concepts().index(concept) for concept in known]
    among_known = scores.concept[:, columns]
    wanted = [known.index(prompt.concept) for prompt in prompts]
    pairs = unseen_pairs()
    real = scorer.score(gallery.pictures[[p.row for p in pairs], [p.style for p in pairs]])
    rows = [pair.row for pair in pairs]
    return Evaluation(
        concept_top1=hit_rate(among_known, wanted, 1),
        concept_top5=hit_rate(among_known, wanted, 5),
        style_top1=hit_rate(scores.style, [STYLES.index(prompt.style) for prompt in prompts], 1),
        real_concept_top1=hit_rate(real.concept, rows, 1),
        real_concept_top5=hit_rate(real.concept, rows, 5),
        real_style_top1=hit_rate(real.style, [pair.style for pair in pairs], 1),
        pictures=len(prompts),
        real_pictures=len(pairs),
    )
