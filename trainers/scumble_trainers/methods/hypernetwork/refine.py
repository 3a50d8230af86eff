"""Trains a predicted LoRA for a few more steps on pictures of its concept.

HyperDreamBooth (2307.06949) calls it rank-relaxed fast fine-tuning: new rank columns are trained beside the predicted
ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from PIL import Image, UnidentifiedImageError
from torch import nn

from scumble.errors import Incompatible, InvalidRequest
from scumble_build.graphs.predictor import PredictedFactors, Predictor
from scumble_registry import Registry, default_home
from scumble_registry.formats.hypernetwork import read_record, recognises
from scumble_registry.formats.hypernetwork.predictor import PredictorRecord
from scumble_registry.formats.source import Source
from scumble_trainers.base import Pipeline, TrainingBase
from scumble_trainers.data.dataset import Example, load_picture
from scumble_trainers.data.vision import PictureStates, encoder_folder
from scumble_trainers.method import Material, TrainingMethod, in_fp32
from scumble_trainers.methods.hypernetwork.layers import PREFIX
from scumble_trainers.methods.hypernetwork.network import encoder_digest
from scumble_trainers.methods.hypernetwork.settings import HypernetworkSettings
from scumble_trainers.methods.lora.files import ADAPTER, FILE, save_factors
from scumble_trainers.progress import ProgressReport
from scumble_trainers.settings import StoredType


class Refinement(TrainingMethod[HypernetworkSettings]):
    """Trains a LoRA of `rank` columns: the first are the predicted factors at scale 1, the others a new LoRA's."""

    name = "hypernetwork"
    adapter = FILE

    def __init__(self, pipeline: Pipeline, settings: HypernetworkSettings, base: TrainingBase) -> None:
        super().__init__(pipeline, settings, base)
        self.record = _find_record(settings)
        rank = max(settings.rank, self.record.config.rank)
        names = [target.removeprefix(PREFIX) for target in self.record.config.targets]
        self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
        in_fp32([self.unet])

    @classmethod
    def check(cls, settings: HypernetworkSettings, base: TrainingBase, examples: Sequence[Example]) -> None:  # noqa: ARG003
        encoder_folder(base, None)
        config = _find_record(settings).config
        if config.condition != "image":
            raise InvalidRequest(f"--from {settings.source} predicts from text, not from a picture", field="from")
        if config.encoder not in (None, encoder_digest(base)):
            raise Incompatible(
                f"--from {settings.source} was trained with another image encoder than {base.folder} has: "
                "use the base that it was trained for",
                field="from",
            )
        if not all(target.startswith(PREFIX) for target in config.targets):
            raise InvalidRequest(f"--from {settings.source} predicts for more than the UNet", field="from")
        if settings.reference is not None:
            _open(settings.reference)

    def begin(self, material: Material, device: torch.device, report: ProgressReport) -> None:
        super().begin(material, device, report)
        first = material.examples[0]
        reference = _open(self.settings.reference) if self.settings.reference else load_picture(first.path, first.size)
        predictor = Predictor.of(self.record).to(device)
        seen = PictureStates(self.base, None, "states", device)
        self._fill(predictor.predict(seen.look([np.asarray(reference)])))

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.unet.named_parameters() if value.requires_grad}

    @contextmanager
    def as_base(self) -> Iterator[None]:
        self.unet.disable_adapters()
        try:
            yield
        finally:
            self.unet.enable_adapters()

    def save(self, folder: Path, dtype: StoredType) -> None:
        save_factors(self.pipeline, folder, dtype)

    @torch.no_grad()
    def _fill(self, factors: PredictedFactors) -> None:
        for target, (down, up, alpha) in factors.items():
            layer: Any = self.unet.get_submodule(target.removeprefix(PREFIX))
            rank = len(down)
            layer.lora_A[ADAPTER].weight[:rank] = down
            layer.lora_B[ADAPTER].weight[:, :rank] = up * (alpha / rank)


def _find_record(settings: HypernetworkSettings) -> PredictorRecord:
    """Read the record of `--from`: a file, or a version in the registry."""
    if settings.source is None:
        raise InvalidRequest("--refine needs a hypernetwork: --from FILE or --from ns/name@7", field="from")
    path = Path(settings.source)
    if not path.exists():
        with Registry.open(default_home()) as registry:
            path = registry.materialise(registry.resolve(settings.source))
    source = Source.scan(path)
    record = read_record(*source.weights().values() or (path,)) if recognises(source) else None
    if not isinstance(record, PredictorRecord):
        raise InvalidRequest(f"--from {settings.source} is not a hypernetwork that predicts a LoRA", field="from")
    return record


def _open(file: Path) -> Image.Image:
    try:
        with Image.open(file) as opened:
            size = opened.size
        return load_picture(file, size)
    except (OSError, UnidentifiedImageError) as error:
        raise InvalidRequest(f"--reference {file} cannot be read as a picture: {error}", field="reference") from error
