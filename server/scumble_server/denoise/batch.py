"""Images of different requests as one batch: stacked when its composition changes, then stepped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scumble_server.denoise import stacking
from scumble_server.denoise.image import Image
from scumble_server.denoise.stacking import Stacked


class Batch:
    """A fixed composition of images of one group, each in one phase. Used by the loop's thread alone, while it fits.

    An image is one model row, or its negative prompt's and then one for each prompt that acts against it; they share
    its factors. Images with factors come first, because a graph computes factors for the first `m` model rows only.
    """

    def __init__(self, images: Sequence[Image]) -> None:
        self.images = sorted(images, key=_by_factors)
        self._phases = [image.phase for image in self.images]
        self._executor = self._phases[0].executor
        device = self._executor.device
        counts = [phase.rows for phase in self._phases]
        starts = torch.tensor([0, *counts]).cumsum(0)[:-1]
        self._image_of_row = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device)
        self._first_row = starts.to(device)
        weights = [
            weight for image, count in zip(self.images, counts, strict=True) for weight in _prompt_weights(image, count)
        ]
        self._weight = torch.tensor(weights, device=device).view(-1, 1, 1, 1)
        guidance = [image.guidance for image, count in zip(self.images, counts, strict=True) for _ in range(count)]
        self._guidance = torch.tensor(guidance, device=device).view(-1, 1, 1, 1)
        self._stacked: Stacked | None = None
        """Made by the first step, so that what fails there fails as a step does."""

    def fits(self, images: Sequence[Image]) -> bool:
        """Tell whether these are its images, each still in the phase that was stacked."""
        return {id(image) for image in images} == {id(image) for image in self.images} and all(
            image.phase is phase for image, phase in zip(self.images, self._phases, strict=True)
        )

    def advance(self) -> None:
        """Take one step of every image: its own timestep, guidance, scheduler and adapters."""
        images, device = self.images, self._executor.device
        sample = torch.stack([image.sample for image in images])
        history = torch.stack([image.history for image in images])
        timestep = torch.stack([image.table.timestep[image.step] for image in images]).to(device)[self._image_of_row]
        c_in = torch.stack([image.table.c_in[image.step] for image in images]).to(device).view(-1, 1, 1, 1)
        matrix = torch.stack([image.table.matrix[image.step] for image in images]).to(device)
        scaled = (sample * c_in)[self._image_of_row]
        if self._stacked is None:
            self._stacked = stacking.stack(self._phases, device)
        inputs = self._stacked.at(scaled, timestep)
        output = self._executor.denoise(self._with_inpaint_channels(scaled), timestep, inputs)
        m = self._guide(output)
        state = torch.cat([sample[:, None], history, m[:, None], self._noise()[:, None]], 1)
        following = torch.einsum("roi,richw->rochw", matrix, state)
        for i, image in enumerate(images):
            image.sample, image.history, image.estimate = following[i, 0], following[i, 1:-1], following[i, -1]
            image.step += 1
            if image.original is not None:
                image.sample = image.original.restore(image.sample, image.table.noised[image.step])

    def _noise(self) -> Tensor:
        """Draw `(images, 4, h, w)` for the images whose scheduler draws in this step, zero for the others."""
        drawn = [
            image.noise.of_step(image.step) if image.table.draws[image.step] else torch.zeros(image.sample.shape)
            for image in self.images
        ]
        return torch.stack(drawn).to(self._executor.device)

    def _with_inpaint_channels(self, scaled: Tensor) -> Tensor:
        """Add what a UNet for inpainting reads. All images of a batch are of one base: all have it or none."""
        channels = [image.inpaint_channels for image in self.images if image.inpaint_channels is not None]
        return torch.cat([scaled, torch.stack(channels)[self._image_of_row]], 1) if channels else scaled

    def _guide(self, output: Tensor) -> Tensor:
        """Predictions of the model rows `(rows, 4, h, w)` → of the images: the first row's, and what the others differ
        from it, as strongly as each one acts (Ho and Salimans, 2207.12598; Liu et al., 2206.01714).
        """
        first = output[self._first_row]
        difference = self._weight * (output - first[self._image_of_row])
        guided = first.index_add(0, self._image_of_row, self._guidance * difference)
        if not any(image.rescale for image in self.images):
            return guided
        return self._rescale(guided, first.index_add(0, self._image_of_row, difference))

    def _rescale(self, guided: Tensor, prompt: Tensor) -> Tensor:
        """Both `(images, 4, h, w)`. An image that asks for none stays bit for bit what it is."""
        share = torch.tensor([image.rescale for image in self.images], device=guided.device).view(-1, 1, 1, 1)
        dims = (1, 2, 3)
        rescaled = guided * (prompt.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
        return torch.where(share > 0, share * rescaled + (1 - share) * guided, guided)

    def mixed(self) -> bool:
        """Tell whether images with different adapters share this batch."""
        return len({image.conditioning.adapters for image in self.images}) > 1

    @property
    def device(self) -> str:
        return self._executor.device

    @property
    def model_rows(self) -> int:
        return len(self._image_of_row)


def _by_factors(image: Image) -> tuple[bool, int]:
    """The order of images in a batch: those with factors first, equal bound sets side by side."""
    factors = image.phase.factors
    return factors is None, id(factors.bound) if factors is not None else 0


def _prompt_weights(image: Image, count: int) -> list[float]:
    """The weights of an image's model rows; the first one's does not matter, for it does not differ from itself."""
    return [0.0] if count == 1 else [0.0, *image.conditioning.prompt_weights]
