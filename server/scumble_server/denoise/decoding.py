"""Latents → pixels, also where device memory is short: picture by picture, then piece by piece."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from scumble.errors import OutOfMemory
from scumble_server.executors.protocol import Vae

log = logging.getLogger(__name__)


def decode(vae: Vae, latents: Tensor, *, tiled: bool) -> Tensor:
    """latents `(n, 4, H/8, W/8)` → `(n, H, W, 3)` uint8. Raises OutOfMemory if not even one piece fits."""
    try:
        return vae.decode(latents, tiled=tiled)
    except OutOfMemory as error:
        if len(latents) > 1:
            log.warning("%d pictures do not fit into the VAE at once; one by one: %s", len(latents), error)
            return torch.cat([decode(vae, each[None], tiled=tiled) for each in latents])
        if tiled:
            raise
        log.warning("a picture does not fit into the VAE; piece by piece, as with vae_tiling: %s", error)
    return decode(vae, latents, tiled=True)
