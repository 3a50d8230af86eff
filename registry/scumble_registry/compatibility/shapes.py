"""Shapes of weights, and their form in error messages."""

from __future__ import annotations

from collections.abc import Iterable

Shape = tuple[int, ...]
"""`(out, in)` of a matrix, `(out, in, k, k)` of a convolution, `(channels,)` of a norm."""


def matrix_shape(shape: Shape) -> Shape:
    """Return the shape of a 1x1 convolution as a matrix's: SD 1's and SD 2's `proj_in` differ in nothing else."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def show_shape(shape: Shape) -> str:
    return "x".join(map(str, shape))


def show_value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def show_widths(widths: Iterable[int]) -> str:
    return ", ".join(map(str, widths)) or "none"
