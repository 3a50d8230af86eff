"""All randomness of a training step, as functions of (seed, step).

There is no state between steps, so a resumed run draws the same numbers, and so does a run with another number of
processes: a step's batch is drawn whole and then split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHANCES = 2


@dataclass(frozen=True, slots=True)
class Draw:
    """The random draws of one step's batch of B pictures, on the CPU."""

    pictures: Tensor  # (B,) int64: indices of the examples
    timesteps: Tensor  # (B,) int64 in [0, schedule length)
    noise: Tensor  # (B, C, h, w): diffusion noise
    posterior: Tensor  # (B, C, h, w): noise of the autoencoder's posterior
    captions: Tensor  # (B,) float in [0, 1): chooses one of the picture's captions
    dropped: Tensor  # (B,) bool: train without a caption
    chances: Tensor  # (B, CHANCES) float in [0, 1): for random choices of the method

    def part(self, index: int, parts: int) -> Draw:
        """Return the `index`-th of `parts` equal shares: every `parts`-th picture, so that timesteps stay spread."""
        return self._of(slice(index, None, parts))

    def at(self, places: Tensor) -> Draw:
        """Return the draws at `places (b,)` of the batch."""
        return self._of(places)

    def _of(self, share: slice | Tensor) -> Draw:
        return Draw(
            self.pictures[share],
            self.timesteps[share],
            self.noise[share],
            self.posterior[share],
            self.captions[share],
            self.dropped[share],
            self.chances[share],
        )


def generator(seed: int, *stream: str | int) -> torch.Generator:
    """Return a separate CPU generator for every (seed, stream…)."""
    name = "/".join(str(part) for part in (seed, *stream))
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return torch.Generator("cpu").manual_seed(number & (2**63 - 1))


def draw_step(
    seed: int,
    step: int,
    *,
    pictures: Tensor,
    latent_shape: tuple[int, int, int],
    train_timesteps: int,
    caption_dropout: float,
    stream: str = "step",
) -> Draw:
    """Draw everything random for the batch of `step` with `pictures (B,)` of one size.

    Timesteps are stratified: one from each of B equal parts of the schedule, which is uniform
    over many steps and gives the gradient less variance.
    """
    batch = len(pictures)
    source = generator(seed, stream, step)
    shape = (batch, *latent_shape)
    parts = (torch.randperm(batch, generator=source) + torch.rand(batch, generator=source)) / batch
    return Draw(
        pictures=pictures,
        timesteps=(parts * train_timesteps).long().clamp_(max=train_timesteps - 1),
        noise=torch.randn(shape, generator=source),
        posterior=torch.randn(shape, generator=source),
        captions=torch.rand(batch, generator=source),
        dropped=torch.rand(batch, generator=source) < caption_dropout,
        chances=torch.rand((batch, CHANCES), generator=source),
    )


def pictures_of_step(seed: int, step: int, batch: int, groups: Sequence[Tensor], stream: str = "epoch") -> Tensor:
    """Return `(batch,)` pictures of one of `groups`, as a batch has one size only.

    In a round each group occurs as often as it takes to show its pictures once, in random order.
    """
    turns = torch.cat([torch.full((-(-len(group) // batch),), index) for index, group in enumerate(groups)])
    turn = step // len(turns)
    order = turns[torch.randperm(len(turns), generator=generator(seed, stream, "round", turn))]
    index = int(order[step % len(turns)])
    before = turn * int((turns == index).sum()) + int((order[: step % len(turns)] == index).sum())
    group = groups[index]
    return group[picture_order(seed, before * batch, batch, len(group), f"{stream}/{index}" if index else stream)]


def picture_order(seed: int, first: int, count: int, pictures: int, stream: str = "epoch") -> Tensor:
    """Return the `(count,)` indices at positions first … first + count - 1 of the endless shuffled sequence."""
    epochs = range(first // pictures, (first + count - 1) // pictures + 1)
    orders = [torch.randperm(pictures, generator=generator(seed, stream, epoch)) for epoch in epochs]
    start = first - epochs.start * pictures
    return torch.cat(orders)[start : start + count]
