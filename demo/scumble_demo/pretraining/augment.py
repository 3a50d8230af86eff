"""Augmentation of the vision tower's training pictures, so that it also works on generated images."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def augment(
    pixels: Tensor,
    generator: torch.Generator,
    strength: float = 1.0,
    colour: float | None = None,
    shrink: float = 0.0,
) -> Tensor:
    """Rotate, scale, shift, mirror, recolour, blur and add noise to `pixels (n, 3, H, W)` in -1…1.

    The background is white, and so is what is shifted in. `colour` is the strength of recolouring if it differs (styles
    differ by colour); `shrink` allows smaller sizes, by up to that much in logarithm.
    """
    moved = _move(pixels, generator, strength, shrink)
    coloured = _recolour(moved, generator, strength if colour is None else colour)
    return _soften(coloured, generator, strength).clamp(-1, 1)


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def _move(pixels: Tensor, generator: torch.Generator, strength: float, shrink: float = 0.0) -> Tensor:
    n = len(pixels)
    angle = _uniform((n,), -0.25, 0.25, generator) * strength
    zoom = torch.exp(_uniform((n,), -0.16, 0.2 + shrink, generator) * strength)
    stretch = torch.exp(_uniform((n,), -0.1, 0.1, generator) * strength)
    mirror = torch.where(torch.rand((n,), generator=generator) < 0.3, -1.0, 1.0)
    shift = _uniform((n, 2), -0.15, 0.15, generator) * strength
    cos, sin = torch.cos(angle), torch.sin(angle)
    top = torch.stack([mirror * zoom * stretch * cos, -zoom * sin, shift[:, 0]], dim=1)
    bottom = torch.stack([mirror * zoom * sin, zoom / stretch * cos, shift[:, 1]], dim=1)
    grid = functional.affine_grid(torch.stack([top, bottom], dim=1), list(pixels.shape), align_corners=False)
    # White is 1 and the sampler pads with 0, so the distance from white is sampled.
    moved: Tensor = functional.grid_sample(pixels - 1, grid.to(pixels.device), align_corners=False) + 1
    return moved


def _recolour(pixels: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Change contrast, saturation and the gain of each channel, relative to white, which stays white."""
    n = len(pixels)
    distance = pixels - 1
    gain = torch.exp(_uniform((n, 3, 1, 1), -0.12, 0.12, generator) * strength).to(pixels.device)
    contrast = torch.exp(_uniform((n, 1, 1, 1), -0.15, 0.15, generator) * strength).to(pixels.device)
    grey = distance.mean(dim=1, keepdim=True)
    saturation = (1 + _uniform((n, 1, 1, 1), -0.25, 0.25, generator) * strength).to(pixels.device)
    tint = (_uniform((n, 3, 1, 1), -0.04, 0.04, generator) * strength).to(pixels.device)
    return (grey + (distance - grey) * saturation) * gain * contrast + 1 + tint


def _soften(pixels: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Blur two pictures in five and add grain to the next two; changes `pixels` in place."""
    share = len(pixels) * 2 // 5
    sigma = float(_uniform((1,), 0.4, 0.4 + 0.9 * strength, generator))
    pixels[:share] = _blur(pixels[:share], sigma)
    grain = torch.randn((share, *pixels.shape[1:]), generator=generator)
    grain *= _uniform((share, 1, 1, 1), 0.0, 0.08 * strength, generator)
    pixels[share : 2 * share] += grain.to(pixels.device)
    return pixels


def _blur(pixels: Tensor, sigma: float) -> Tensor:
    """Apply a Gaussian of seven pixels as sums of shifted pictures, much faster than a convolution on a CPU."""
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(4)]
    total = weights[0] + 2 * sum(weights[1:])
    for axis in (2, 3):
        padding = (0, 0, 3, 3) if axis == 2 else (3, 3, 0, 0)
        padded = functional.pad(pixels, padding, mode="replicate")
        length = pixels.shape[axis]
        pixels = pixels * (weights[0] / total)
        for offset in range(1, 4):
            pixels += padded.narrow(axis, 3 - offset, length).mul(weights[offset] / total)
            pixels += padded.narrow(axis, 3 + offset, length).mul(weights[offset] / total)
    return pixels


def outlined(pixels: Tensor) -> Tensor:
    """Draw black lines where brightness changes: simulates drawn outlines."""
    return torch.where(_edges(pixels), torch.full_like(pixels, -1), pixels)


def inked(pixels: Tensor) -> Tensor:
    """Return only lines and dark areas, black on white: simulates an ink drawing."""
    dark = pixels.mean(dim=1, keepdim=True) < -0.1
    return torch.where(_edges(pixels) | dark, -1.0, 1.0).expand_as(pixels)


def _edges(pixels: Tensor, contrast: float = 0.3) -> Tensor:
    """Return where a channel's values within 3×3 pixels differ much, `(n, 1, H, W)`, thickened."""
    spread = functional.max_pool2d(pixels, 3, 1, 1) + functional.max_pool2d(-pixels, 3, 1, 1)
    lines = (spread.amax(dim=1, keepdim=True) > contrast).to(pixels.dtype)
    return functional.max_pool2d(lines, 3, 1, 1) > 0
