"""The contract of a training method: frozen base and trained parameters as one module whose forward is the loss."""

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
from scumble_trainers.draws import Draw
from scumble_trainers.losses import Schedule, denoising_loss
from scumble_trainers.progress import ProgressReport
from scumble_trainers.results.sampling import Samples, draw_samples
from scumble_trainers.settings import MOST_HELD_OUT, Settings, StoredType

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "no": torch.float32}


@dataclass(frozen=True, slots=True)
class Material:
    """The data of a run: every example's latents and captions, and which examples are held out."""

    examples: Sequence[Example]
    schedule: Schedule
    latents: Latents
    captions: Captions
    framing: Tensor  # (N, 6): original height and width, crop's top and left, target height and width; SDXL's time ids
    trained: Tensor  # (N,) int64
    held: Tensor  # (M,) int64, may be empty
    further: Tensor  # (K,) int64: the examples of `further_examples`, in no other group; may be empty
    samples: Samples


@dataclass(frozen=True, slots=True)
class Condition:
    """The conditioning of a prediction, besides the noisy latents."""

    pictures: Tensor  # (B,) int64 on the CPU: indices of the examples
    text: TextStates
    chances: Tensor | None
    """`(B, CHANCES)` in [0, 1) in training; None in validation, where nothing is dropped."""


class TrainingMethod(nn.Module, ABC, Generic[Settings]):
    """The model of one run. Its forward is the loss of a part of a batch, so that accelerate can wrap it as one module.

    A subclass adds its parameters (initialised from `settings.seed`), predicts with them, and saves them.
    """

    name: ClassVar[str]
    """Name in `scumble train NAME`, and kind of the adapter."""
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
        """Return the dtype that the base is loaded in: the compute dtype, which is enough for frozen weights."""
        return DTYPES[settings.mixed_precision]

    @classmethod
    def check(cls, settings: Settings, base: TrainingBase, examples: Sequence[Example]) -> None:
        """Check what `settings.check_examples` cannot, such as the base, before any work. Raises InvalidRequest or
        Incompatible.
        """

    @classmethod
    def of(cls, settings: Settings) -> type[TrainingMethod[Any]]:  # noqa: ARG003 - for overrides
        """Return the class that trains with these settings; a method may have several."""
        return cls

    @classmethod
    def hold_out(cls, settings: Settings, examples: Sequence[Example]) -> tuple[list[int], list[int]]:
        """Split examples into (trained on, held out); by default pictures are held out at random."""
        places = range(len(examples))
        return hold_out(places, fraction=settings.validation, seed=settings.seed, most=MOST_HELD_OUT)

    @classmethod
    def further_examples(
        cls, base: TrainingBase, settings: Settings, examples: Sequence[Example], out: Path, report: ProgressReport
    ) -> list[Example]:
        """Return pictures that the method draws itself; `Material.further` has their indices."""
        del base, settings, examples, out, report  # for overrides
        return []

    @property
    def trains_text(self) -> bool:
        """Whether embeddings of captions change during training."""
        return False

    @property
    def trigger_words(self) -> tuple[str, ...]:
        """Words that a prompt needs to use the adapter."""
        return self.settings.trigger_words

    def begin(self, material: Material, device: torch.device, report: ProgressReport) -> None:  # noqa: ARG002 - for overrides
        """Called once before the first step; a method may compute here what it needs of every picture."""
        self.material = material

    @abstractmethod
    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name, in a fixed order."""

    def learning_rate(self, name: str) -> float:  # noqa: ARG002 - for overrides
        """Return the peak learning rate of the trained parameter `name`."""
        return self.settings.learning_rate

    def forward(self, draw: Draw) -> Tensor:
        """Return the mean loss over `draw`.

        A caption that is dropped leaves as many empty chunks, as a negative prompt has beside a long prompt.
        """
        captions = self.material.captions
        chosen = captions.choose(draw.pictures, draw.captions)
        rows = torch.where(draw.dropped, 0, chosen)
        losses = []
        for places, chunks in captions.by_length(chosen):
            share, text = draw.at(places), captions.embed(self.text, rows[places], self.device, chunks)
            losses.append(self.losses(share, Condition(share.pictures, text, share.chances)))
        return torch.cat(losses).mean()

    def losses(self, draw: Draw, condition: Condition) -> Tensor:
        """Return the loss of each picture, `(B,)`."""
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
        """Predict with the pictures' first captions, for the validation loss."""
        captions = self.material.captions
        rows = captions.of(pictures)
        predicted = torch.empty_like(noisy)
        for places, chunks in captions.by_length(rows):
            text = captions.embed(self.text, rows[places], self.device, chunks)
            own = places.to(noisy.device)
            prediction = self.predict(Condition(pictures[places], text, None), noisy[own], timesteps[own])
            predicted[own] = prediction.to(predicted.dtype)
        return predicted

    def predict(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Return the UNet's prediction, `(B, C, h, w)`."""
        return self.denoise(condition, noisy, timesteps)

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor, **more: Any) -> Tensor:
        """Evaluate the UNet; `more` are passed to it."""
        more["added_cond_kwargs"] = self.added(condition) | more.get("added_cond_kwargs", {})
        dtype = self.unet.dtype
        result: Tensor = self.unet(noisy.to(dtype), timesteps, condition.text.states.to(dtype), **more).sample
        return result

    def added(self, condition: Condition) -> dict[str, Any]:
        """Return SDXL's pooled text and time ids as arguments; none for other families."""
        if condition.text.pooled is None:
            return {}
        ids = self.material.framing[condition.pictures].to(self.device)
        return {"text_embeds": condition.text.pooled.to(self.unet.dtype), "time_ids": ids}

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Within the block the model acts as the base, for methods whose initial parameters change it."""
        yield

    def draw(self, samples: Samples) -> list[Image.Image]:
        """Draw one image per prompt with the current weights."""
        return draw_samples(self.pipeline, samples)

    @abstractmethod
    def save(self, folder: Path, dtype: StoredType) -> None:
        """Write the adapter, as it is now, to `folder/ADAPTER`."""

    @property
    def device(self) -> torch.device:
        device: torch.device = self.unet.device
        return device

    def lay_out(self) -> None:
        """Use the channels-last memory format: convolutions of small nets on CPUs are a quarter faster."""
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def enable_gradient_checkpointing(self) -> None:
        """Enable gradient checkpointing: less memory for activations, more time."""
        self.unet.enable_gradient_checkpointing()


def half(state: dict[str, Tensor], dtype: StoredType) -> dict[str, Tensor]:
    """Return tensors on the CPU in the dtype of files."""
    return {name: value.detach().to("cpu", DTYPES[dtype]).contiguous() for name, value in state.items()}


def in_fp32(modules: Sequence[nn.Module]) -> None:
    """Convert trained parameters to fp32, whatever the dtype of the frozen weights."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
