"""Hypernetworks of the webui's kind: small networks on the context that attention projects keys and values from.

For a context c of a width that a hypernetwork has networks n_k and n_v for:

    keys are read from    c + weight · n_k(c)        n(c): for each layer  norm(activation(weight c + bias))
    values are read from  c + weight · n_v(c)

Several form a chain, each reading the output of the one before. Dropout is for training only and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from scumble_build.graphs.arrays import as_tensor
from scumble_registry.formats.hypernetwork.context_record import ContextRecord, Layer
from scumble_registry.formats.safetensors_header import Array


def _linear(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": _linear,
    "relu": functional.relu,
    "leakyrelu": functional.leaky_relu,
    "elu": functional.elu,
    "swish": functional.hardswish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "celu": functional.celu,
    "gelu": functional.gelu,
    "hardshrink": functional.hardshrink,
    "hardsigmoid": functional.hardsigmoid,
    "hardswish": functional.hardswish,
    "hardtanh": functional.hardtanh,
    "logsigmoid": functional.logsigmoid,
    "mish": functional.mish,
    "relu6": functional.relu6,
    "rrelu": functional.rrelu,
    "selu": functional.selu,
    "silu": functional.silu,
    "softplus": functional.softplus,
    "softshrink": functional.softshrink,
    "softsign": functional.softsign,
    "tanhshrink": functional.tanhshrink,
}
"""The webui's names, with torch's defaults, as outside training."""


class _Layers(nn.Module):
    """The network for the keys, or for the values, of one context width."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(_with_weights(layer.weight, layer.bias) for layer in layers)
        self.norms = nn.ModuleList(nn.Identity() if layer.norm is None else _norm(*layer.norm) for layer in layers)
        self.activations = [ACTIVATIONS[layer.activation] for layer in layers]

    def forward(self, x: Tensor) -> Tensor:
        for linear, activation, norm in zip(self.linears, self.activations, self.norms, strict=True):
            x = norm(activation(linear(x)))
        return x


class Hypernetwork(nn.Module):
    """All networks of one hypernetwork. Only ever read; any thread may call it."""

    def __init__(self, record: ContextRecord) -> None:
        super().__init__()
        self.widths = frozenset(record)
        self.k = nn.ModuleDict({str(width): _Layers(sides.k) for width, sides in record.items()})
        self.v = nn.ModuleDict({str(width): _Layers(sides.v) for width, sides in record.items()})

    def forward(self, keys: Tensor, values: Tensor, weight: float | Tensor) -> tuple[Tensor, Tensor]:
        """Change contexts `(rows, N, C)` for keys and for values; a width without networks stays as it is.

        weight: one for all, or `(rows, 1, 1)`.
        """
        width = keys.shape[-1]
        if width not in self.widths:
            return keys, values
        of_keys, of_values = self.k[str(width)], self.v[str(width)]
        return keys + weight * of_keys(keys), values + weight * of_values(values)


def parameters_of(record: ContextRecord) -> int:
    """Return the number of parameters of all networks."""
    return sum(array.size for sides in record.values() for layer in (*sides.k, *sides.v) for array in layer.arrays)


def _with_weights(weight: Array, bias: Array) -> nn.Linear:
    out, in_ = weight.shape
    linear = nn.Linear(in_, out, device="meta")
    linear.weight, linear.bias = _frozen(weight), _frozen(bias)
    return linear


def _norm(scale: Array, shift: Array) -> nn.LayerNorm:
    norm = nn.LayerNorm(len(scale), device="meta")
    norm.weight, norm.bias = _frozen(scale), _frozen(shift)
    return norm


def _frozen(values: Array) -> nn.Parameter:
    return nn.Parameter(as_tensor(values), requires_grad=False)
