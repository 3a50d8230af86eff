"""Trains all weights of the UNet (and of the text encoder, if chosen), with prior preservation for the class."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from scumble_registry.formats.dreambooth import keep_differences, plain
from scumble_trainers.base import Pipeline, TrainingBase
from scumble_trainers.data.dataset import Example
from scumble_trainers.draws import Draw
from scumble_trainers.losses import denoising_loss
from scumble_trainers.method import Condition, TrainingMethod
from scumble_trainers.methods.dreambooth.class_pictures import class_examples
from scumble_trainers.methods.dreambooth.settings import DreamboothSettings
from scumble_trainers.progress import ProgressReport
from scumble_trainers.settings import StoredType

FOLDER = "model"


class DreamboothTraining(TrainingMethod[DreamboothSettings]):
    """Trains and saves a whole base; the registry stores it as the difference to its base."""

    name = "dreambooth"
    adapter = FOLDER

    def __init__(self, pipeline: Pipeline, settings: DreamboothSettings, base: TrainingBase) -> None:
        super().__init__(pipeline, settings, base)
        self.parts: dict[str, Any] = {"unet": pipeline.unet}
        if settings.text_encoder:
            names = ("text_encoder", "text_encoder_2")[: len(self.text.encoders)]
            self.parts |= {name: getattr(pipeline, name) for name in names}
        for part in self.parts.values():
            part.requires_grad_(requires_grad=True)

    @classmethod
    def weights_dtype(cls, settings: DreamboothSettings) -> torch.dtype:  # noqa: ARG003
        """Return fp32: small updates are lost in 16 bits."""
        return torch.float32

    @classmethod
    def further_examples(
        cls,
        base: TrainingBase,
        settings: DreamboothSettings,
        examples: Sequence[Example],  # noqa: ARG003
        out: Path,
        report: ProgressReport,
    ) -> list[Example]:
        return class_examples(base, settings, out / "class", report) if settings.class_prompts else []

    @property
    def trains_text(self) -> bool:
        return self.settings.text_encoder

    def trained(self) -> dict[str, nn.Parameter]:
        return {
            f"{part}.{name}": parameter
            for part, module in self.parts.items()
            for name, parameter in module.named_parameters()
        }

    def learning_rate(self, name: str) -> float:
        if name.startswith("text_encoder"):
            return self.settings.text_learning_rate or self.settings.learning_rate
        return self.settings.learning_rate

    def forward(self, draw: Draw) -> Tensor:
        loss = super().forward(draw)
        if not len(self.material.further):
            return loss
        return loss + self.settings.prior_weight * self._prior(draw)

    def _prior(self, draw: Draw) -> Tensor:
        """Return the mean loss on the same number of class pictures, chosen at random.

        Their latents are posterior means, so the draw's posterior noise serves as their diffusion noise.
        """
        material = self.material
        chosen = material.further[(draw.chances[:, 0] * len(material.further)).long()]
        captions, rows = material.captions, material.captions.of(chosen)
        losses = []
        for places, chunks in captions.by_length(rows):
            share, text = draw.at(places), captions.embed(self.text, rows[places], self.device, chunks)
            condition = Condition(chosen[places], text, share.chances)
            losses.append(
                denoising_loss(
                    material.schedule,
                    partial(self.predict, condition),
                    material.latents.means(chosen[places]).to(self.device),
                    share.posterior.to(self.device),
                    share.timesteps.to(self.device),
                    min_snr_gamma=self.settings.min_snr_gamma,
                )
            )
        return torch.cat(losses).mean()

    def save(self, folder: Path, dtype: StoredType) -> None:  # noqa: ARG002
        """Save in the base's own dtypes, whatever `dtype`, because only the difference to the base is stored."""
        target = folder / FOLDER
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.base.folder, target)
        for part, module in self.parts.items():
            trained = {plain(name): value.detach().cpu() for name, value in module.state_dict().items()}
            for file in sorted((target / part).glob("*.safetensors")):
                _replace(file, trained)
        if self.settings.save_delta:
            keep_differences(target, self.base.folder)


def _replace(file: Path, trained: dict[str, Tensor]) -> None:
    """Write the same file with other values."""
    with safe_open(file, framework="pt") as content:
        metadata = content.metadata()
        stored = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - it is not a mapping
    replaced = {
        name: trained[plain(name)].to(value.dtype).contiguous() if plain(name) in trained else value
        for name, value in stored.items()
    }
    file.chmod(0o644)  # the registry's copies are read-only
    save_file(replaced, file, metadata=metadata)
