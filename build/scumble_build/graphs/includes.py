"""The optional inputs of a denoiser's graph, besides text: a batch may have each of them or not."""

from __future__ import annotations

from typing import Literal, TypeAlias

Include: TypeAlias = Literal["factors", "full", "stretch_out", "stretch_in", "images", "residuals", "features"]
"""factors: LoRAs over the small layout; full: over the full one; the others as in `scumble_build.graphs.inputs`."""
