"""A VAE that runs in its exported graphs: diffusers' AutoencoderKL with sessions as encoder and decoder."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from scumble_server.executors.sessions import BaseSessions
from scumble_server.executors.torch.vae import TorchVae


class _Half(nn.Module):
    """The encoder or the decoder, with the interface that diffusers calls."""

    def __init__(self, sessions: BaseSessions, name: str, port: str, device: torch.device) -> None:
        """Take the graph `name`, whose only input is `port`."""
        super().__init__()
        # diffusers reads a model's device and dtype from its parameters.
        self.placeholder = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        self._sessions, self._name, self._port = sessions, name, port

    def forward(self, x: Tensor, *_unused: Tensor | None) -> Tensor:
        return self._sessions[self._name]({self._port: x})[0]


def graph_vae(sessions: BaseSessions, device: str | torch.device) -> TorchVae:
    """Make a VAE from sessions. Scaling is diffusers', on `device`; inputs and outputs are float32."""
    with torch.device("meta"):
        kind: Any = AutoencoderKL
        shell = kind.from_config(sessions.graphs.vae.config)
    shell.decoder = _Half(sessions, "vae_decoder", "latents", torch.device(device))
    shell.encoder = _Half(sessions, "vae_encoder", "pixels", torch.device(device))
    shell.quant_conv = shell.post_quant_conv = nn.Identity()
    shell.eval()
    limits = sessions["vae_decoder"].limits
    return TorchVae(shell, max(limits.least("height"), limits.least("width")))
