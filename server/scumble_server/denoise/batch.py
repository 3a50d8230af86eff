"""Images of different requests as one batch: stacked when its composition changes, then stepped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scumble_server.denoise import stacking
from scumble_server.denoise.course import Course, NoiseAhead
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
        share = torch.tensor([image.rescale for image in self.images], device=device).view(-1, 1, 1, 1)
        self._rescale_share = share if any(image.rescale for image in self.images) else None
        channels = [image.inpaint_channels for image in self.images if image.inpaint_channels is not None]
        self._channels = torch.stack(channels)[self._image_of_row] if channels else None
        self._first_steps = [image.step for image in self.images]
        self._noise = NoiseAhead(self.images, device)
        self._course: Course | None = None
        self._stacked: Stacked | None = None
        """Made by the first step, so that what fails there fails as a step does."""

    def fits(self, images: Sequence[Image]) -> bool:
        """Tell whether these are its images, each still in the phase that was stacked, and as far on as the others."""
        return (
            {id(image) for image in images} == {id(image) for image in self.images}
            and all(image.phase is phase for image, phase in zip(self.images, self._phases, strict=True))
            and len({image.step - first for image, first in zip(self.images, self._first_steps, strict=True)}) == 1
        )

    def advance(self) -> Tensor:
        """Take one step of every image: its own timestep, guidance, scheduler and adapters.

        Returns whether each new sample is finite, `(images,)` bool on the device. After the first step nothing is
        copied to the device but fresh noise, and nothing is waited for.
        """
        images, device = self.images, self._executor.device
        if self._course is None:
            self._course = Course.of(images, device)
        course, step = self._course, images[0].step - self._first_steps[0]
        sample = torch.stack([image.sample for image in images])
        history = torch.stack([image.history for image in images])
        timestep = course.timestep[step][self._image_of_row]
        scaled = (sample * course.c_in[step])[self._image_of_row]
        if self._stacked is None:
            self._stacked = stacking.stack(self._phases, device)
        inputs = self._stacked.at(scaled, timestep)
        read = scaled if self._channels is None else torch.cat([scaled, self._channels], 1)
        m = self._guide(self._executor.denoise(read, timestep, inputs))
        state = torch.cat([sample[:, None], history, m[:, None], self._noise.of_this_step()[:, None]], 1)
        following = torch.einsum("roi,richw->rochw", course.matrix[step], state)
        for i, image in enumerate(images):
            image.sample, image.history, image.estimate = following[i, 0], following[i, 1:-1], following[i, -1]
            image.step += 1
            if image.original is not None:
                image.sample = image.original.restore(image.sample, image.table.noised[image.step])
        self._noise.draw_ahead()
        return following[:, 0].isfinite().flatten(1).all(1)

    def _guide(self, output: Tensor) -> Tensor:
        """Predictions of the model rows `(rows, 4, h, w)` → of the images: the first row's, and what the others differ
        from it, as strongly as each one acts (Ho and Salimans, 2207.12598; Liu et al., 2206.01714).
        """
        first = output[self._first_row]
        difference = self._weight * (output - first[self._image_of_row])
        guided = first.index_add(0, self._image_of_row, self._guidance * difference)
        if self._rescale_share is None:
            return guided
        return _rescale(guided, first.index_add(0, self._image_of_row, difference), self._rescale_share)

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


def _rescale(guided: Tensor, prompt: Tensor, share: Tensor) -> Tensor:
    """guided and prompt `(images, 4, h, w)`, share `(images, 1, 1, 1)`. An image that asks for none stays bit for bit
    what it is.
    """
    dims = (1, 2, 3)
    rescaled = guided * (prompt.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
    return torch.where(share > 0, share * rescaled + (1 - share) * guided, guided)
