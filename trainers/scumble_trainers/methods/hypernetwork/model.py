"""A network that predicts a LoRA from one picture, trained over many concepts with the LoRA of every row applied.

After HyperDreamBooth (Ruiz et al., 2307.06949): frozen auxiliary matrices, a transformer decoder over the picture's
states. Unlike there, no LoRAs are trained beforehand: the network is trained by the denoising loss alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from scumble_trainers.base import Pipeline, TrainingBase
from scumble_trainers.data.dataset import Example, hold_out
from scumble_trainers.data.vision import PictureStates, encoder_folder
from scumble_trainers.method import Condition, Material, TrainingMethod
from scumble_trainers.methods.hypernetwork.layers import RowLora, attention_layers, expand_rows
from scumble_trainers.methods.hypernetwork.network import FILE, encoder_digest, new_predictor, save_predictor
from scumble_trainers.methods.hypernetwork.refine import Refinement
from scumble_trainers.methods.hypernetwork.settings import HypernetworkSettings, concept_of
from scumble_trainers.progress import ProgressReport
from scumble_trainers.results.sampling import Samples
from scumble_trainers.settings import MOST_HELD_OUT, StoredType


class HypernetworkTraining(TrainingMethod[HypernetworkSettings]):
    """Trains the network. A row is a picture to denoise and a reference of the same concept to predict
    its LoRA from.
    """

    name = "hypernetwork"
    adapter = FILE

    partners: list[Tensor]  # for every picture, the others of its concept on its side of the split

    def __init__(self, pipeline: Pipeline, settings: HypernetworkSettings, base: TrainingBase) -> None:
        super().__init__(pipeline, settings, base)
        layers = attention_layers(self.unet)
        self.seen = PictureStates(base, None, "states", self.device)
        width = self.seen.nothing().shape[-1]
        self.predictor = new_predictor(settings, layers, width, encoder_digest(base)).to(self.device)
        self.rows = RowLora(layers, settings.scale_alpha / settings.rank)

    @classmethod
    def of(cls, settings: HypernetworkSettings) -> type[TrainingMethod[Any]]:
        return cls if settings.refine is None else Refinement

    @classmethod
    def check(cls, settings: HypernetworkSettings, base: TrainingBase, examples: Sequence[Example]) -> None:  # noqa: ARG003
        encoder_folder(base, None)

    @classmethod
    def hold_out(cls, settings: HypernetworkSettings, examples: Sequence[Example]) -> tuple[list[int], list[int]]:
        """Split by concept, so that validation measures predictions for unseen concepts."""
        concepts = list(dict.fromkeys(concept_of(example) for example in examples))
        most = max(1, MOST_HELD_OUT * len(concepts) // len(examples))
        _, held = hold_out(concepts, fraction=settings.validation, seed=settings.seed, most=most)
        apart = set(held)
        sides = [concept_of(example) in apart for example in examples]
        return [n for n, is_held in enumerate(sides) if not is_held], [n for n, is_held in enumerate(sides) if is_held]

    def begin(self, material: Material, device: torch.device, report: ProgressReport) -> None:
        super().begin(material, device, report)
        self.seen.read(material.examples, report)
        of: dict[str, list[int]] = {}
        for picture, example in enumerate(material.examples):
            of.setdefault(concept_of(example), []).append(picture)
        self.partners = [
            torch.tensor([other for other in of[concept_of(example)] if other != picture] or [picture])
            for picture, example in enumerate(material.examples)
        ]

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.predictor.named_parameters())

    def predict(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Predict with each row's own LoRA. In validation a picture is its own reference."""
        references = condition.pictures
        if condition.chances is not None:
            references = self.choose(references, condition.chances[:, 0])
        self.look(references)
        return self.denoise(condition, noisy, timesteps)

    def choose(self, pictures: Tensor, chances: Tensor) -> Tensor:
        """Choose references `(B,)` for `pictures (B,)` by `chances (B,)` in [0, 1)."""
        same = self.settings.same_reference
        return torch.tensor(
            [
                picture if chance < same else _among(self.partners[picture], (chance - same) / (1 - same))
                for picture, chance in zip(pictures.tolist(), chances.tolist(), strict=True)
            ]
        )

    def look(self, references: Tensor, copies: int = 1) -> None:
        """Predict the rows' LoRAs from `references (B,)`; the UNet's next call has `copies` × B rows."""
        coefficients = self.predictor(self.seen.of(references)).repeat(copies, 1, 1)
        self.rows.factors = expand_rows(self.predictor, coefficients)

    @torch.no_grad()
    def draw(self, samples: Samples) -> list[Image.Image]:
        """Draw prompt i with the LoRA for the i-th held-out picture (or training picture, if none is held out)."""
        material = self.material
        pictures = material.held if len(material.held) else material.trained
        chosen = pictures[torch.arange(len(samples.prompts)) % len(pictures)]
        self.look(chosen, copies=2 if samples.guidance > 1 else 1)
        return super().draw(samples)

    def save(self, folder: Path, dtype: StoredType) -> None:
        save_predictor(self.predictor, folder / FILE, dtype)


def _among(partners: Tensor, chance: float) -> int:
    return int(partners[min(int(chance * len(partners)), len(partners) - 1)])
