"""The trainers' side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scumble_trainers.base import Pipeline, TrainingBase
from scumble_trainers.method import Condition, TrainingMethod, half
from scumble_trainers.methods import MethodEntry
from scumble_trainers.settings import StoredType, TrainSettings
from support.steering.format import KIND, TENSOR


class SteeringTraining(TrainingMethod[TrainSettings]):
    name = KIND
    adapter = "steering.safetensors"

    def __init__(self, pipeline: Pipeline, settings: TrainSettings, base: TrainingBase) -> None:
        super().__init__(pipeline, settings, base)
        self.vector = nn.Parameter(torch.zeros(self.unet.config.cross_attention_dim, device=self.device))

    def trained(self) -> dict[str, nn.Parameter]:
        return {"vector": self.vector}

    def predict(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        steered = replace(condition.text, states=condition.text.states + self.vector)
        return self.denoise(replace(condition, text=steered), noisy, timesteps)

    def save(self, folder: Path, dtype: StoredType) -> None:
        save_file(half({TENSOR: self.vector}, dtype), folder / self.adapter)


ENTRY = MethodEntry(KIND, "support.steering.training:SteeringTraining", TrainSettings, "Train a steering vector.")
