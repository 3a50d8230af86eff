"""What a denoiser's graph may take beside text: each kind of input that a batch may bring, or may be without."""

from __future__ import annotations

from typing import Literal, TypeAlias

Include: TypeAlias = Literal["factors", "full", "stretch_out", "stretch_in", "images", "residuals", "features"]
"""factors: LoRAs over the small layout; full: over the full one; the others as in `scumble_build.graphs.inputs`."""
