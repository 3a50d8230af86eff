# ruff: noqa: ARG002, ARG003 - what only subclasses use
"""What a method is to a run: the frozen base and the trained parameters as one module that gives a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic

import torch
from PIL import Image
from torch import Tensor, nn

from scumble_trainers.base import Pipeline, TrainingBase
from scumble_trainers.data.captions import Captions, TextEncoders, TextStates
from scumble_trainers.data.dataset import Example, hold_out
from scumble_trainers.data.latents import Latents
from scumble_trainers.results.sampling import Samples, draw_samples
from scumble_trainers.settings import Settings, StoredType
from scumble_trainers.steps.draws import Draw
from scumble_trainers.steps.losses import Schedule, denoising_loss
from scumble_trainers.steps.progress import ProgressReport

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "no": torch.float32}
MOST_HELD_OUT = 64


@dataclass(frozen=True, slots=True)
class Material:
    """What a run reads: every example's latents and captions, and which of them are held out."""

    examples: Sequence[Example]
    schedule: Schedule
    latents: Latents
    captions: Captions
    framing: Tensor  # (N, 6): original height and width, crop's top and left, target height and width; SDXL's time ids
    trained: Tensor  # (N,) int64
    held: Tensor  # (M,) int64, may be empty
    further: Tensor  # (K,) int64: what `Method.further_examples` gave, in no other group; may be empty
    samples: Samples


@dataclass(frozen=True, slots=True)
class Condition:
    """What a prediction is told beside the noisy latents."""

    pictures: Tensor  # (B,) int64 on the CPU: which examples they are
    text: TextStates
    chances: Tensor | None
    """`(B, CHANCES)` in [0, 1) in training, None where the loss is measured: there nothing is dropped."""


class TrainingMethod(nn.Module, ABC, Generic[Settings]):
    """One run's model. Its forward is the loss of a part of a batch, so that accelerate can wrap all of it at once.

    A subclass puts its parameters in (from `settings.seed`), says how it predicts, and saves what it has learnt.
    """

    name: ClassVar[str]
    """As in `scumble train NAME`, and of the adapter's kind."""
    adapter: str
    """Name of the file or folder that `save` writes."""

    material: Material

    def __init__(self, pipeline: Pipeline, settings: Settings, base: TrainingBase) -> None:
        super().__init__()
        self.settings, self.base = settings, base
        self.pipeline = pipeline
        self.unet: Any = pipeline.unet
        self.text = TextEncoders(pipeline)

    @classmethod
    def weights_dtype(cls, settings: Settings) -> torch.dtype:
        """What the base is loaded in: the compute type, as frozen weights need no more."""
        return DTYPES[settings.mixed_precision]

    @classmethod
    def check(cls, settings: Settings, base: TrainingBase, examples: Sequence[Example]) -> None:
        """Raises InvalidRequest or Incompatible for what this method cannot be trained on, before any work."""

    @classmethod
    def of(cls, settings: Settings) -> type[TrainingMethod[Any]]:
        """What these settings ask for: a method may have more than one thing that it trains."""
        return cls

    @classmethod
    def hold_out(cls, settings: Settings, examples: Sequence[Example]) -> tuple[list[int], list[int]]:
        """Which examples are (trained on, held out), in order: by default pictures by lot."""
        places = range(len(examples))
        return hold_out(places, fraction=settings.validation, seed=settings.seed, most=MOST_HELD_OUT)

    @classmethod
    def further_examples(
        cls, base: TrainingBase, settings: Settings, examples: Sequence[Example], out: Path, report: ProgressReport
    ) -> list[Example]:
        """Pictures that the method makes for itself; `Material.further` says where they are."""
        return []

    @property
    def trains_text(self) -> bool:
        """Whether embeddings of captions change with the steps."""
        return False

    @property
    def trigger_words(self) -> tuple[str, ...]:
        """What a prompt must say."""
        return self.settings.trigger_words

    def begin(self, material: Material, device: torch.device, report: ProgressReport) -> None:
        """Once before the first step; a method may make what it needs of every picture."""
        self.material = material

    @abstractmethod
    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, in an order of their own."""

    def learning_rate(self, name: str) -> float:
        """At its highest, of the trained parameter `name`."""
        return self.settings.learning_rate

    def forward(self, draw: Draw) -> Tensor:
        """Mean loss over `draw`."""
        material = self.material
        rows = material.captions.choose(draw.pictures, draw.captions, draw.dropped)
        text = material.captions.embed(self.text, rows, self.device)
        return self.losses(draw, Condition(draw.pictures, text, draw.chances)).mean()

    def losses(self, draw: Draw, condition: Condition) -> Tensor:
        """`(B,)`."""
        material = self.material
        return denoising_loss(
            material.schedule,
            partial(self.predict, condition),
            material.latents.sample(draw.pictures, draw.posterior).to(self.device),
            draw.noise.to(self.device),
            draw.timesteps.to(self.device),
            min_snr_gamma=self.settings.min_snr_gamma,
        )

    def predict_measured(self, pictures: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """With the pictures' first captions; for the validation loss."""
        captions = self.material.captions
        text = captions.embed(self.text, captions.of(pictures), self.device)
        return self.predict(Condition(pictures, text, None), noisy, timesteps)

    def predict(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The UNet's prediction, `(B, C, h, w)`."""
        return self.denoise(condition, noisy, timesteps)

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor, **more: Any) -> Tensor:
        """One evaluation of the UNet; `more` are further arguments of its own."""
        more["added_cond_kwargs"] = self.added(condition) | more.get("added_cond_kwargs", {})
        dtype = self.unet.dtype
        result: Tensor = self.unet(noisy.to(dtype), timesteps, condition.text.states.to(dtype), **more).sample
        return result

    def added(self, condition: Condition) -> dict[str, Any]:
        """SDXL's pooled text and time ids; nothing for the others."""
        if condition.text.pooled is None:
            return {}
        ids = self.material.framing[condition.pictures].to(self.device)
        return {"text_embeds": condition.text.pooled.to(self.unet.dtype), "time_ids": ids}

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Within, the model is the base alone, if it is not that anyway before the first step."""
        yield

    def draw(self, samples: Samples) -> list[Image.Image]:
        """One picture per prompt at the present weights."""
        return draw_samples(self.pipeline, samples)

    @abstractmethod
    def save(self, folder: Path, dtype: StoredType) -> None:
        """Writes `folder/ADAPTER`, the adapter as it stands."""

    @property
    def device(self) -> torch.device:
        device: torch.device = self.unet.device
        return device

    def lay_out(self) -> None:
        """Weights in memory channels last: convolutions of small nets on CPUs are a quarter faster."""
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def enable_gradient_checkpointing(self) -> None:
        """Less memory for activations, more time."""
        self.unet.enable_gradient_checkpointing()


def half(state: dict[str, Tensor], dtype: StoredType) -> dict[str, Tensor]:
    """On the CPU in the type that files are saved in."""
    return {name: value.detach().to("cpu", DTYPES[dtype]).contiguous() for name, value in state.items()}


def in_fp32(modules: Sequence[nn.Module]) -> None:
    """Trained parameters are fp32 whatever the frozen weights are kept in."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
