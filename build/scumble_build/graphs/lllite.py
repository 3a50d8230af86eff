"""ControlNet-LLLite: changes the input of matrices in the UNet's attention by an embedded picture.

    W reads    x + weight · up(relu(mid([embedding, relu(down(x))])))

The embedding of a position depends on the picture alone, so it is computed once per request. (File format and source:
`scumble_registry.formats.controlnet.lllite`.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, relu

from scumble.errors import Refused
from scumble_registry.compatibility import lllite_names
from scumble_registry.formats.controlnet import FILE_NAME
from scumble_registry.formats.controlnet.lllite import parts

Embeddings = Mapping[str, Tensor]
"""Target → `(1, N, e)`, one vector for each of the N positions of its hidden states."""
_CONVOLUTIONS = ("conditioning1.0", "conditioning1.2", "conditioning1.4")


class LLLite(nn.Module):
    """The networks of one LLLite by the canonical names of the matrices that they change. Read-only."""

    def __init__(self, networks: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().__init__()
        self._networks = {name: dict(tensors) for name, tensors in networks.items()}

    @property
    def targets(self) -> frozenset[str]:
        return frozenset(self._networks)

    def to_like(self, like: Tensor) -> LLLite:
        """Return the same net on `like`'s device, in its dtype."""
        return LLLite({name: {part: v.to(like) for part, v in own.items()} for name, own in self._networks.items()})

    def embed(self, control: Tensor) -> dict[str, Tensor]:
        """Embed a control picture `(1, 3, H, W)` in 0…1 for every target."""
        embeddings = {}
        for target, own in self._networks.items():
            x = 2 * control - 1
            for part in (name for name in _CONVOLUTIONS if f"{name}.weight" in own):
                weight = own[f"{part}.weight"]
                x = conv2d(x if part == _CONVOLUTIONS[0] else relu(x), weight, own[f"{part}.bias"], weight.shape[-1])
            embeddings[target] = x.flatten(2).transpose(1, 2)
        return embeddings

    def embedded_values(self, height: int, width: int) -> int:
        """Return how many numbers `embed` returns for a picture of this size, in pixels."""
        total = 0
        for own in self._networks.values():
            weights = [own[f"{part}.weight"] for part in _CONVOLUTIONS if f"{part}.weight" in own]
            step = 1
            for weight in weights:
                step *= weight.shape[-1]
            total += (height // step) * (width // step) * weights[-1].shape[0]
        return total

    def change(self, target: str, x: Tensor, embedding: Tensor) -> Tensor:
        """Return what is added to x `(m, N, in)` at weight 1; embedding `(m, N, e)`."""
        own = self._networks[target]
        down = relu(linear(x, own["down.0.weight"], own["down.0.bias"]))
        mid = relu(linear(torch.cat([embedding, down], dim=-1), own["mid.0.weight"], own["mid.0.bias"]))
        return linear(mid, own["up.0.weight"], own["up.0.bias"])


def load_lllite(folder: Path, targets: Iterable[str]) -> LLLite:
    """Load a net from a published folder; `targets` are the base's. Raises Refused for a module that it
    does not have.
    """
    tensors = load_file(folder / FILE_NAME)
    names = lllite_names(targets)
    networks: dict[str, dict[str, Tensor]] = {}
    for module, own in parts(tensors).items():
        if module not in names:
            raise Refused(f"the net changes {module}, which the base does not have", tensor=module)
        networks[names[module]] = {part: tensors[name] for part, name in own.items()}
    return LLLite(networks)
